"""Entry point: an index over HTTP, and a page to try it."""
