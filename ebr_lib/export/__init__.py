"""Extension stage: a trained model as one folder for other engines."""
