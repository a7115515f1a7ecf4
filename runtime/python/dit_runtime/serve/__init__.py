"""Step-level batching: many requests share each call of a bundle's step stage. No web framework is in here."""
