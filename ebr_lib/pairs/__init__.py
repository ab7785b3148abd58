"""Training pairs and a held-out set out of a click log."""
