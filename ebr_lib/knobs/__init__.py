"""Knobs: each is one line of a config; checks, flags, help and tables follow from it."""
