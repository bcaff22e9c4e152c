"""Initialisations of A."""

from typing import Literal

Init = Literal["kaiming", "gaussian", "pissa"]

GAUSSIAN_STD = 0.02
"""Standard deviation of A in the first release of the paper's code; the paper gives none."""
