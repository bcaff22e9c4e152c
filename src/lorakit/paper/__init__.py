"""The LoRA paper: its published tables, its recipes, and runs that reproduce the tables on your model."""
