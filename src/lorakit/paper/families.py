"""The hyper-parameters of the paper (Tables 9 to 12 and 17), of its code, and of the work it quotes."""

from __future__ import annotations

from typing import Any

from lorakit.paper.recipes import Family

_AVERAGED = "The paper reports the median over 5 seeds, of the best epoch of each run."
_HEAD = "The classification head is trained too; the paper's counts leave it out."
_BATCH = (
    "The paper's batch sizes are those of one device in the scripts, which start 8 processes (2 for CoLA on "
    "RoBERTa-base): the size of a whole batch is not certain."
)
_GPUS = "A batch is that of all of the script's processes: batch_size on each, as many accumulated."

_GLUE: dict[str, Any] = {"method": "lora", "lora.targets": ("attention.qv",)}
_ADAM: dict[str, Any] = {
    "optimizer.schedule": "linear",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.clip": 1.0,
}

_TABLE9 = "Table 9"
_ROBERTA_PAPER = {**_GLUE, "lora.rank": 8, "lora.init": "gaussian", "optimizer.warmup": 0.06}
_ROBERTA_CODE = {
    **_GLUE,
    **_ADAM,
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.init": "kaiming",
    "optimizer.warmup": 0.06,
    "optimizer.weight_decay": 0.1,
    "seed": 0,
}

_ROBERTA = (
    Family(
        model="roberta-base",
        method="lora",
        origin="paper",
        source=_TABLE9,
        settings={**_ROBERTA_PAPER, "lora.alpha": 8, "data.max_length": 512},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        batch_size              | 16   | 16   | 16   | 32   | 32   | 16   | 32   | 16
        epochs                  | 30   | 60   | 30   | 80   | 25   | 25   | 80   | 40
        optimizer.learning_rate | 5e-4 | 5e-4 | 4e-4 | 4e-4 | 4e-4 | 5e-4 | 5e-4 | 4e-4
        start                   | -    | -    | mnli | -    | -    | -    | mnli | mnli
        """,
        notes=(_AVERAGED, _HEAD, _BATCH, "alpha is 8 in the paper and 16 in the code."),
    ),
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
        settings={**_ROBERTA_PAPER, "lora.alpha": 16},
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
        settings={**_ROBERTA_PAPER, "lora.alpha": 16, "data.max_length": 128, "batch_size": 4},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 10   | 10   | 20   | 20   | 10   | 20   | 20   | 10
        optimizer.learning_rate | 3e-4 | 4e-4 | 3e-4 | 2e-4 | 2e-4 | 3e-4 | 4e-4 | 2e-4
        """,
        notes=(_AVERAGED, _HEAD, _BATCH),
    ),
)

_BOTTLENECK: dict[str, Any] = {
    "method": "bottleneck",
    "data.max_length": 128,
    "batch_size": 32,
    "optimizer.warmup": 0.06,
}
_MNLI_SCRIPT = {
    **_ADAM,
    **_BOTTLENECK,
    "optimizer.warmup": 0.1,
    "optimizer.weight_decay": 0.0,
    "seed": 0,
}
_MNLI_TASK = """
                        | mnli
accumulation            | 8
epochs                  | 5
optimizer.learning_rate | 3e-4
"""

_ADAPTERS = (
    Family(
        model="roberta-large",
        method="pfeiffer-3m",
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={**_BOTTLENECK, "bottleneck.kind": "pfeiffer", "bottleneck.size": 64},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 10   | 20   | 20   | 20   | 10   | 20   | 20   | 20
        optimizer.learning_rate | 3e-5 | 3e-5 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
        """,
        notes=(_AVERAGED, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="pfeiffer-0.8m",
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={**_BOTTLENECK, "bottleneck.kind": "pfeiffer", "bottleneck.size": 16},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 5    | 20   | 20   | 20   | 10   | 20   | 20   | 20
        optimizer.learning_rate | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
        """,
        notes=(_AVERAGED, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="houlsby-6m",
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={**_BOTTLENECK, "bottleneck.kind": "houlsby", "bottleneck.size": 64},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 10   | 5    | 10   | 10   | 5    | 20   | 20   | 10
        optimizer.learning_rate | 3e-5 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
        """,
        notes=(_AVERAGED, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="houlsby-0.8m",
        origin="paper",
        source=f"{_TABLE9} (†)",
        settings={**_BOTTLENECK, "bottleneck.kind": "houlsby", "bottleneck.size": 8},
        tasks="""
                                | mnli | sst2 | mrpc | cola | qnli | qqp  | rte  | stsb
        epochs                  | 10   | 5    | 10   | 10   | 5    | 20   | 20   | 10
        optimizer.learning_rate | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4 | 3e-4
        """,
        notes=(_AVERAGED, _HEAD, "MNLI has 10 epochs in the paper and 5 in the code."),
    ),
    Family(
        model="roberta-large",
        method="houlsby-0.8m",
        origin="code",
        source="microsoft/LoRA, examples/NLU, adapter_houlsby_roberta_large_mnli.sh",
        settings={
            **_MNLI_SCRIPT,
            "bottleneck.kind": "houlsby",
            "bottleneck.size": 8,
            "bottleneck.activation": "silu",
        },
        tasks=_MNLI_TASK,
        notes=(_GPUS, _HEAD),
    ),
    Family(
        model="roberta-large",
        method="pfeiffer-0.8m",
        origin="code",
        source="microsoft/LoRA, examples/NLU, adapter_pfeiffer_roberta_large_mnli.sh",
        settings={
            **_MNLI_SCRIPT,
            "bottleneck.kind": "pfeiffer",
            "bottleneck.size": 16,
            "bottleneck.activation": "relu",
        },
        tasks=_MNLI_TASK,
        notes=(_GPUS, _HEAD),
    ),
)

_DEBERTA = (
    Family(
        model="deberta-v2-xxlarge",
        method="lora",
        origin="paper",
        source="Table 10",
        settings={
            **_GLUE,
            "lora.rank": 8,
            "lora.alpha": 8,
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
            "Rank 8 is as printed; the 4.7M parameters of Table 2 need rank 16, as in the code.",
        ),
    ),
    Family(
        model="deberta-v2-xxlarge",
        method="lora",
        origin="code",
        source="microsoft/LoRA, examples/NLU, deberta_v2_xxlarge_*.sh",
        settings={
            **_GLUE,
            **_ADAM,
            "lora.rank": 16,
            "lora.alpha": 32,
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
        notes=(_GPUS, _HEAD, "The script computes in float16; a run takes bfloat16 or float32."),
    ),
)

_BEAMS = {"beams": 10, "no_repeat_ngram": 4}
_ALL_EPOCHS = "The paper reports the mean over 3 seeds, of the best epoch of each run."


def _gpt2_paper(model: str) -> Family:
    return Family(
        model=model,
        method="lora",
        origin="paper",
        source="Table 11",
        settings={
            **_GLUE,
            "lora.rank": 4,
            "lora.alpha": 32,
            "lora.init": "gaussian",
            "batch_size": 8,
            "epochs": 5,
            "optimizer.learning_rate": 2e-4,
            "optimizer.schedule": "linear",
            "optimizer.warmup": 500,
            "data.max_length": 512,
        },
        tasks="""
                               | e2e_nlg | webnlg | dart
        optimizer.weight_decay | 0.01    | 0.01   | 0
        lora.dropout           | 0.1     | 0.1    | 0
        label_smoothing        | 0.1     | 0.1    | 0
        length_penalty         | 0.9     | 0.8    | 0.8
        """,
        decoding=_BEAMS,
        notes=(
            _ALL_EPOCHS,
            "The dropout of the table is taken for that of LoRA, which in the code is the only one.",
        ),
    )


_GPT2 = (
    _gpt2_paper("gpt2-medium"),
    _gpt2_paper("gpt2-large"),
    Family(
        model="gpt2-medium",
        method="lora",
        origin="code",
        source="microsoft/LoRA, examples/NLG, README and src",
        settings={
            **_GLUE,
            "lora.rank": 4,
            "lora.alpha": 32,
            "lora.dropout": 0.1,
            "lora.init": "kaiming",
            "batch_size": 8,
            "accumulation": 1,
            "epochs": 5,
            "label_smoothing": 0.1,
            "optimizer.schedule": "linear",
            "optimizer.warmup": 500,
            "optimizer.betas": (0.9, 0.999),
            "optimizer.eps": 1e-6,
            "optimizer.clip": 0.0,
            "optimizer.weight_decay": 0.01,
            "data.max_length": 512,
            "seed": 110,
        },
        tasks="""
                                | e2e_nlg
        optimizer.learning_rate | 2e-4
        """,
        decoding={**_BEAMS, "length_penalty": 0.8, "max_new_tokens": 64},
        notes=(
            "The model's own dropout is 0 there; a run keeps the base's.",
            "The length penalty is 0.8 here and 0.9 in the paper.",
        ),
    ),
)

_LI_AND_LIANG = "Li and Liang 2021, Prefix-Tuning, table of hyper-parameters"
_STARRED = "Behind the paper's starred rows; warm-up, decay and the width of beams (5) are not in the table."


def _prior(method: str, settings: dict[str, Any], tasks: str, *notes: str) -> Family:
    return Family(
        model="gpt2-medium",
        method=method,
        origin="prior",
        source=_LI_AND_LIANG,
        settings={"data.max_length": 512, "optimizer.schedule": "linear", **settings},
        tasks=tasks,
        notes=(_STARRED, *notes),
    )


_SIZE = (
    "The size of the bottleneck is inferred from the number of parameters that the paper prints."
)

_GPT2_PRIOR = (
    _prior(
        "prefix_layer",
        {"method": "prefix_layer"},
        """
                                   | e2e_nlg | webnlg | dart
        prefix_layer.prefix_length | 5       | 5      | 10
        optimizer.learning_rate    | 8e-5    | 5e-5   | 5e-5
        epochs                     | 5       | 5      | 10
        batch_size                 | 10      | 5      | 5
        """,
        "That work sets the keys and values of each block, through an MLP; PrefixLayer sets activations.",
    ),
    _prior(
        "lin-11m",
        {"method": "bottleneck", "bottleneck.kind": "lin", "bottleneck.size": 224},
        """
                                | e2e_nlg | webnlg | dart
        optimizer.learning_rate | 5e-5    | 5e-5   | 5e-5
        epochs                  | 5       | 5      | 5
        batch_size              | 5       | 5      | 5
        """,
        _SIZE,
    ),
    _prior(
        "lin-0.4m",
        {"method": "bottleneck", "bottleneck.kind": "lin", "bottleneck.size": 6},
        """
                                | e2e_nlg | webnlg | dart
        optimizer.learning_rate | 8e-5    | 5e-5   | 8e-5
        epochs                  | 10      | 10     | 5
        batch_size              | 5       | 5      | 5
        """,
        _SIZE,
    ),
    _prior(
        "full",
        {"method": "full"},
        """
                                | e2e_nlg | webnlg | dart
        optimizer.learning_rate | 5e-5    | 1e-5   | 1e-5
        epochs                  | 5       | 10     | 10
        batch_size              | 10      | 6      | 6
        """,
    ),
    _prior(
        "full-top2",
        {"method": "full", "full.top_layers": 2},
        """
                                | e2e_nlg | webnlg | dart
        optimizer.learning_rate | 5e-5    | 5e-5   | 5e-5
        epochs                  | 5       | 10     | 5
        batch_size              | 10      | 9      | 5
        """,
    ),
)

_UNPUBLISHED = "Adam's betas, the prompts and the number of GPUs are not published for GPT-3."
_ALPHA = "LoRA's alpha and dropout are not published for GPT-3; these are the defaults."


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
    """Settings of LoRA on some roles at one rank."""
    return {"method": "lora", "lora.rank": rank, "lora.targets": targets}


def _prefix(method: str, prefix: int, infix: int) -> dict[str, Any]:
    return {
        "method": method,
        f"{method}.prefix_length": prefix,
        f"{method}.infix_length": infix,
    }


def _houlsby(size: int) -> dict[str, Any]:
    return {"method": "bottleneck", "bottleneck.kind": "houlsby", "bottleneck.size": size}


_GPT3 = (
    _gpt3("full", {"method": "full"}, 5e-6),
    _gpt3("prefix_embedding", _prefix("prefix_embedding", 256, 8), 5e-4),
    _gpt3("prefix_layer", _prefix("prefix_layer", 8, 8), 1e-4),
    _gpt3("bitfit", {"method": "bitfit"}, 1.6e-3),
    _gpt3("houlsby-7.1m", _houlsby(1), 1e-4),
    _gpt3("houlsby-40.1m", _houlsby(8), 1e-4),
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
        _prefix("prefix_layer", 8, 8),
        "optimizer.learning_rate | 5e-5 | 5e-5 | 5e-5 | 1e-4",
    ),
    _low_data(
        "lora",
        _lora(8, "attention.qv"),
        "optimizer.learning_rate | 2e-4 | 2e-4 | 2e-4 | 2e-4",
        _ALPHA,
    ),
)

FAMILIES: tuple[Family, ...] = (
    *_ROBERTA,
    *_ADAPTERS,
    *_DEBERTA,
    *_GPT2,
    *_GPT2_PRIOR,
    *_GPT3,
    *_GPT3_LOW_DATA,
)
"""Every family, in the order of the paper."""
