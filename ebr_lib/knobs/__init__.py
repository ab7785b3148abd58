"""Configuration: a knob is one line of a dataclass, everything else is read off that line.

From a field's name, type, default and help come: the check of a dict, of a YAML preset and of command-line flags,
the help text, the table in the README and the saved config of a run. Order: default < preset < what the user gave.
"""
