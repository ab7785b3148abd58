"""Stage 2: encode a catalogue of Hive text."""
