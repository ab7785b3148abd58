"""Embedding files, in and out: delimited text that Hive can load, Parquet, and `.npy` with its ids.

All three hold the same rows in the same order: the kept columns as text, and a float32 vector or nothing. Text has
the vector as shortest round-trip decimals separated by single spaces, so every format gives back the same bits.
"""
