"""Base models: the roles of their layers, and how to load them."""
