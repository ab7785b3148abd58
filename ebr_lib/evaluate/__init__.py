"""Extension: measure whether retrieval got better."""
