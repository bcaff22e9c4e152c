"""The paper: its tables, its recipes, and the runs that put a row of one's own beside its rows."""
