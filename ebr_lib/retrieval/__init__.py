"""Retrieval: metrics and the Faiss index."""
