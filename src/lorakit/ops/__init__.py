"""Tensor functions that do not depend on models or adapters."""

from lorakit.ops.attention import masked_attention
from lorakit.ops.compiling import allow_graphs
from lorakit.ops.dropout import Keys, dropout
from lorakit.ops.flex_attention import flex_masked_attention, flex_serves
from lorakit.ops.keyed_dropout import keyed
from lorakit.ops.linear_cross_entropy import linear_cross_entropy
from lorakit.ops.lora_linear import lora_linear
from lorakit.ops.rms_norm import rms_norm
from lorakit.ops.rows import put_rows, rounded_rows, take_rows
from lorakit.ops.seeding import seeded
from lorakit.ops.silu_product import silu_product

__all__ = [
    "Keys",
    "allow_graphs",
    "dropout",
    "flex_masked_attention",
    "flex_serves",
    "keyed",
    "linear_cross_entropy",
    "lora_linear",
    "masked_attention",
    "put_rows",
    "rms_norm",
    "rounded_rows",
    "seeded",
    "silu_product",
    "take_rows",
]
