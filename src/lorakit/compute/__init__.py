"""A base model with its adapter, ready to run: opened, batched, with its loss and its faster parts."""
