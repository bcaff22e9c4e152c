"""Tasks that generate text: E2E, WebNLG, DART, WikiSQL and SAMSum, as rows, tokens and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import EOS, tiny_tokenizer

from lorakit import metrics
from lorakit.data import DataConfig, ExampleSet, load_examples, preview
from lorakit.errors import ConfigurationError, DataError
from lorakit.metrics import data_to_text
from lorakit.tasks import TASKS, Example, LanguageExample

E2E = {
    "meaning_representation": "name[The Vaults], eatType[pub], priceRange[more than £30]",
    "human_reference": "The Vaults is a pub above £30.",
}
WEBNLG = {
    "category": "Airport",
    "modified_triple_sets": {
        "mtriple_set": [["Aarhus_Airport | cityServed | Aarhus", "A | B | C"]]
    },
    "lex": {
        "comment": ["good", "toFix", "good"],
        "lid": ["1", "2", "3"],
        "text": ["X.", "Y", "Z."],
    },
}
DART = {
    "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "Located In", "N. C."]],
    "subtree_was_extended": False,
    "annotations": {"source": ["WikiSQL", "WikiSQL"], "text": ["It joined in 1973.", "In 1973."]},
}
WIKISQL = {
    "phase": 1,
    "question": "How many guards  are over 30?",
    "table": {"id": "1-1", "header": ["Player", "No.", "Position"]},
    "sql": {"sel": 0, "agg": 3, "conds": [[2, 0, "Guard"], [1, 1, "30"]]},
}
QUERY = "SELECT COUNT Player FROM table WHERE Position = Guard AND No. > 30"
SAMSUM = {"id": "1", "dialogue": "Ann: Hi\r\nBob: Hello", "summary": "They greet."}

ROWS = {"e2e_nlg": E2E, "webnlg": WEBNLG, "dart": DART, "wikisql": WIKISQL, "samsum": SAMSUM}


def examples(folder: Path, task: str, *rows: dict[str, Any], **settings: Any) -> ExampleSet:
    data = folder / task
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(task=task, root=str(folder), max_length=2048, **settings)
    return load_examples(config, "train", tiny_tokenizer())


def text_of(example: Example) -> tuple[str, str]:
    """Decode the prompt and the targets of an example, end tokens included."""
    assert isinstance(example, LanguageExample)
    ids, mask = example.input_ids, example.loss_mask
    cut = mask.index(True)
    assert not any(mask[:cut])
    assert all(mask[cut:])
    assert example.prompt_length == cut
    return tiny_tokenizer().decode(ids[:cut]), tiny_tokenizer().decode(ids[cut:])


PAPER = {
    "e2e_nlg": [
        (
            f"name : The Vaults | eatType : pub | priceRange : more than £30{EOS}",
            f" The Vaults is a pub above £30.{EOS}",
        )
    ],
    "webnlg": [
        (f"Aarhus_Airport : cityServed : Aarhus | A : B : C{EOS}", f" {text}{EOS}")
        for text in ("X.", "Z.")
    ],
    "dart": [
        (f"Mars Hill : joined : 1973 | Mars Hill : located in : N. C.{EOS}", f" {text}{EOS}")
        for text in ("It joined in 1973.", "In 1973.")
    ],
    "wikisql": [
        (
            "Columns: Player | No. | Position\nQuestion: How many guards are over 30?\n\n",
            f"{QUERY}{EOS}",
        )
    ],
    "samsum": [("Ann: Hi\nBob: Hello\n\n", f"They greet.{EOS}")],
}


@pytest.mark.parametrize("task", PAPER)
def test_the_papers_encoding(task: str, tmp_path: Path) -> None:
    loaded = examples(tmp_path, task, ROWS[task])
    assert [text_of(e) for e in loaded] == PAPER[task]
    same = examples(tmp_path, task, ROWS[task], encoding="paper")
    assert [e.input_ids for e in same] == [e.input_ids for e in loaded]


@pytest.mark.parametrize("task", PAPER)
def test_the_encoding_in_words(task: str, tmp_path: Path) -> None:
    loaded = examples(tmp_path, task, ROWS[task], encoding="prompt")
    for example, (context, completion) in zip(loaded, PAPER[task], strict=True):
        prompt, target = text_of(example)
        assert context.removesuffix(EOS).strip() in prompt
        assert prompt[-1] == ":"
        assert target == " " + completion.strip()  # a space after the colon


def test_a_custom_template(tmp_path: Path) -> None:
    loaded = examples(
        tmp_path,
        "e2e_nlg",
        E2E,
        encoding="prompt",
        prompt_template="{context} ({meaning_representation})=>",
        completion_template="{human_reference}",
    )
    prompt, target = text_of(loaded[0])
    assert prompt.startswith("name : The Vaults | ")
    assert prompt.endswith(f"({E2E['meaning_representation']})=>")
    assert target == f"{E2E['human_reference']}{EOS}"
    with pytest.raises(ConfigurationError, match=r"encoding is paper.*data\.encoding to prompt"):
        examples(tmp_path, "e2e_nlg", E2E, prompt_template="{context}")
    with pytest.raises(ConfigurationError, match=r"'papr'; it must be one of paper, prompt"):
        DataConfig(task="dart", encoding="papr")


@pytest.mark.parametrize(("end", "space"), [("=>", " "), ("\n", ""), (" ", "")])
def test_the_space_before_a_text_depends_on_the_custom_template(end, space, tmp_path: Path) -> None:
    settings = {"encoding": "prompt", "prompt_template": "{context}" + end}
    prompt, target = text_of(examples(tmp_path, "e2e_nlg", E2E, **settings)[0])
    assert prompt.endswith(f"£30{end}")
    assert target == f"{space}{E2E['human_reference']}{EOS}"


def test_a_tokenizer_that_begins_with_bos_keeps_it(tmp_path: Path) -> None:
    examples(tmp_path, "e2e_nlg", E2E)
    tokenizer = tiny_tokenizer(adds_bos=True)
    config = DataConfig(task="e2e_nlg", root=str(tmp_path))
    (example,) = load_examples(config, "train", tokenizer)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[example.prompt_length - 1] == tokenizer.eos_token_id


def test_columns_of_other_names(tmp_path: Path) -> None:
    row = {"mr": E2E["meaning_representation"], "ref": E2E["human_reference"]}
    columns = {"meaning_representation": "mr", "human_reference": "ref"}
    loaded = examples(tmp_path, "e2e_nlg", row, columns=columns)
    assert text_of(loaded[0]) == PAPER["e2e_nlg"][0]


def test_rows_without_an_example_are_counted(tmp_path: Path) -> None:
    bad = {**WEBNLG, "lex": {"comment": ["toFix"], "lid": ["1"], "text": ["Y"]}}
    loaded = examples(tmp_path, "webnlg", WEBNLG, bad)
    assert (loaded.report.rows, loaded.report.read, loaded.report.kept) == (2, 2, 2)
    assert loaded.report.without == 1
    loaded = examples(tmp_path, "samsum", SAMSUM, {**SAMSUM, "dialogue": ""}, SAMSUM)
    assert str(loaded.report).endswith("2 of 2 examples in 3 rows; 1 row holds none")
    data = DataConfig(task="samsum", root=str(tmp_path))
    shown = preview(data, tiny_tokenizer())
    assert (shown.task, shown.splits["train"].repeated_examples) == ("samsum", 1)


def test_the_hubs_layout_and_the_files_give_the_same(tmp_path: Path) -> None:
    listed = [{"source": "x", "text": text} for text in DART["annotations"]["text"]]
    (tmp_path / "a").mkdir()
    official = examples(tmp_path / "a", "dart", {**DART, "annotations": listed})
    assert [text_of(e) for e in official] == PAPER["dart"]
    conditions = {"column_index": [2, 1], "operator_index": [0, 1], "condition": ["Guard", "30"]}
    table = {
        **WIKISQL["table"],
        "types": ["text", "real", "text"],
        "rows": [["Ann", "31", "Guard"], ["Bob", "1,040.5", "Guard"], ["Cy", "29", "Guard"]],
    }
    row = {**WIKISQL, "table": table, "sql": {**WIKISQL["sql"], "conds": conditions}}
    (loaded,) = examples(tmp_path, "wikisql", row)
    assert text_of(loaded) == PAPER["wikisql"][0]
    task = TASKS["wikisql"]
    assert task.score([QUERY], [[loaded]]) == {"logical_form": 1, "execution": 1}
    other = "SELECT COUNT Player FROM table WHERE No. > 29.5"  # also selects two rows
    assert task.score([other], [[loaded]]) == {"logical_form": 0, "execution": 1}
    worse = "SELECT COUNT Player FROM table WHERE No. > 31"
    assert task.score([worse], [[loaded]]) == {"logical_form": 0, "execution": 0}


def with_table(tmp_path: Path, conditions=(), **table: Any) -> LanguageExample:
    row = {
        **WIKISQL,
        "table": {**WIKISQL["table"], "types": ["text", "real", "text"], **table},
        "sql": {**WIKISQL["sql"], "conds": list(conditions)},
    }
    (loaded,) = examples(tmp_path, "wikisql", row)
    return loaded


def test_an_empty_table_of_wikisql_has_rows_too(tmp_path: Path) -> None:
    groups = [[with_table(tmp_path, rows=rows)] for rows in ([], [["Ann", "31", "Guard"]])]
    TASKS["wikisql"].check_scoring(groups)
    right = "SELECT COUNT Player FROM table"
    assert TASKS["wikisql"].score([right] * 2, groups) == {"logical_form": 1, "execution": 1}
    untyped = with_table(tmp_path, conditions=[[2, 0, "Guard"]], rows=[], types=None)
    TASKS["wikisql"].check_scoring([[untyped]])


def test_queries_of_wikisql_are_executed_before_generation_and_not_in_training(tmp_path) -> None:
    group = [with_table(tmp_path, conditions=[[1, 0, "unknown"]], rows=[["Ann", "31", "Guard"]])]
    with pytest.raises(DataError, match="its correct query cannot be executed"):
        TASKS["wikisql"].check_scoring([group])
    quick = TASKS["wikisql"].score(["SELECT COUNT Player FROM table"], [group], quick=True)
    assert quick.keys() == set(TASKS["wikisql"].quick_scores)


def test_cells_of_wikisql_that_are_no_finite_numbers_stay_text(tmp_path: Path) -> None:
    rows = [["Ann", cell, "Guard"] for cell in ("Nan", "-inf", "1,040.5")]
    stored = with_table(tmp_path, rows=rows).gold["table"]["rows"]
    assert [row[1] for row in stored] == ["Nan", "-inf", 1040.5]


BAD = [
    ("e2e_nlg", {"meaning_representation": "The Vaults"}, r"expected slot\[value\]"),
    ("e2e_nlg", {"meaning_representation": "name[a], b"}, r"expected slot\[value\]"),
    ("e2e_nlg", {"human_reference": " "}, "'human_reference' is empty"),
    ("webnlg", {"modified_triple_sets": ["a | b | c"]}, "'modified_triple_sets' is a list, exp"),
    ("webnlg", {"modified_triple_sets": {"mtriple_set": [["a | b"]]}}, r"'subject \| rel"),
    ("webnlg", {"lex": {"text": ["x"], "comment": []}}, "of equal length"),
    ("dart", {"tripleset": [["a", "b"]]}, r"has \['a', 'b'\], expected \[subject, relation"),
    ("dart", {"tripleset": []}, "has no triple"),
    ("dart", {"annotations": "text"}, "needs a list of texts under 'text'"),
    ("dart", {"annotations": [{"source": "x"}]}, "has None, expected text"),
    ("wikisql", {"table": {}}, "column names in a list 'header'"),
    (
        "wikisql",
        {"sql": {"sel": 7, "agg": 0, "conds": []}},
        "sel is 7, expected an index from 0 to 2",
    ),
    (
        "wikisql",
        {"sql": {"sel": 0, "agg": 0, "conds": {"condition": [1]}}},
        "lists of equal length",
    ),
    ("samsum", {"dialogue": 5}, r"'dialogue' is a number \(5\), expected text"),
    ("samsum", {"summary": ""}, "'summary' is empty"),
]


@pytest.mark.parametrize(("task", "change", "message"), BAD)
def test_rows_that_do_not_fit_are_named(task, change, message, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"(?s)1 of .* rows are invalid.*train\.jsonl:2: .*{message}"
    ):
        examples(tmp_path, task, ROWS[task], {**ROWS[task], **change})
    kept = examples(tmp_path, task, ROWS[task], {**ROWS[task], **change}, bad_rows="skip")
    assert len(kept.report.bad) == 1
    assert [text_of(e) for e in kept] == PAPER[task]


def group(*texts: str, **gold: Any) -> list[LanguageExample]:
    return [
        LanguageExample(
            input_ids=[1, 2],
            loss_mask=[False, True],
            prompt_length=1,
            prompt="",
            completion=text,
            gold=gold,
        )
        for text in texts
    ]


OUTPUTS = ["The Eagle is a cheap pub by the river.", "A river runs through the old park.", "Food."]
REFERENCES = [
    [" The Eagle is an inexpensive pub by the river.", " A cheap pub by the river is The Eagle."],
    [" The river runs through an old park."],
    [" Food is served."],
]


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes seconds to start. tests/metrics covers the scores with Java."""
    monkeypatch.setattr(data_to_text, "find_java", lambda _: None)


@pytest.mark.usefixtures("without_java")
def test_scores_are_the_metrics_of_the_family() -> None:
    groups = [group(*texts) for texts in REFERENCES]
    bare = [[text.strip() for text in texts] for texts in REFERENCES]
    assert TASKS["e2e_nlg"].score(OUTPUTS, groups) == metrics.e2e(OUTPUTS, bare)
    assert TASKS["dart"].score(OUTPUTS, groups) == metrics.webnlg(OUTPUTS, bare)
    assert TASKS["samsum"].score(OUTPUTS, groups) == metrics.rouge(OUTPUTS, bare)
    for name in ("e2e_nlg", "webnlg", "dart", "samsum"):
        quick = TASKS[name].score(OUTPUTS, groups, quick=True)
        assert set(quick) == set(TASKS[name].quick_scores)
    for name in ("webnlg", "samsum"):
        TASKS[name].check_scoring(groups)
    with pytest.raises(DataError, match="No reference has a word of a-z"):
        TASKS["samsum"].check_scoring([group("привет")])
    for name in ROWS:
        assert TASKS[name].metric in TASKS[name].scores


@pytest.mark.usefixtures("without_java")
def test_webnlg_is_scored_by_category_too() -> None:
    parts = ["seen", "unseen", "seen"]
    groups = [
        group(*texts, test_category=part) for texts, part in zip(REFERENCES, parts, strict=True)
    ]
    loaded = TASKS["webnlg"].score(OUTPUTS, groups)
    seen = metrics.webnlg([OUTPUTS[0], OUTPUTS[2]], [REFERENCES[0], REFERENCES[2]])
    unseen = metrics.webnlg([OUTPUTS[1]], [REFERENCES[1]])
    expected = metrics.webnlg(OUTPUTS, REFERENCES)
    for part, scores in (("seen", seen), ("unseen", unseen)):
        expected |= {
            f"BLEU {part}": scores["BLEU"],
            f"METEOR {part} (without Java)": scores["METEOR (without Java)"],
            f"TER {part}": scores["TER"],
        }
    assert loaded == pytest.approx(expected)
    one_part = [group(*texts, test_category="seen") for texts in REFERENCES]
    assert TASKS["webnlg"].score(OUTPUTS, one_part) == pytest.approx(
        metrics.webnlg(OUTPUTS, REFERENCES)
    )


def test_the_category_is_derived_where_the_row_does_not_say(tmp_path: Path) -> None:
    rows = [WEBNLG, {**WEBNLG, "category": "Athlete"}]
    rows += [{**WEBNLG, "category": "Athlete", "test_category": "seen"}]
    loaded = examples(tmp_path, "webnlg", *rows)
    assert [e.gold["test_category"] for e in loaded][::2] == ["seen", "unseen", "seen"]


def test_an_output_ends_at_a_blank_line() -> None:
    assert TASKS["e2e_nlg"].answer(" It is a pub.\n \nIt is") == "It is a pub."
    assert TASKS["dart"].answer("\n\nOne\ntwo\n\nthree") == "One\ntwo"
    assert TASKS["samsum"].answer(" One\n\ntwo ") == "One\n\ntwo"


def test_repeated_questions_count_separately() -> None:
    row = {"table": WIKISQL["table"], "sql": WIKISQL["sql"]}
    other = {**row, "sql": {**row["sql"], "agg": 0}}
    twice = [group("x", **row)[0], group("x", **other)[0]]
    scores = TASKS["wikisql"].score([QUERY, QUERY], [twice, group("x", **row)])
    assert scores == {"logical_form": pytest.approx(2 / 3)}


@pytest.mark.parametrize("task", ["e2e_nlg", "webnlg", "wikisql", "samsum"])
def test_real_sets(shared: Path, task: str) -> None:
    for split in ("train", "validation", "test"):
        config = DataConfig(task=task, root=str(shared / "data"), limit=100, max_length=8192)
        loaded = load_examples(config, split, tiny_tokenizer())
        assert loaded.report.rows == 100
        assert loaded.report.kept == loaded.report.read >= 100
        assert not loaded.report.bad


@pytest.mark.slow
def test_real_test_inputs_and_their_references(shared: Path) -> None:
    """E2E's test set has 630 inputs; 971 of WebNLG's 1,862 are seen."""
    config = DataConfig(task="e2e_nlg", root=str(shared / "data"), max_length=8192)
    loaded = load_examples(config, "test", tiny_tokenizer())
    assert len({e.prompt for e in loaded}) == 630
    rows = (shared / "data/webnlg/test.jsonl").read_text(encoding="utf-8").splitlines()
    task = TASKS["webnlg"](tiny_tokenizer(), max_length=8)
    golds = [task.gold({"category": json.loads(row)["category"]}) for row in rows]  # type: ignore[attr-defined]
    assert [g["test_category"] for g in golds] == [json.loads(r)["test_category"] for r in rows]
