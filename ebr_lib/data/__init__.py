"""Data in and out: training pairs, Hive text, embedding files."""
