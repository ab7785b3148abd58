"""Configuration: a knob is one field of a dataclass, and all else follows from that field.

Its name, type, default and help give the checks of dicts, YAML presets and flags, the text of `--help`, the tables in
the documents and the saved config of a run. Precedence: default < preset < user.
"""
