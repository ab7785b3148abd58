"""Stage 3: draw an embedding file, and measure its clusters."""
