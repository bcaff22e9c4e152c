"""Training: from one typed configuration to a run folder with an adapter in it.

Read ``loop.py`` first, it is the whole of it; ``config.py`` has the settings, and each step of the loop is one module.
"""
