"""GPT-2 on E2E, WebNLG and DART: Table 11 of the paper, its code, and the source of its starred rows."""

from __future__ import annotations

from typing import Any

from lorakit.paper.recipe import Family, bottleneck, lora, tables_by_method

_BEAMS = {"beams": 10, "no_repeat_ngram": 4}
_BASE_DROPOUT = "The code sets the model's own dropout to 0; a run keeps the base's."
_AVERAGED = "The paper reports the mean over 3 seeds of the best epoch of each run."


def _gpt2_paper(model: str) -> Family:
    return Family(
        model=model,
        method="lora",
        origin="paper",
        source="Table 11",
        settings={
            **lora(4, "attention.qv", alpha=32),
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
            _AVERAGED,
            "The dropout in the table is assumed to be LoRA's, the only dropout in the code.",
            _BASE_DROPOUT,
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
            **lora(4, "attention.qv", alpha=32),
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
            _BASE_DROPOUT,
            "The length penalty is 0.8 in the code and 0.9 in the paper.",
        ),
    ),
)

_STARRED = "Source of the paper's starred rows; Li and Liang's table omits warm-up, decay and the beam width (5)."
_SIZE = "The bottleneck size is inferred from the number of parameters that the paper prints."

_PRIOR_TASKS = tables_by_method("""
method       | setting                    | e2e_nlg | webnlg | dart
prefix_layer | prefix_layer.prefix_length | 5       | 5      | 10
prefix_layer | optimizer.learning_rate    | 8e-5    | 5e-5   | 5e-5
prefix_layer | epochs                     | 5       | 5      | 10
prefix_layer | batch_size                 | 10      | 5      | 5
lin-11m      | optimizer.learning_rate    | 5e-5    | 5e-5   | 5e-5
lin-11m      | epochs                     | 5       | 5      | 5
lin-11m      | batch_size                 | 5       | 5      | 5
lin-0.4m     | optimizer.learning_rate    | 8e-5    | 5e-5   | 8e-5
lin-0.4m     | epochs                     | 10      | 10     | 5
lin-0.4m     | batch_size                 | 5       | 5      | 5
full         | optimizer.learning_rate    | 5e-5    | 1e-5   | 1e-5
full         | epochs                     | 5       | 10     | 10
full         | batch_size                 | 10      | 6      | 6
full-top2    | optimizer.learning_rate    | 5e-5    | 5e-5   | 5e-5
full-top2    | epochs                     | 5       | 10     | 5
full-top2    | batch_size                 | 10      | 9      | 5
""")


def _prior(method: str, settings: dict[str, Any], *notes: str) -> Family:
    return Family(
        model="gpt2-medium",
        method=method,
        origin="prior",
        source="Li and Liang 2021, Prefix-Tuning, table of hyper-parameters",
        settings={"data.max_length": 512, "optimizer.schedule": "linear", **settings},
        tasks=_PRIOR_TASKS[method],
        notes=(_STARRED, *notes),
    )


_GPT2_PRIOR = (
    _prior(
        "prefix_layer",
        {"method": "prefix_layer"},
        "Li and Liang train the keys and values of each block, through an MLP; PrefixLayer trains activations.",
    ),
    _prior("lin-11m", bottleneck("lin", 224), _SIZE),
    _prior("lin-0.4m", bottleneck("lin", 6), _SIZE),
    _prior("full", {"method": "full"}),
    _prior("full-top2", {"method": "full", "full.top_layers": 2}),
)

GPT2: tuple[Family, ...] = (*_GPT2, *_GPT2_PRIOR)
