"""A page and a REST interface for search with a trained model."""
