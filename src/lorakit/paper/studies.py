"""The study of each table of the paper: its methods, their settings, and its data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.paper.published import PublishedTable, published
from lorakit.paper.recipe import LABELS_FROM_HEAD, MNLI_OF_GPT3, bottleneck, lora, prefix
from lorakit.paper.resampling import ACCURACY, E2E_BLEU, MATTHEWS
from lorakit.paper.study import Column, Study, StudyData, Variant


def _data(task: str, column: str, score: str = "accuracy", **options: Any) -> StudyData:
    """Return a data set with one column, in percent. `options` are further fields of `StudyData`."""
    sums = {"accuracy": ACCURACY, "matthews": MATTHEWS}.get(score)
    columns = (Column(name=column, score=score, scale=100, sums=sums),)
    return StudyData(**{"key": task, "task": task, "columns": columns, **options})


def _adapter_h(size: int, key: str = "", published: str = "") -> Variant:
    return Variant(
        key=key or f"adapter_h-{size}",
        method="AdapterH",
        settings=bottleneck("houlsby", size),
        setting=f"r={size}",
        published=published,
    )


def _lora_on(setting: str, key: str = "") -> Variant:
    """Return LoRA with a setting as in the paper: weight matrices (q, k, v, o) and a rank, such as ``q,v, r=4``."""
    weights, rank = setting.split(", r=")
    names = weights.split(",")
    targets = ("attention.qv",) if weights == "q,v" else [f"attention.{name}" for name in names]
    return Variant(
        key=key or f"{''.join(names)}-r{rank}",
        method="LoRA",
        settings=lora(int(rank), *targets),
        setting=setting,
    )


def _lora_rows(table: PublishedTable) -> tuple[Variant, ...]:
    """Return the published settings of LoRA."""
    return tuple(_lora_on(row.setting) for row in table.rows if row.method == "LoRA")


def _lora_of(rank: int, alpha: float = 16.0) -> Variant:
    """Return LoRA on q and v, in a table that compares ranks only."""
    settings = lora(rank, "attention.qv", alpha=alpha)
    return Variant(key=f"r{rank}", method="LoRA", settings=settings, setting=f"r={rank}")


_FT = Variant(key="full", method="FT", settings={"method": "full"})
_FT_TOP2 = Variant(
    key="full-top2", method="FT-Top2", settings={"method": "full", "full.top_layers": 2}
)
_BITFIT = Variant(key="bitfit", method="BitFit", settings={"method": "bitfit"})

_GLUE = (
    _data(
        "mnli",
        "MNLI",
        note="MNLI is scored on both development sets together, as published; on the matched set if the other is "
        "missing.",
    ),
    _data("sst2", "SST-2", commonest=50.9),
    _data("mrpc", "MRPC", commonest=68.4),
    _data("cola", "CoLA", "matthews"),
    _data("qnli", "QNLI", commonest=50.5),
    _data("qqp", "QQP"),
    _data("rte", "RTE", max_length=256, commonest=52.7),
    _data("stsb", "STS-B", "pearson"),
)

_TABLE2 = Study(
    table=published("table2"),
    base="minilm-l6",
    data_sets=_GLUE,
    average="Avg",
    variants=(
        _FT,
        _BITFIT,
        Variant(
            key="adapter_h",
            method="AdapterH",
            settings=bottleneck("houlsby", 8),
            published="0.8M",
        ),
        Variant(
            key="adapter_p",
            method="AdapterP",
            settings=bottleneck("pfeiffer", 16),
            published="0.8M",
        ),
        Variant(key="prefix_layer", method="PreLayer", settings=prefix("prefix_layer", 8, 0)),
        Variant(key="lora", method="LoRA", settings=lora(8, "attention.qv")),
    ),
    notes=("No run starts from an adapter or a head that was trained on another task.",),
)

_E2E_COLUMNS = (
    Column(name="BLEU", score="BLEU", scale=100, sums=E2E_BLEU),
    Column(name="NIST", score="NIST", digits=2),
    Column(name="METEOR", score="METEOR", scale=100),
    Column(name="ROUGE-L", score="ROUGE_L", scale=100),
    Column(name="CIDEr", score="CIDEr", digits=2),
)
_BASE_DROPOUT = "Runs keep the base's own dropout; the paper's code sets GPT-2's to 0."
_GENERATION_VARIANTS = (
    _FT,
    _FT_TOP2,
    Variant(key="adapter_l", method="AdapterL", settings=bottleneck("lin", 6)),
    Variant(key="adapter_h", method="AdapterH", settings=bottleneck("houlsby", 4)),
    _BITFIT,
    Variant(key="prefix_layer", method="PreLayer", settings=prefix("prefix_layer", 8, 6)),
    Variant(key="lora", method="LoRA", settings=lora(4, "attention.qv", alpha=32)),
)

_TABLE3 = Study(
    table=published("table3"),
    data_sets=(StudyData(key="e2e", task="e2e_nlg", columns=_E2E_COLUMNS, max_length=256),),
    variants=_GENERATION_VARIANTS,
    notes=(
        _BASE_DROPOUT,
        "AdapterH has about LoRA's size here; the paper's AdapterH, also in the published difference, has 11.09M "
        "parameters.",
    ),
)


def _category_columns(categories: Mapping[str, str]) -> tuple[Column, ...]:
    """Return BLEU in percent, and METEOR and TER as fractions, in each category of the test set."""
    return tuple(
        Column(name=f"{score}{column}", score=f"{score}{category}", digits=digits)
        for score, digits in (("BLEU", 1), ("METEOR", 2), ("TER", 2))
        for column, category in categories.items()
    )


_DART = _category_columns({"": ""})
_TABLE13 = Study(
    table=published("table13"),
    data_sets=(StudyData(key="dart", task="dart", columns=_DART, max_length=384),),
    variants=_GENERATION_VARIANTS,
    notes=(_BASE_DROPOUT,),
)
_WEBNLG = _category_columns({" U": " unseen", " S": " seen", " A": ""})
_TABLE14 = Study(
    table=published("table14"),
    data_sets=(StudyData(key="webnlg", task="webnlg", columns=_WEBNLG, max_length=384),),
    variants=_GENERATION_VARIANTS,
    notes=(_BASE_DROPOUT,),
)

_WIKISQL = _data("wikisql", "WikiSQL", "logical_form", max_length=384)


def _mnli_m(name: str = "MNLI-m", **options: Any) -> StudyData:
    return _data("mnli", name, scored=MNLI_OF_GPT3, commonest=35.4, **options)


_MNLI_M = _mnli_m()
_SAMSUM = StudyData(
    key="samsum",
    task="samsum",
    columns=tuple(
        Column(name=f"ROUGE-{n}", score=f"ROUGE_{n}", scale=100) for n in ("1", "2", "L")
    ),
    max_length=512,
)

_TABLE4 = Study(
    table=published("table4"),
    data_sets=(_WIKISQL, _MNLI_M, _SAMSUM),
    variants=(
        _FT,
        _BITFIT,
        Variant(
            key="prefix_embedding", method="PreEmbed", settings=prefix("prefix_embedding", 256, 8)
        ),
        Variant(key="prefix_layer", method="PreLayer", settings=prefix("prefix_layer", 8, 8)),
        _adapter_h(1, key="adapter_h", published="7.1M"),
        _adapter_h(8, published="40.1M"),
        _lora_on("q,v, r=1", key="lora"),
        _lora_on("q,v, r=8", key="lora-8"),
    ),
    notes=(LABELS_FROM_HEAD,),
)

_TABLE5 = Study(
    table=published("table5"),
    data_sets=(_WIKISQL, _MNLI_M),
    variants=_lora_rows(published("table5")),
    notes=(
        LABELS_FROM_HEAD,
        "The rows have equal parameter counts only if all four matrices are square; with fewer key and value heads "
        "than query heads, the counts differ.",
    ),
)

_TABLE6 = Study(
    table=published("table6"),
    data_sets=(_WIKISQL, _MNLI_M),
    variants=_lora_rows(published("table6")),
    notes=(LABELS_FROM_HEAD, "alpha stays 16 at every rank."),
)

_TABLE15 = Study(
    table=published("table15"),
    data_sets=(_WIKISQL, _MNLI_M),
    variants=(
        _FT,
        *(
            Variant(
                key=f"{method}-{length}-{infix}",
                method=name,
                settings=prefix(method, length, infix),
                setting=f"l_p={length}, l_i={infix}",
            )
            for method, name, lengths in (
                ("prefix_embedding", "PreEmbed", ((32, 8), (64, 8), (128, 8), (256, 8), (512, 8))),
                ("prefix_layer", "PreLayer", ((2, 2), (8, 0), (8, 8), (32, 4), (64, 0))),
            )
            for length, infix in lengths
        ),
        *(_adapter_h(size) for size in (1, 4, 8, 16, 64)),
        *_lora_rows(published("table15")),
        *(
            Variant(
                key=f"lora+{short}-{rank}",
                method=name,
                settings={
                    **prefix(method, 8, 4),
                    **lora(rank, "attention.qv"),
                    "method": f"lora+{method}",
                },
                setting=f"q,v, r={rank}, l_p=8, l_i=4",
            )
            for short, name, method, ranks in (
                ("pe", "LoRA+PE", "prefix_embedding", (8, 32, 64)),
                ("pl", "LoRA+PL", "prefix_layer", (8,)),
            )
            for rank in ranks
        ),
    ),
    notes=(LABELS_FROM_HEAD,),
)

_TABLE16 = Study(
    table=published("table16"),
    base="minilm-l6",
    data_sets=tuple(
        _mnli_m(f"MNLI-{name}", key=f"mnli-{name}", limit=limit)
        for name, limit in (("100", 100), ("1k", 1_000), ("10k", 10_000), ("392k", None))
    ),
    variants=(
        _FT,
        Variant(
            key="prefix_embedding", method="PreEmbed", settings=prefix("prefix_embedding", 16, 0)
        ),
        Variant(key="prefix_layer", method="PreLayer", settings=prefix("prefix_layer", 8, 0)),
        Variant(key="lora", method="LoRA", settings=lora(8, "attention.qv")),
    ),
    notes=(
        LABELS_FROM_HEAD,
        "PreEmbed has l_p=16 and l_i=0 at every size; the paper's has l_i=8 and l_p=16, 32, 64 and 256.",
        "Up to 10k, smaller sets are subsets of the larger ones. Learning rates and epochs are chosen on held-out "
        "examples from outside the set: as many as there are training examples, at least 200 and at most 1,000. Of "
        "all 392k, a tenth is held out, so 353k are trained on.",
    ),
)

_TABLE18_COLUMNS = (
    Column(name="loss", score="loss", digits=3),
    replace(_E2E_COLUMNS[0], digits=4),
    *(replace(column, scale=1.0, digits=4) for column in _E2E_COLUMNS[1:]),
)
_TABLE18 = Study(
    table=published("table18"),
    data_sets=(StudyData(key="e2e", task="e2e_nlg", columns=_TABLE18_COLUMNS, max_length=256),),
    variants=tuple(
        _lora_of(rank, alpha=32) for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    ),
    notes=(
        _BASE_DROPOUT,
        "alpha stays 32 at every rank, as tuned at r=4.",
        "The loss is computed on the test references; the paper's on the validation set.",
    ),
)

_NORMS = tuple(Column(name=name, score=name, digits=2) for name in published("table7").columns)
_TABLE7 = Study(
    table=published("table7"),
    base="minilm-l6",
    data_sets=(StudyData(key="mnli", task="mnli", columns=_NORMS),),
    variants=(_lora_of(4), _lora_of(64)),
    measures="amplification",
    notes=(
        "W_q of the middle block, as the paper's layer 48 of 96; the norm of ΔW_q includes alpha / r.",
    ),
)

STUDIES: dict[str, Study] = {
    study.table.name: study
    for study in (
        *(_TABLE2, _TABLE3, _TABLE4, _TABLE5, _TABLE6, _TABLE7),
        *(_TABLE13, _TABLE14, _TABLE15, _TABLE16, _TABLE18),
    )
}
"""The tables that consist of training runs, by name."""
