"""Extension stage: whether an endpoint gives the trained model's vectors."""
