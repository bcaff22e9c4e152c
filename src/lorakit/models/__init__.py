"""What the base model is: the roles of its layers, and how to load it."""
