"""GPT-3 on WikiSQL, MNLI and SAMSum: section D.4, and Tables 12 and 17 of the paper."""

from __future__ import annotations

from typing import Any

from lorakit.paper.recipe import Family, bottleneck, prefix, tables_by_method

_UNPUBLISHED = "The paper does not print Adam's betas, the prompts or the number of GPUs for GPT-3."
_ALPHA = (
    "The paper does not print LoRA's alpha and dropout for GPT-3; these are lorakit's defaults."
)


_SHARED: dict[str, Any] = {
    "warmup_tokens": 250_000,
    "optimizer.schedule": "linear",
    "optimizer.weight_decay": 0.1,
}


def _family(method: str, source: str, settings: dict[str, Any], tasks: str, *notes: str) -> Family:
    return Family(
        model="gpt3-175b",
        method=method,
        origin="paper",
        source=source,
        settings=settings,
        tasks=tasks,
        notes=(_UNPUBLISHED, *notes),
    )


_LENGTHS = """
                | wikisql | mnli | samsum
data.max_length | 384     | 768  | 2048
"""


def _gpt3(method: str, settings: dict[str, Any], rate: float, *notes: str) -> Family:
    length = {"batch_size": 128, "epochs": 2}
    settings = {**length, **_SHARED, "optimizer.learning_rate": rate, **settings}
    return _family(method, "section D.4 and Table 12", settings, _LENGTHS, *notes)


def _lora(rank: int, *targets: str) -> dict[str, Any]:
    """Return the settings of LoRA with the default alpha."""
    return {
        "method": "lora",
        "lora.rank": rank,
        "lora.targets": targets,
        "lora.init": "gaussian",
    }


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

_LOW_DATA_TASKS = tables_by_method("""
method           | setting                        | mnli-100 | mnli-1k | mnli-10k | mnli-392k
                 | batch_size                     | 20       | 20      | 100      | 128
                 | epochs                         | 40       | 40      | 4        | 2
full             | optimizer.learning_rate        | 5e-6     | 5e-6    | 5e-6     | 5e-6
prefix_embedding | optimizer.learning_rate        | 2e-4     | 2e-4    | 4e-4     | 5e-4
prefix_embedding | prefix_embedding.prefix_length | 16       | 32      | 64       | 256
prefix_layer     | optimizer.learning_rate        | 5e-5     | 5e-5    | 5e-5     | 1e-4
lora             | optimizer.learning_rate        | 2e-4     | 2e-4    | 2e-4     | 2e-4
""")


def _low_data(method: str, settings: dict[str, Any], *notes: str) -> Family:
    settings = {**_SHARED, "data.max_length": 768, **settings}
    return _family(method, "Table 17", settings, _LOW_DATA_TASKS[method], *notes)


_GPT3_LOW_DATA = (
    _low_data("full", {"method": "full"}),
    _low_data(
        "prefix_embedding", {"method": "prefix_embedding", "prefix_embedding.infix_length": 8}
    ),
    _low_data("prefix_layer", prefix("prefix_layer", 8, 8)),
    _low_data("lora", _lora(8, "attention.qv"), _ALPHA),
)

GPT3: tuple[Family, ...] = (*_GPT3, *_GPT3_LOW_DATA)
