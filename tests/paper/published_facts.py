"""The rows of results.json, which was read from the paper, in the form of lorakit's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorakit.paper.published import PublishedRow

LABELS = ("model", "method", "setting", "parameters", "prior_work", "restricted")
Row = dict[str, Any]
"""The labels of a row, and the value and spread of each column."""


def own_row(row: PublishedRow) -> Row:
    """Return a row of lorakit in this form."""
    cells = {column: (cell.value, cell.spread) for column, cell in row.cells.items()}
    return {**{label: getattr(row, label) for label in LABELS}, **cells}


def rows_of_paper(name: str, table: dict[str, Any]) -> list[Row]:
    """Return the rows of a table, in the paper's order."""
    rows = _REFORMED[name](table) if name in _REFORMED else table["rows"]
    return [_row(name, row) for row in rows]


def _row(table: str, row: dict[str, Any]) -> Row:
    labels = {
        "model": row.pop("model", "gpt2-medium" if table in ("table1", "table18") else "gpt3-175b"),
        "method": row.pop("method", "LoRA"),
        "setting": row.pop("setting", ""),
        "parameters": row.pop("trainable_params", ""),
        "prior_work": row.pop("prior_work", False),
        "restricted": row.pop("restricted_setup", False),
    }
    return {**labels, **dict(_cells(row))}


def _cells(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[float, Any]]]:
    names = {"avg": "Avg", "val_loss": "loss", "ROUGE_L": "ROUGE-L"}
    for name, value in row.items():
        if not isinstance(value, dict):
            yield prefix + names.get(name, name), (value, None)
        elif "mean" in value:
            yield prefix + name, (value["mean"], value["std"])
        else:
            # Scores of WebNLG have a column for each category; "values" and "SAMSum" are not in a column's name.
            yield from _cells(value, f"{name} " if name in ("BLEU", "METEOR", "TER") else prefix)


def _latency(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    sizes = ", ".join(setting["adapter_params"] for setting in table["settings"])
    for row in table["rows"]:
        is_base = row["method"] == "FT or merged LoRA"
        yield {
            "method": "FT, LoRA" if is_base else row["method"],
            "setting": "merged" if is_base else sizes,
            **{
                f"batch {setting['batch_size']}, length {setting['seq_len']}": row[setting["id"]]
                for setting in table["settings"]
            },
        }


def _matrices(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in table["rows"]:
        setting = f"{','.join(row.pop('weights'))}, r={row.pop('r')}"
        yield {"setting": setting, "trainable_params": "18M", **row}


def _ranks(table: dict[str, Any]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in table["rows"]:
        for rank, score in row["by_r"].items():
            setting = f"{','.join(row['weights'])}, r={rank}"
            rows.setdefault(setting, {"setting": setting})[row["task"]] = score
    return list(rows.values())


def _amplification(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # The paper prints 21.5, and "around 2" at rank 64: lorakit's note gives the quotient.
    for rank, amplification in ((4, table["amplification_as_printed"]["r4"]), (64, 1.88)):
        norms = table[f"r{rank}"]
        yield {
            "setting": f"r={rank}",
            "from ΔW": norms["proj_norm"]["delta_W_q"],
            "from W": norms["proj_norm"]["W_q"],
            "random": norms["proj_norm"]["random"],
            "norm of ΔW": norms["delta_W_q_frobenius"],
            "amplification": amplification,
        }


def _budgets(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in table["rows"]:
        config = row.pop("config")
        ranks = {name[2:]: value for name, value in config.items() if name.startswith("r_")}
        parts = [",".join(ranks), *(f"r={rank}" for rank in dict.fromkeys(ranks.values()))]
        others = [f"{name}={value}" for name, value in config.items() if not name.startswith("r_")]
        yield {"setting": ", ".join(filter(None, [*parts, *others])), **row}


_REFORMED = {
    "table1": _latency,
    "table5": _matrices,
    "table6": _ranks,
    "table7": _amplification,
    "table8": lambda table: [
        {**row, "method": row["method"].removeprefix("GPT-3 ")} for row in table["rows"]
    ],
    "table15": _budgets,
    "table16": lambda table: [
        {"method": row["method"], **{f"MNLI-{n}": score for n, score in row["values"].items()}}
        for row in table["rows"]
    ],
    "table18": lambda table: [{"setting": f"r={row.pop('r')}", **row} for row in table["rows"]],
}
