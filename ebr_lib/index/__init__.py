"""Extension: a Faiss index over an embedding file; searching and changing it."""
