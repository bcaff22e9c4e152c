"""RoBERTa and DeBERTa on GLUE: Tables 9 and 10 of the paper, and the scripts of its code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakit.paper.recipe import Family, bottleneck, lora, tables_by_method

_AVERAGED = "The paper reports the median over 5 seeds of the best epoch of each run."
_HEAD = "The classification head is also trained; the paper's parameter counts exclude it."
_BATCH = (
    "The paper's batch sizes equal the per-device sizes of the scripts, which start 8 processes (2 for CoLA on "
    "RoBERTa-base): the global batch size is uncertain."
)
_GPUS = "A batch covers all processes of the script: batch_size per process, one accumulation step per process."

_ADAM: dict[str, Any] = {
    "optimizer.schedule": "linear",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.clip": 1.0,
}

_TABLE9 = "Table 9"
_ROBERTA_PAPER = {"lora.init": "gaussian", "optimizer.warmup": 0.06}
_ROBERTA_CODE = {
    **lora(8, "attention.qv", alpha=16),
    **_ADAM,
    "lora.init": "kaiming",
    "optimizer.warmup": 0.06,
    "optimizer.weight_decay": 0.1,
    "seed": 0,
}

_ROBERTA_BASE = Family(
    model="roberta-base",
    method="lora",
    origin="paper",
    source=_TABLE9,
    settings={**lora(8, "attention.qv", alpha=8), **_ROBERTA_PAPER, "data.max_length": 512},
    tasks="""
                            | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
    batch_size              | 16   | 16   | 16   | 32   | 32   | 16   | 32   | 16
    epochs                  | 30   | 60   | 30   | 80   | 25   | 25   | 80   | 40
    optimizer.learning_rate | 5e-4 | 5e-4 | 4e-4 | 4e-4 | 4e-4 | 5e-4 | 5e-4 | 4e-4
    start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
    """,
    notes=(_AVERAGED, _HEAD, _BATCH, "alpha is 8 in the paper and 16 in the code."),
)
_ROBERTA = (
    Family(
        model="roberta-base",
        method="lora",
        origin="code",
        source="microsoft/LoRA, examples/NLU, roberta_base_*.sh",
        settings={**_ROBERTA_CODE, "data.max_length": 512},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        batch_size              | 16   | 16   | 16   | 32   | 32   | 16   | 32   | 16
        accumulation            | 8    | 8    | 8    | 2    | 8    | 8    | 8    | 8
        epochs                  | 30   | 60   | 30   | 80   | 25   | 25   | 80   | 40
        optimizer.learning_rate | 5e-4 | 5e-4 | 4e-4 | 4e-4 | 4e-4 | 5e-4 | 5e-4 | 4e-4
        start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
        """,
        notes=(_GPUS, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="lora",
        origin="paper",
        source=_TABLE9,
        settings={**lora(8, "attention.qv", alpha=16), **_ROBERTA_PAPER},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        batch_size              | 4    | 4    | 4    | 4    | 4    | 4    | 8    | 8
        epochs                  | 10   | 10   | 20   | 20   | 10   | 20   | 20   | 30
        optimizer.learning_rate | 3e-4 | 4e-4 | 3e-4 | 2e-4 | 2e-4 | 3e-4 | 4e-4 | 2e-4
        data.max_length         | 128  | 128  | 512  | 128  | 512  | 512  | 512  | 512
        start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
        """,
        notes=(_AVERAGED, _HEAD, _BATCH),
    ),
    Family(
        model="roberta-large",
        method="lora",
        origin="code",
        source="microsoft/LoRA, examples/NLU, roberta_large_*.sh",
        settings=_ROBERTA_CODE,
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        batch_size              | 4    | 8    | 4    | 4    | 4    | 4    | 8    | 4
        accumulation            | 8    | 8    | 8    | 8    | 8    | 8    | 8    | 8
        epochs                  | 10   | 10   | 20   | 20   | 10   | 20   | 20   | 10
        optimizer.learning_rate | 3e-4 | 4e-4 | 3e-4 | 3e-4 | 2e-4 | 3e-4 | 4e-4 | 3e-4
        data.max_length         | 128  | 512  | 512  | 128  | 512  | 512  | 512  | 128
        start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
        """,
        notes=(_GPUS, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="lora-restricted",
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={
            **lora(8, "attention.qv", alpha=16),
            **_ROBERTA_PAPER,
            "data.max_length": 128,
            "batch_size": 4,
        },
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 10   | 10   | 20   | 20   | 10   | 20   | 20   | 10
        optimizer.learning_rate | 3e-4 | 4e-4 | 3e-4 | 2e-4 | 2e-4 | 3e-4 | 4e-4 | 2e-4
        """,
        notes=(_AVERAGED, _HEAD, _BATCH),
    ),
)

_BOTTLENECK: dict[str, Any] = {
    "data.max_length": 128,
    "batch_size": 32,
    "optimizer.warmup": 0.06,
}


_ADAPTER_TASKS = tables_by_method("""
method        | setting                 | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
pfeiffer-3m   | epochs                  | 10   | 20   | 20   | 20   | 10   | 20   | 20   | 20
pfeiffer-3m   | optimizer.learning_rate | 3e-5 | 3e-5 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
pfeiffer-0.8m | epochs                  | 5    | 20   | 20   | 20   | 10   | 20   | 20   | 20
pfeiffer-0.8m | optimizer.learning_rate | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
houlsby-6m    | epochs                  | 10   | 5    | 10   | 10   | 5    | 20   | 20   | 10
houlsby-6m    | optimizer.learning_rate | 3e-5 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
houlsby-0.8m  | epochs                  | 10   | 5    | 10   | 10   | 5    | 20   | 20   | 10
houlsby-0.8m  | optimizer.learning_rate | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
""")


def _adapter(method: str, kind: str, size: int, *notes: str) -> Family:
    return Family(
        model="roberta-large",
        method=method,
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={**bottleneck(kind, size), **_BOTTLENECK},
        tasks=_ADAPTER_TASKS[method],
        notes=(_AVERAGED, _HEAD, *notes),
    )


def _adapter_script(method: str, kind: str, size: int, activation: str) -> Family:
    return Family(
        model="roberta-large",
        method=method,
        origin="code",
        source=f"microsoft/LoRA, examples/NLU, adapter_{kind}_roberta_large_mnli.sh",
        settings={
            **_ADAM,
            **_BOTTLENECK,
            "optimizer.warmup": 0.1,
            "optimizer.weight_decay": 0.0,
            "seed": 0,
            **bottleneck(kind, size),
            "bottleneck.activation": activation,
        },
        tasks="""
                                | mnli
        accumulation            | 8
        epochs                  | 5
        optimizer.learning_rate | 3e-4
        """,
        notes=(_GPUS, _HEAD),
    )


_ADAPTERS = (
    _adapter("pfeiffer-3m", "pfeiffer", 64),
    _adapter("pfeiffer-0.8m", "pfeiffer", 16),
    _adapter("houlsby-6m", "houlsby", 64),
    _adapter("houlsby-0.8m", "houlsby", 8, "MNLI has 10 epochs in the paper and 5 in the code."),
    _adapter_script("houlsby-0.8m", "houlsby", 8, "silu"),
    _adapter_script("pfeiffer-0.8m", "pfeiffer", 16, "relu"),
)

_DEBERTA = (
    Family(
        model="deberta-v2-xxlarge",
        method="lora",
        origin="paper",
        source="Table 10",
        settings={
            **lora(8, "attention.qv", alpha=8),
            "lora.init": "gaussian",
            "optimizer.warmup": 0.1,
        },
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        batch_size              | 8    | 8    | 32   | 4    | 6    | 8    | 4    | 4
        epochs                  | 5    | 16   | 30   | 10   | 8    | 11   | 11   | 10
        optimizer.learning_rate | 1e-4 | 6e-5 | 2e-4 | 1e-4 | 1e-4 | 1e-4 | 2e-4 | 2e-4
        optimizer.weight_decay  | 0    | 0.01 | 0.01 | 0    | 0.01 | 0.01 | 0.01 | 0.1
        data.max_length         | 256  | 128  | 128  | 64   | 512  | 320  | 320  | 128
        head_dropout            | 0.15 | 0    | 0    | 0.1  | 0.1  | 0.2  | 0.2  | 0.2
        start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
        """,
        notes=(
            _AVERAGED,
            _HEAD,
            _BATCH,
            "Rank 8 is as printed; the 4.7M parameters in Table 2 require rank 16, as in the code.",
        ),
    ),
    Family(
        model="deberta-v2-xxlarge",
        method="lora",
        origin="code",
        source="microsoft/LoRA, examples/NLU, deberta_v2_xxlarge_*.sh",
        settings={
            **lora(16, "attention.qv", alpha=32),
            **_ADAM,
            "lora.init": "gaussian",
            "seed": 0,
        },
        tasks="""
                                | mnli | sst2 | mrpc | cola   | qnli | qqp   | rte    | stsb
        batch_size              | 8    | 8    | 32   | 4      | 6    | 8     | 4      | 4
        accumulation            | 8    | 8    | 8    | 8      | 8    | 8     | 8      | 8
        epochs                  | 5    | 16   | 30   | 10     | 8    | 11    | 11     | 10
        optimizer.learning_rate | 1e-4 | 6e-5 | 2e-4 | 1.3e-4 | 1e-4 | 1e-4  | 2.6e-4 | 2e-4
        optimizer.weight_decay  | 0    | 0.01 | 0.01 | 0      | 0.01 | 0.01  | 0.01   | 0.1
        optimizer.warmup        | 1000 | 1000 | 0.1  | 100    | 500  | 10000 | 50     | 100
        data.max_length         | 256  | 128  | 128  | 64     | 512  | 320   | 320    | 128
        head_dropout            | 0.15 | 0    | 0    | 0.1    | 0.1  | 0.2   | 0.2    | 0.2
        evaluation.every        | 500  | 100  | 10   | 20     | 500  | 500   | 20     | 50
        start                   | -    | -    | mnli | -      | -    | -     | mnli   | mnli
        """,
        notes=(_GPUS, _HEAD, "The script computes in float16; a run uses bfloat16 or float32."),
    ),
)

_MPNET = replace(
    _ROBERTA_BASE,
    model="mpnet-base",
    origin="derived",
    source=f"{_TABLE9}, RoBERTa-base",
    notes=(
        *_ROBERTA_BASE.notes,
        "These are the settings of RoBERTa-base, which has the same number of layers and the same width.",
        "MPNet-base was trained further on pairs that include NLI, Quora and SQuAD data: its scores on MNLI, QQP "
        "and QNLI are not comparable.",
    ),
)

GLUE: tuple[Family, ...] = (_ROBERTA_BASE, *_ROBERTA, *_ADAPTERS, *_DEBERTA, _MPNET)
