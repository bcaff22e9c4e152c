"""A custom task in one file: its examples, its data and its score.

    lorakit train --base.name smollm2-135m --output out/spelling \\
        --data.task examples/own_task.py:Spelling --data.root DATA
    lorakit evaluate --adapter out/spelling/adapter \\
        --data.task examples/own_task.py:Spelling --data.root DATA

DATA/spelling/ contains train.jsonl and test.jsonl. Run directly, the script creates such a folder and does both.
"""

from __future__ import annotations

import json
from pathlib import Path

from lorakit.tasks import DataSet, NamedText, text_field


# --8<-- [start:task]
class Spelling(NamedText):
    """Write a number in words."""

    name = "spelling"
    layouts = (("digits", "words"),)  # the columns of a row
    data_set = DataSet(folder="spelling", validation=())
    template = "Write the number {context} in words:"
    encodings = ("prompt", "paper")  # the first is the default
    metric = "exact"
    scores = quick_scores = ("exact",)
    decoding = {"max_new_tokens": 24}  # noqa: RUF012

    def context(self, fields):
        return text_field(fields, "digits")

    def answers(self, fields):
        return [text_field(fields, "words")]

    @classmethod
    def score(cls, outputs, examples, **settings):
        right = [
            output in [cls.answer(example.completion) for example in group]
            for output, group in zip(outputs, examples, strict=True)
        ]
        return {"exact": sum(right) / len(right)}


# --8<-- [end:task]


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_data(folder: Path) -> None:
    """Write all two-digit numbers as rows; every seventh is a test row."""
    (folder / "spelling").mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"digits": f"{i}{j}", "words": f"{WORDS[i]} {WORDS[j]}"})
        for i in range(10)
        for j in range(10)
    ]
    test = rows[3::7]
    for split, chosen in (("test", test), ("train", [row for row in rows if row not in test])):
        (folder / "spelling" / f"{split}.jsonl").write_text("\n".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    from tiny_base import arguments, load_base

    from lorakit import (
        BaseConfig,
        DataConfig,
        EvaluateConfig,
        OptimizerConfig,
        TrainConfig,
        evaluate,
        train,
    )

    options = arguments()
    out = Path(options.out)
    write_data(out / "data")
    data = DataConfig(task=f"{__file__}:Spelling", root=str(out / "data"))
    base, settings = options.model, {}
    if base is None:  # a tiny, randomly initialised model
        model, tokenizer = load_base(None)
        base = str(out / "base")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        settings = {
            "method": "full",
            "epochs": 40,
            "optimizer": OptimizerConfig(learning_rate=3e-3),
        }

    run = str(out / "run")
    train(
        TrainConfig(base=BaseConfig(name=base), data=data, output=run, overwrite=True, **settings)
    )
    scored = evaluate(
        EvaluateConfig(base=BaseConfig(name=base), adapter=f"{run}/adapter", data=data)
    )
    print(scored.scores)  # loss, perplexity, and the task's score: exact
    for record in scored.outputs[:3]:
        print(f"{record['prompt']} {record['output']!r}, expected {record['references'][0]!r}")
