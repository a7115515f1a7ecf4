"""From a recipe to a verified bundle."""
