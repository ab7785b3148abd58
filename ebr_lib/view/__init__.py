"""Seeing embeddings: projections, cluster metrics, the picture, the explorer."""
