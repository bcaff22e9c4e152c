"""`lorakit train`, `evaluate` and `generate` with text tasks."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import pytest
import tiny_runs

import lorakit
from lorakit.cli import main
from lorakit.data import DataConfig, load_examples
from lorakit.errors import ConfigurationError
from lorakit.evaluation import evaluate as evaluation
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.evaluation.prompts import read_prompts
from lorakit.metrics import data_to_text
from lorakit.models.base_config import BaseConfig
from lorakit.tasks import TASKS
from lorakit.training.config import HeldOutConfig, OptimizerConfig
from lorakit.training.loop import train

BY_HEART = {
    "method": "full",
    "epochs": 80,
    "accumulation": 1,
    "optimizer": OptimizerConfig(learning_rate=1e-2),
}
INPUTS = [
    f"name[{name}], food[{food}]" for name in ("Eagle", "Park") for food in ("river", "plane")
]
SQL = {
    "phase": 1,
    "question": "Which river?",
    "table": {"header": ["river", "park"]},
    "sql": {"sel": 0, "agg": 0, "conds": []},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on synthetic rows of E2E and WikiSQL, and their base."""
    folder = tmp_path_factory.mktemp("named-text")
    base = tiny_runs.save_base(folder / "base", max_position_embeddings=512)
    e2e = [
        {"meaning_representation": text, "human_reference": f"{word} food."}
        for text in INPUTS
        for word in ("English", "cheap")
    ]
    for task, rows in (("e2e_nlg", e2e), ("wikisql", [SQL] * 4)):
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            tiny_runs.write_rows(folder / "data" / task / f"{split}.jsonl", rows)
        train(
            tiny_runs.config(
                folder,
                base,
                data=DataConfig(task=task, root=str(folder / "data")),
                output=str(folder / task),
                # Few steps for E2E; enough steps for WikiSQL to memorise its only query.
                **({"epochs": 1} if task == "e2e_nlg" else BY_HEART),
                evaluation=HeldOutConfig(
                    samples=2, metric="logical_form" if task == "wikisql" else "bleu", every=100
                ),
            )
        )
    return folder


def config(folder: Path, task: str, **settings) -> EvaluateConfig:
    values = {
        "base": BaseConfig(name=str(folder / "base"), dtype="float32", device="cpu"),
        "adapter": str(folder / task / "adapter"),
        "data": DataConfig(task=task, root=str(folder / "data")),
        "scores": ("text",),
        **settings,
    }
    return EvaluateConfig(**values)


@pytest.mark.slow
def test_e2e_is_decoded_and_scored_as_the_paper_does(trained: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_to_text, "find_java", lambda _: None)
    calls = []
    real = evaluation.generate

    def spy(model, tokenizer, prompts, decoding, **settings):
        calls.append((prompts, decoding))
        return real(model, tokenizer, prompts, Decoding(max_new_tokens=8), **settings)

    monkeypatch.setattr(evaluation, "generate", spy)
    result = evaluate(config(trained, "e2e_nlg"))
    assert [name.split(" (")[0] for name in result.scores] == [
        *("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
    ]
    (prompts, decoding), of_base = calls
    assert of_base == (prompts, decoding)
    assert result.base_scores.keys() == result.scores.keys()
    assert decoding == Decoding(beams=10, length_penalty=0.9, no_repeat_ngram=4, max_new_tokens=64)
    assert len(prompts) == len(result.outputs) == 4
    assert [r["references"] for r in result.outputs] == [["English food.", "cheap food."]] * 4
    assert result.scores == data_to_text.e2e(
        [r["output"] for r in result.outputs], [r["references"] for r in result.outputs]
    )
    # Explicit settings override those of the task; the other settings of the task stay.
    evaluate(config(trained, "e2e_nlg", decoding=Decoding(beams=1, batch_size=2)))
    assert calls[-1][1] == dataclasses.replace(decoding, beams=1, batch_size=2)
    # Sampling disables the beam search of the task.
    evaluate(config(trained, "e2e_nlg", decoding=Decoding(temperature=1.0)))
    assert calls[-1][1] == Decoding(temperature=1.0, no_repeat_ngram=4, max_new_tokens=64)


@pytest.mark.slow
def test_wikisql_is_read_back_while_training_and_after(trained: Path, tmp_path: Path) -> None:
    scores = json.loads((trained / "wikisql" / "result.json").read_text())["scores"]
    assert scores["logical_form"] == 1  # the model has memorised the only query
    output = tmp_path / "out.jsonl"
    result = evaluate(config(trained, "wikisql", output=str(output)))
    assert result.scores == {"logical_form": 1}
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["output"] == "SELECT river FROM table"
    assert record["table"] == {"header": ["river", "park"]}
    assert len(record["golds"]) == 4


def test_the_references_of_one_row_have_one_gold(trained: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        evaluation, "generate", lambda model, tokenizer, ids, *_, **__: ["x"] * len(ids)
    )
    row = {
        "category": "City",
        "modified_triple_sets": {"mtriple_set": [["river | in | park"]]},
        "lex": {"text": ["A river.", "The river."], "comment": ["good", "good"]},
    }
    base = lorakit.load_base(trained / "base", dtype="float32")
    for task, rows, golds in (("webnlg", [row], 0), ("wikisql", [SQL] * 3, 3)):
        test = tiny_runs.write_rows(tmp_path / f"{task}.jsonl", rows)
        loaded = load_examples(DataConfig(task=task, test=test), "test", base.tokenizer).examples
        found = evaluation.generated(base, loaded, task=TASKS[task], quick=True)
        (record,) = found.outputs
        assert len(record["references"]) == max(golds, 2)
        assert len(record.get("golds", [])) == golds


@pytest.mark.slow
def test_what_evaluation_writes_is_what_score_reads(trained: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    counting = SQL | {"sql": {"sel": 0, "agg": 3, "conds": []}}
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [SQL, counting, SQL, SQL])
    data = DataConfig(task="wikisql", validation=file)
    scores = evaluate(config(trained, "wikisql", data=data, output=str(output))).scores
    assert main(["score", str(output), "--metrics", "wikisql", "--json", "true"]) in (0, None)
    assert json.loads(capsys.readouterr().out) == scores == {"logical_form": 3 / 4}


def test_missing_packages_show_before_generation(trained: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: pytest.fail("generated first"))
    with pytest.raises(ConfigurationError, match="Scoring needs the 'metrics' extra"):
        evaluate(config(trained, "e2e_nlg"))


def generated(folder: Path, capsys, *arguments: str) -> tuple[list[str], str]:
    """Run `lorakit generate`; return its output and its notes."""
    base = ["--base.name", str(folder / "base"), "--base.dtype", "float32", "--base.device", "cpu"]
    main(["generate", *base, "--decoding.max_new_tokens", "40", *arguments])
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


CONTEXT = "Columns: river | park\nQuestion: Which river?"
ROW = {"question": "Which river?", "table": {"header": ["river", "park"]}}


def test_generate_writes_prompts_as_the_adapters_training_did(trained, tmp_path, capsys) -> None:
    adapter = ["--adapter", str(trained / "wikisql" / "adapter")]
    answer = ["SELECT river FROM table"]
    texts, note = generated(trained, capsys, *adapter, "--prompt", CONTEXT)
    assert texts == answer
    assert "contexts of task wikisql, formatted with its encoding 'paper'" in note
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [ROW, {"prompt": CONTEXT}])
    assert generated(trained, capsys, *adapter, "--file", file)[0] == answer * 2
    # Unchanged, without the empty line of the encoding.
    plain = ["--data.task", "completion", "--prompt"]
    texts, note = generated(trained, capsys, *adapter, *plain, f"{CONTEXT}\n\n")
    assert (texts, "note" in note) == (answer, False)


def test_generate_decodes_as_the_task_does_where_nothing_is_set(trained, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "lorakit.evaluation.generate.generate",
        lambda model, tokenizer, ids, decoding, **_: [calls.append(decoding) or "x" for _ in ids],
    )
    adapter = ["--adapter", str(trained / "e2e_nlg" / "adapter"), "--prompt", "name : Alimentum"]
    generated(trained, capsys, *adapter, "--decoding.beams", "2")
    published = Decoding(beams=2, length_penalty=0.9, no_repeat_ngram=4, max_new_tokens=40)
    assert calls.pop() == published
    generated(trained, capsys, *adapter, "--data.task", "completion")
    assert calls.pop() == Decoding(max_new_tokens=40)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_may_hold_what_only_python_takes_for_ends_of_lines(
    name, trained, tmp_path, capsys
) -> None:
    prompts = ["river\u2028park", "a\x85b", "a\x0cb"]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    else:
        lines = prompts
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"
    generated(trained, capsys, "--file", str(tmp_path / name), "--output", str(output))
    rows = output.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(row)["prompt"] for row in rows] == prompts


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, monkeypatch) -> None:
    text = "\ufeffHello there\r\nSecond\r\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    assert read_prompts(str(tmp_path / "prompts.txt"), None) == ["Hello there", "Second"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffHello there\nSecond\n"))
    assert read_prompts("-", None) == ["Hello there", "Second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "rows.jsonl"], r"rows\.jsonl:1: 'question' is missing.*'prompt', its context"),
        (
            ["--prompt", "x", "--data.encoding", "word"],
            "data.encoding is 'word'; it must be one of paper",
        ),
        (["--prompt", "x", "--data.task", "wikisq"], "'wikisq'.*Did you mean 'wikisql'"),
        (
            ["--prompt", "x", "--data.task", "chat", "--data.encoding", "paper"],
            "no named task of texts",
        ),
        (
            ["--prompt", "x", "--data.task", "wikisql", "--chat", "true"],
            "chat and data.task exclude each other",
        ),
    ],
)
def test_generate_says_what_does_not_fit(
    arguments, message, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny_runs.write_rows(tmp_path / "rows.jsonl", [{"table": ROW["table"]}])
    adapter = ["--adapter", str(trained / "wikisql" / "adapter")]
    assert main(["generate", *adapter, *arguments]) == 1
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
