"""Embedding files: delimited text, Parquet, or `.npy`."""
