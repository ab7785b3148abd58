"""Models: loading, encoding, losses, training."""
