"""Training: from one typed configuration to a run folder with an adapter in it.

Start reading at ``loop.py``, which shows the whole run. ``config.py`` has the settings.
"""
