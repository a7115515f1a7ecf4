"""Build a verified bundle from a recipe."""
