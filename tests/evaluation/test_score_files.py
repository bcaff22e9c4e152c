"""Files of outputs and references: every layout, and errors in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from lorakit.errors import ConfigurationError, DataError
from lorakit.evaluation.score_files import GlueTask, score_files
from lorakit.metrics import GLUE, e2e, glue, rouge, wikisql

OUTPUTS = ["a cat sat here", "", "dogs run far away"]
REFERENCES = [["the cat sat here", "a cat"], ["a bird"], ["dogs run far", "a dog ran"]]
SCORES = rouge(OUTPUTS, REFERENCES)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows(path: Path, *values: dict) -> Path:
    return write(path, *map(json.dumps, values))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return write(tmp_path / "outputs.txt", *OUTPUTS)


def test_plain_text_with_groups_of_references(tmp_path: Path, outputs: Path) -> None:
    lines = ["the cat sat here", "a cat", "", "a bird", "", "dogs run far", "a dog ran"]
    without_last_blank = write(tmp_path / "references.txt", *lines)
    assert score_files(outputs, without_last_blank, "rouge") == SCORES
    assert score_files(outputs, write(tmp_path / "r.txt", *lines, "", ""), "rouge") == SCORES


def test_one_output_with_several_references(tmp_path: Path) -> None:
    output = write(tmp_path / "outputs.txt", OUTPUTS[0])
    references = write(tmp_path / "references.txt", *REFERENCES[0], "")
    assert score_files(output, references, "rouge") == rouge(OUTPUTS[:1], REFERENCES[:1])


@pytest.mark.parametrize("end", [[], [""]])
def test_plain_text_with_one_reference_for_each_output(
    tmp_path: Path, outputs: Path, end: list[str]
) -> None:
    first = [group[0] for group in REFERENCES]
    references = write(tmp_path / "references.txt", *first, *end)
    assert score_files(outputs, references, "rouge") == rouge(OUTPUTS, [[text] for text in first])


@pytest.mark.slow
def test_the_golden_files(shared: Path) -> None:
    folder = shared / "metrics" / "e2e_golden"
    scores = score_files(folder / "outputs.txt", folder / "references.txt", "e2e", java=False)
    golden = json.loads((folder / "scores.json").read_text())
    assert round(scores["BLEU"], 4) == golden["BLEU"]
    assert round(scores["NIST"], 4) == golden["NIST"]


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs.txt"
    outputs.write_bytes("\ufeffa\u2028cat\r\nb".encode())
    references = write(tmp_path / "references.txt", "a cat", "", "b")
    assert score_files(outputs, references, "rouge")["ROUGE_1"] == 1


def test_rows_with_outputs_and_references(tmp_path: Path) -> None:
    both = rows(
        tmp_path / "samples.jsonl",
        *({"output": o, "references": r} for o, r in zip(OUTPUTS, REFERENCES, strict=True)),
    )
    assert score_files(both, None, metrics="rouge") == SCORES
    assert score_files(both, both, "rouge") == SCORES


def test_rows_with_one_reference_in_any_format(tmp_path: Path) -> None:
    both = write(tmp_path / "samples.csv", "output,reference", "a cat,the cat", ",x")
    assert score_files(both, None, "rouge") == rouge(["a cat", ""], [["the cat"], ["x"]])


def test_java_is_passed_on(tmp_path: Path, outputs: Path) -> None:
    references = write(tmp_path / "references.txt", "a", "b", "c")
    expected = e2e(OUTPUTS, [["a"], ["b"], ["c"]], java=False)
    assert score_files(outputs, references, "e2e", java=False) == expected
    assert "TER" in score_files(outputs, references, "dart", java=False)


def test_labels_in_text_and_rows(tmp_path: Path) -> None:
    predicted = write(tmp_path / "predicted.txt", "1", "0", "1")
    labels = rows(tmp_path / "labels.jsonl", {"label": 1}, {"label": 0.0}, {"label": 0})
    for task in ("mrpc", "cola"):
        assert score_files(predicted, labels, task) == glue(task, [1, 0, 1], [1, 0, 0])
    assert score_files(predicted, labels, "classification")["accuracy"] == pytest.approx(2 / 3)
    assert score_files(predicted, predicted, "regression")["pearson"] == pytest.approx(1)
    scores = write(tmp_path / "scores.txt", "1.5", "2", "4.25")
    assert score_files(scores, scores, "stsb")["spearman"] == pytest.approx(1)


def test_wikisql(tmp_path: Path) -> None:
    row = {"table": {"header": ["A"]}, "sql": {"sel": 0, "agg": 0, "conds": []}}
    outputs = write(tmp_path / "outputs.txt", "SELECT A FROM table", "SELECT B FROM table")
    expected = wikisql(["SELECT A FROM table", ""], [row, row])
    assert score_files(outputs, rows(tmp_path / "w.jsonl", row, row), "wikisql") == expected
    with pytest.raises(DataError, match="is plain text, expected rows of WikiSQL"):
        score_files(outputs, outputs, "wikisql")


def test_an_output_of_wikisql_with_several_gold_queries_counts_for_each(tmp_path: Path) -> None:
    gold = {"table": {"header": ["A"]}, "sql": {"sel": 0, "agg": 0, "conds": []}}
    other = gold | {"sql": gold["sql"] | {"agg": 3}}
    records = rows(
        tmp_path / "out.jsonl",
        {"output": "SELECT A FROM table", **gold, "golds": [gold, other, gold]},
        {"output": "SELECT COUNT A FROM table", **other},
    )
    assert score_files(records, None, "wikisql") == {"logical_form": 3 / 4}
    with pytest.raises(DataError, match="Found 1 outputs and 2 references"):
        score_files(write(tmp_path / "outputs.txt", "SELECT A FROM table"), records, "wikisql")
    for golds, message in ([], "'golds' is .*expected a list"), ([1], "Example 1"):
        broken = rows(tmp_path / "broken.jsonl", {"output": "x", "golds": golds})
        with pytest.raises(DataError, match=message):
            score_files(broken, None, "wikisql")


def test_every_task_of_glue_can_be_named() -> None:
    assert set(get_args(GlueTask)) == set(GLUE)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "", "b"], "Found 3 outputs and 2 references"),
        (["a", "", "", "b"], "Output 2 has no reference"),
        ([], "Found 3 outputs and 0 references"),
    ],
)
def test_references_that_do_not_fit(tmp_path: Path, outputs: Path, lines, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_files(outputs, write(tmp_path / "references.txt", *lines), "rouge")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"outputs": "a", "references": ["a"]}', "samples.jsonl:1: 'output' is missing.*Did you mean 'outputs'"),
        ('{"output": 3, "references": ["a"]}', "'output' is 3, expected a text"),
        ('{"output": "a", "references": "a"}', "'references' is 'a', expected a list of texts"),
        ('{"output": "a", "references": [null]}', "'references' is None, expected a text"),
        ('{"output": "a", "references": []}', "Output 1 has no reference"),
        ('{"output": "a"}', "'references' is missing. The row has: output"),
        ("{", "samples.jsonl:1: not valid JSON"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_files(write(tmp_path / "samples.jsonl", line), None, "rouge")


def test_what_is_no_number(tmp_path: Path) -> None:
    labels = rows(tmp_path / "labels.jsonl", {"output": 1, "label": "yes"})
    with pytest.raises(DataError, match=r"labels.jsonl:1: found 'yes', expected a number"):
        score_files(labels, None, "cola")
    labels = write(tmp_path / "labels.txt", "1", "nan")
    with pytest.raises(DataError, match="Prediction 2 is nan"):
        score_files(labels, labels, "cola")


def test_files_that_cannot_be_read(tmp_path: Path, outputs: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.txt' does not exist\. Check the path"):
        score_files(tmp_path / "nothing.txt", outputs, "rouge")
    with pytest.raises(DataError, match=r"Is a directory|denied"):
        score_files(tmp_path, outputs, "rouge")
    (tmp_path / "latin.txt").write_bytes("a\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt:2: not UTF-8 \(byte 0xe9\)"):
        score_files(tmp_path / "latin.txt", outputs, "rouge")


def test_plain_outputs_need_a_file_of_references(outputs: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"plain text, which cannot contain references\. Name a separate file",
    ):
        score_files(outputs, None, "e2e")


def test_an_unknown_family(outputs: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="metrics is 'e2ee'; it must be one of e2e, webnlg"
    ):
        score_files(outputs, outputs, "e2ee")  # type: ignore[arg-type]
