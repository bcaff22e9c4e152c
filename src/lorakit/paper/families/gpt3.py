"""GPT-3 on WikiSQL, MNLI and SAMSum: section D.4, and Tables 12 and 17 of the paper."""

from __future__ import annotations

from typing import Any

from lorakit.paper.method_settings import bottleneck, prefix
from lorakit.paper.recipe import Family

_UNPUBLISHED = "The paper does not print Adam's betas, the prompts or the number of GPUs for GPT-3."
_ALPHA = (
    "The paper does not print LoRA's alpha and dropout for GPT-3; these are lorakit's defaults."
)


def _gpt3(method: str, settings: dict[str, Any], rate: float, *notes: str) -> Family:
    return Family(
        model="gpt3-175b",
        method=method,
        origin="paper",
        source="section D.4 and Table 12",
        settings={
            "batch_size": 128,
            "epochs": 2,
            "warmup_tokens": 250_000,
            "optimizer.schedule": "linear",
            "optimizer.weight_decay": 0.1,
            "optimizer.learning_rate": rate,
            **settings,
        },
        tasks="""
                        | wikisql | mnli | samsum
        data.max_length | 384     | 768  | 2048
        """,
        notes=(_UNPUBLISHED, *notes),
    )


def _lora(rank: int, *targets: str) -> dict[str, Any]:
    """Return the settings of LoRA with the default alpha."""
    return {"method": "lora", "lora.rank": rank, "lora.targets": targets}


_GPT3 = (
    _gpt3("full", {"method": "full"}, 5e-6),
    _gpt3("prefix_embedding", prefix("prefix_embedding", 256, 8), 5e-4),
    _gpt3("prefix_layer", prefix("prefix_layer", 8, 8), 1e-4),
    _gpt3("bitfit", {"method": "bitfit"}, 1.6e-3),
    _gpt3("houlsby-7.1m", bottleneck("houlsby", 1), 1e-4),
    _gpt3("houlsby-40.1m", bottleneck("houlsby", 8), 1e-4),
    _gpt3("lora-4.7m", _lora(1, "attention.qv"), 2e-4, _ALPHA),
    _gpt3("lora-4.7m-v", _lora(2, "attention.v"), 2e-4, _ALPHA),
    _gpt3("lora-37.7m", _lora(8, "attention.qv"), 2e-4, _ALPHA),
    _gpt3(
        "lora-37.7m-qkvo",
        _lora(4, "attention"),
        2e-4,
        _ALPHA,
        "Section D.4 prints rank 2 for all four matrices; 37.7M parameters and Table 15 give 4.",
    ),
)

_LOW_DATA: dict[str, Any] = {
    "warmup_tokens": 250_000,
    "optimizer.schedule": "linear",
    "optimizer.weight_decay": 0.1,
    "data.max_length": 768,
}
_LOW_DATA_RUNS = """
                        | mnli-100 | mnli-1k | mnli-10k | mnli-392k
batch_size              | 20       | 20      | 100      | 128
epochs                  | 40       | 40      | 4        | 2
"""


def _low_data(method: str, settings: dict[str, Any], tasks: str, *notes: str) -> Family:
    return Family(
        model="gpt3-175b",
        method=method,
        origin="paper",
        source="Table 17",
        settings={**_LOW_DATA, **settings},
        tasks=_LOW_DATA_RUNS.strip() + "\n" + tasks.strip(),
        notes=(_UNPUBLISHED, *notes),
    )


_GPT3_LOW_DATA = (
    _low_data("full", {"method": "full"}, "optimizer.learning_rate | 5e-6 | 5e-6 | 5e-6 | 5e-6"),
    _low_data(
        "prefix_embedding",
        {"method": "prefix_embedding", "prefix_embedding.infix_length": 8},
        """
optimizer.learning_rate        | 2e-4 | 2e-4 | 4e-4 | 5e-4
prefix_embedding.prefix_length | 16   | 32   | 64   | 256
        """,
    ),
    _low_data(
        "prefix_layer",
        prefix("prefix_layer", 8, 8),
        "optimizer.learning_rate | 5e-5 | 5e-5 | 5e-5 | 1e-4",
    ),
    _low_data(
        "lora",
        _lora(8, "attention.qv"),
        "optimizer.learning_rate | 2e-4 | 2e-4 | 2e-4 | 2e-4",
        _ALPHA,
    ),
)

GPT3: tuple[Family, ...] = (*_GPT3, *_GPT3_LOW_DATA)
