"""The hyper-parameters of the paper (Tables 9 to 12 and 17), of its code, and of the prior work that it quotes."""

from __future__ import annotations

from lorakit.paper.families.glue import GLUE
from lorakit.paper.families.gpt2 import GPT2
from lorakit.paper.families.gpt3 import GPT3
from lorakit.paper.recipe import Family

FAMILIES: tuple[Family, ...] = (*GLUE, *GPT2, *GPT3)
"""Every family, in the order of the paper."""
