from __future__ import annotations

import json
import re

import datasets
import pytest
from tiny_tokenizer import (
    CHAT_TEMPLATE,
    THINKING_TEMPLATE,
    tiny_encoder_tokenizer,
    tiny_tokenizer,
)

from lorakit.data import DataConfig, DataTask, load_examples, task_of
from lorakit.data.examples import RowReader
from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError, DataError

TOKENIZER = tiny_tokenizer()
TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant")]
OWN = """
from lorakit.tasks import NamedText, Regression

class Hints(NamedText):
    name, layouts, encodings, template = "hints", (("q", "a"),), ("prompt",), "{context}:"

    def context(self, fields):
        return fields["q"] + " " + fields.get("hint", "none").strip()

    def answers(self, fields):
        return [fields["a"]]

class Stars(Regression):
    name, layouts = "stars", (("review", "label"),)

    def rows(self, fields):
        yield {"text": fields["review"], "label": fields["label"], "score": fields["label"] / 5}
"""
PAIRS = [{"prompt": f"The river {n}", "completion": f" pub {n}"} for n in range(20)]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write


def load(train, split="train", *, tokenizer=TOKENIZER, labels=None, **settings):
    return load_examples(DataConfig(train=train, **settings), split, tokenizer, labels=labels)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"messages": TURNS}, "chat"),
        ({"conversations": [{"from": f, "value": "x"} for f in ("human", "gpt")]}, "chat"),
        ({"instruction": "a", "input": "", "output": "b"}, "completion"),
        ({"text": "a"}, "text"),
        ({"text": "a", "label": 1}, "classification"),
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, "classification"),
        ({"text": "a", "label": 1.5}, "regression"),
        ({"sentence1": "a", "sentence2": "b", "score": 3}, "regression"),
    ],
)
def test_the_task_follows_from_the_columns(write, row, task):
    other = {**row, "label": 0} if row.get("label") == 1 else row
    other = {**row, "label": "no"} if row.get("label") == "yes" else other
    examples = load(write([row, other]))
    assert examples.task == task
    assert len(examples) == examples.report.read == examples.report.kept == 2


@pytest.mark.parametrize("other", ["N/A", "1,5", "nan", True])
def test_decimal_labels_among_others_need_a_task(write, other):
    labels = [0.5, "1.25", 2, other]
    train = write([{"text": "a", "grade": label} for label in labels])
    columns = {"label": "grade"}
    with pytest.raises(DataError, match=f"'grade' has decimal numbers and {other!r}. Set data.tas"):
        load(train, columns=columns)
    with pytest.raises(DataError, match=r"train\.jsonl:4: 'grade' is .* expected a (finite )?num"):
        load(train, columns=columns, task="regression")
    assert load(train, columns=columns, task="regression", bad_rows="skip").report.kept == 3


def test_columns_that_fit_no_task_list_those_found_and_those_known(write):
    with pytest.raises(DataError) as caught:
        load(write([{"question": "a", "answer": "b"}]))
    message = str(caught.value)
    assert "its columns are question, answer" in message
    assert "prompt + completion" in message
    assert "sentence1 + sentence2 + label" in message
    advice = message.splitlines()[-1]
    assert (
        "for completion with --data.columns.prompt COLUMN --data.columns.completion COL" in advice
    )
    assert (
        "for classification with --data.columns.text COLUMN --data.columns.label COLUMN" in advice
    )
    assert "for text" not in advice  # which needs all columns but one to go
    assert "Or build prompt" in advice


def test_the_columns_to_name_are_those_of_the_task_that_are_missing(write):
    with pytest.raises(DataError) as caught:
        load(write([{"text": "a", "stars": "b"}]), task="classification")
    advice = str(caught.value).splitlines()[-1]
    assert "--data.columns.label COLUMN, in YAML with data.columns: {label: COLUMN}" in advice
    assert "template" not in advice
    pair = {"sentence1": "a", "sentence2": "b", "gold": "c"}
    with pytest.raises(DataError) as caught:
        load(write([pair]), task="classification")
    assert "Name their columns with --data.columns.label COLUMN, in" in str(caught.value)


MESSAGES = [{"role": role, "content": "x"} for role in ("user", "assistant")]


@pytest.mark.parametrize(
    ("row", "settings", "advice"),
    [
        # Two fields of different layouts.
        (
            {"input": "q", "output": "a"},
            {"columns": {"instruction": "input", "completion": "output"}},
            "Name their columns with --data.columns.prompt COLUMN, in YAML with data.columns: {prompt:",
        ),
        # A layout of another task is nearest.
        (
            {"text": "a", "target": "b"},
            {},
            "Name their columns, for classification with --data.columns.label COLUMN; for regression",
        ),
        (
            {"conversation": MESSAGES},
            {},
            "Name their columns, for chat with --data.columns.messages COLUMN; for text with",
        ),
        # Another task reads the columns.
        (
            {"id": 1, "messages": MESSAGES},
            {"task": "completion"},
            "They fit task chat: set data.task (--data.task chat), or use data of task completion.",
        ),
        ({"review": "a"}, {"task": "classification"}, "The rows have too few columns."),
    ],
)
def test_the_advice_names_what_makes_the_rows_fit(write, row, settings, advice):
    with pytest.raises(DataError) as caught:
        load(write([row]), **settings)
    assert str(caught.value).splitlines()[-1].startswith(advice)


def test_a_column_mapped_to_a_field_is_no_other_field(write):
    path = write([{"input": "q", "output": " a"}])
    (example,) = load(path, columns={"instruction": "input"})
    assert "### Input:" not in example.prompt
    (example,) = load(path, columns={"instruction": "input", "input": "input"})
    assert "### Input:" in example.prompt


def test_rows_without_columns_are_an_error_and_a_sign_in_a_name_of_json_is_no_separator(write):
    for row in ({}, {"question | answer": "a"}):
        with pytest.raises(DataError, match="expected those of any task"):
            load(write([row]))


@pytest.mark.parametrize(("suffix", "sign"), [("csv", ";"), ("csv", "\t"), ("tsv", ",")])
def test_fields_with_another_separator_are_named(tmp_path, suffix, sign):
    file = tmp_path / f"rows.{suffix}"
    file.write_text(f"prompt{sign}completion\na{sign}b\n")
    with pytest.raises(DataError, match=re.escape(f"separated by {sign!r}, but lorakit splits")):
        load(str(file))
    with pytest.raises(DataError, match=r"lorakit splits \.csv files at commas"):
        load(str(file), columns={"prompt": "question"})


def test_columns_that_fit_two_tasks_ask_for_one(write):
    path = write([{**PAIRS[0], "text": "a", "label": "x"}, {**PAIRS[1], "text": "a", "label": "y"}])
    with pytest.raises(
        DataError, match=r"fit several tasks; set data\.task to one of completion, class"
    ):
        load(path)
    assert load(path, task="classification").task == "classification"


def test_a_text_beside_a_pair_of_texts_needs_a_choice(write):
    texts = {"text": "T", "sentence1": "a", "sentence2": "b"}
    path = write([{**texts, "label": 0}, {**texts, "label": 1}])
    for task in ("auto", "classification"):
        with pytest.raises(DataError, match=r"reads one of them\. Name it: --data\.columns\.text"):
            load(path, task=task)
    assert load(path, columns={"text": "text"})[0].prompt == "T"
    pair = {"sentence1": "sentence2", "sentence2": "sentence1"}
    assert load(path, columns=pair)[0].prompt == "b\na"


@pytest.mark.parametrize("missing", ["sentence1", "sentence2"])
def test_a_missing_text_of_a_pair_is_named(write, missing):
    row = {"sentence1": "a", "sentence2": "b", "label": 0}
    with pytest.raises(DataError, match=f"train.jsonl:2: '{missing}' is missing"):
        load(write([row, {**row, "label": 1, missing: None}]))
    row = {"text": "T", "sentence1": "a", "label": 0}  # not a pair
    with pytest.raises(DataError, match=r"train.jsonl:2: 'text' is missing"):
        load(write([row, {**row, "label": 1, "text": None}]))


def test_an_explicit_task_must_find_its_columns(write):
    with pytest.raises(DataError, match=r"expected those of task chat:\n  chat: +messages"):
        load(write([{"text": "a"}]), task="chat")


def test_columns_and_templates_make_prompts_and_completions(write):
    path = write([{"q": "why?", "a": "so", "prompt": "not this"}])
    examples = load(
        path,
        columns={"prompt": "q"},
        prompt_template="Q: {prompt} ({q})\nA:",
        completion_template=" {a}",
    )
    assert examples[0].prompt == "Q: why? (why?)\nA:"
    assert examples[0].completion == " so"
    assert examples.task == "completion"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"prompt": "promt"}},
            "no column 'promt', which data.columns maps to 'prompt'. Its "
            "columns are prompt, completion. Did you mean 'prompt'",
        ),
        ({"prompt_template": "{promt}"}, "no column 'promt', which prompt_template uses"),
    ],
)
def test_a_missing_column_is_named(write, settings, message):
    with pytest.raises(DataError, match=message):
        load(write(PAIRS), **settings)


BAD = [
    PAIRS[0],
    {"prompt": "a"},
    b'{"prompt": "caf\xe9"}',
    {"prompt": "a", "completion": " "},
    b"{",
    {"prompt": 3, "completion": "b"},
    PAIRS[1],
]


def test_bad_rows_stop_with_file_line_and_count(write):
    path = write(BAD)
    with pytest.raises(DataError) as caught:
        load(path, columns={"prompt": "prompt"})
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{path}: 5 of 7 rows are invalid"
    assert [line.split(": ")[0].strip() for line in lines[1:6]] == [
        f"{path}:{n}" for n in range(2, 7)
    ]
    assert "'completion' is missing" in lines[1]
    assert "not UTF-8 (byte 0xe9" in lines[2]
    assert lines[6] == "Fix these rows, or set data.bad_rows to skip (--data.bad_rows skip)."
    assert "iconv -f latin1 -t utf-8 OLD > NEW" in lines[7]


def test_bad_rows_can_be_skipped_and_are_counted(write):
    path = write(BAD)
    examples = load(path, bad_rows="skip")
    report = examples.report
    assert [example.origin for example in examples] == [f"{path}:1", f"{path}:7"]
    assert (report.read, report.kept, report.skipped, len(report.bad)) == (7, 2, 5, 5)
    assert str(report).startswith(
        f"{path}: 2 of 7 rows; 5 bad, skipped\n  {path}:2: 'completion' is "
    )
    assert report.to_dict()["bad"][0] == {
        "origin": f"{path}:2",
        "message": "'completion' is missing",
    }


def test_a_renamed_column_is_reported_by_its_own_name(write):
    path = write([{"q": "a", "a": "b"}, {"q": "a", "a": ""}])
    with pytest.raises(DataError, match=r":2: 'a' is empty"):
        load(path, columns={"prompt": "q", "completion": "a"})


def test_no_usable_row_is_an_error_even_when_skipping(write):
    with pytest.raises(DataError, match=r"none of its 1 rows is valid\n  .*:1: 'completion' is"):
        load(write([{"prompt": "a", "completion": ""}]), bad_rows="skip")


LONG = {"prompt": "The river " * 30, "completion": " pub"}


def test_long_rows_stop_are_skipped_or_are_truncated(write):
    path = write([PAIRS[0], LONG])
    with pytest.raises(DataError) as caught:
        load(path, max_length=64)
    assert "1 of 2 rows are longer than max_length 64, the longest with" in str(caught.value)
    assert f"\n  {path}:2: " in str(caught.value)

    skipped = load(path, max_length=64, too_long="skip")
    assert (len(skipped), skipped.report.skipped, skipped.report.too_long[0].origin) == (
        1,
        1,
        f"{path}:2",
    )
    assert "1 too long, skipped (up to" in str(skipped.report)

    truncated = load(path, max_length=64, too_long="truncate")
    assert truncated.lengths[1] == 64
    assert (truncated.report.kept, truncated.report.truncated) == (2, 1)
    assert "1 truncated" in str(truncated.report)


def test_labels_are_those_of_the_training_set(write):
    train = write([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    validation = write([{"text": "c", "label": "y"}], "validation.jsonl")
    examples = load(train, "validation", validation=validation)
    assert examples.labels == ("x", "y")
    assert examples[0].label == 1
    relabelled = load(
        train, "validation", validation=validation, task="classification", labels=["y", "z"]
    )
    assert relabelled[0].label == 0


def test_task_and_labels_are_known_without_a_tokenizer(write):
    rows = [{"text": "a", "label": "y"}, {"text": "b", "label": "x"}, {"text": "c"}, b"{"]
    config = DataConfig(train=write(rows))
    assert task_of(config) == DataTask(name="classification", labels=("x", "y"))
    assert task_of(DataConfig(train=write(PAIRS))) == DataTask(name="completion")


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_an_evaluation_label_unknown_in_training_always_stops(write, bad_rows):
    train = write([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    validation = write([{"text": "c", "label": 1}, {"text": "d", "label": -1}], "validation.jsonl")
    with pytest.raises(
        DataError, match=r"validation\.jsonl:2: 'label' is '-1', which the training"
    ):
        load(train, "validation", validation=validation, bad_rows=bad_rows)


def test_an_evaluation_set_is_of_the_task_of_the_training_set(write):
    train = write([{"text": "a", "label": 0.5}, {"text": "b", "label": 1}])
    whole = write([{"text": "c", "label": 1}, {"text": "d", "label": 0}], "validation.jsonl")
    assert load(train, "validation", validation=whole).task == "regression"
    other = write(PAIRS, "test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl: its columns are .* expected .* regression"):
        load(train, "test", test=other)


def test_class_names_of_a_hub_data_set_set_the_order(monkeypatch):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["yes", "no", "maybe"])
    )
    content = {"text": ["a", "b"], "label": [0, 1]}
    dataset = datasets.Dataset.from_dict(content, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    examples = load("owner/name")
    assert examples.labels == ("yes", "no", "maybe")
    assert [example.label for example in examples] == [0, 1]
    one_class = dataset.select([0])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: one_class)
    assert task_of(DataConfig(test="owner/name"), "test").labels == examples.labels
    with pytest.raises(DataError, match="needs at least two"):
        task_of(DataConfig(train="owner/name"))


def test_no_such_split(write):
    with pytest.raises(DataError, match=r"has no validation data; set data\.validation"):
        load(write(PAIRS), "validation")


def test_limit_reads_the_first_rows(write):
    examples = load(write(PAIRS), limit=3)
    assert [example.completion for example in examples] == [" pub 0", " pub 1", " pub 2"]


def test_a_held_out_fraction_divides_the_distinct_inputs(write):
    rows = [{**pair, "completion": f" answer {n}"} for pair in PAIRS for n in range(3)]
    path = write(rows)
    train = load(path, validation_fraction=0.2)
    validation = load(path, "validation", validation_fraction=0.2)
    inside, outside = ({example.prompt for example in side} for side in (validation, train))
    assert len(inside) == 4
    assert len(outside) == 16
    assert not inside & outside
    assert (len(train), len(validation)) == (48, 12)
    assert (train.report.held_out, validation.report.held_out) == (12, 48)
    shuffled = load(write(rows[::-1]), "validation", validation_fraction=0.2)
    assert {example.prompt for example in shuffled} == inside  # independent of the order of rows


def test_the_same_conversations_are_held_out_on_another_day(write):
    """A chat template may write the date (Llama 3.2); another base has another template."""

    def conversation(n):
        call = {"name": "look", "arguments": {}}
        call = {"type": "function", "function": call} if n % 2 else {"id": str(n), **call}
        return [
            {"role": "user", "content": f"river {n // 2}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "park"},
            {"role": "assistant", "content": f"pub {n}"},
        ]

    path = write([{"messages": conversation(n)} for n in range(40)])
    prompts, origins = [], []
    for day in ("28 July", "29 July"):
        template = f"{{{{ 'Today is {day}. ' }}}}{CHAT_TEMPLATE}{{# tool_calls #}}"
        held_out = load(
            path,
            "validation",
            tokenizer=tiny_tokenizer(chat_template=template),
            validation_fraction=0.2,
        )
        prompts.append(held_out[0].prompt)
        origins.append([example.origin for example in held_out])
    assert prompts[0] != prompts[1]
    assert origins[0] == origins[1]
    assert (
        len(origins[0]) == 8
    )  # 4 inputs, each twice: the id and form of a call make no other input


def test_the_chat_template_gets_its_values(write):
    tokenizer = tiny_tokenizer(chat_template=THINKING_TEMPLATE)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    examples = load(write([{"messages": TURNS}]), tokenizer=tokenizer, **off)
    assert examples[0].prompt.endswith("assistant\n<think></think>")
    assert tokenizer.chat_template == THINKING_TEMPLATE  # the caller's tokenizer is not changed
    with pytest.raises(ConfigurationError, match="task completion uses no chat template"):
        load(write(PAIRS), **off)


def test_sets_can_be_indexed_and_sliced(write):
    examples = load(write(PAIRS))
    assert list(examples) == examples.examples == examples[:]
    assert examples.lengths == [len(example.input_ids) for example in examples]


def test_encoder_pairs_from_csv(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('premise,hypothesis,label\n"a, b",c,entailment\nd,e,neutral\n')
    examples = load(
        str(path),
        tokenizer=tiny_encoder_tokenizer(),
        columns={"sentence1": "premise", "sentence2": "hypothesis"},
    )
    assert examples.labels == ("entailment", "neutral")
    assert examples[0].prompt == "a, b\nc"
    assert examples[1].origin == f"{path}:3"


INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}
ALPACAS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
    "### Response:\n",
    "3",
)


def test_alpacas_rows_have_alpacas_prompt(write):
    examples = load(write([INSTRUCTION, {"instruction": "Say hi.", "input": "", "output": "hi"}]))
    assert (examples[0].prompt, examples[0].completion) == ALPACAS
    assert "### Input" not in examples[1].prompt
    assert examples[1].completion == "hi"
    assert examples.format.startswith("Alpaca's instruction, input and output")


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_lone_prompt_or_completion_beside_alpacas_columns_is_read_if_it_is_named(write, column):
    """Some files of Alpaca's rows have the whole text, with the answer, in a column `prompt`."""
    path = write([{**INSTRUCTION, column: "Add. 1 2 3"}])
    examples = load(path)
    assert (examples[0].prompt, examples[0].completion) == ALPACAS
    assert examples.report.unread == [column]
    assert examples.format.startswith("Alpaca's instruction, input and output")
    named = load(path, columns={column: column})
    assert getattr(named[0], column) == "Add. 1 2 3"
    assert named.report.unread == []
    assert named.format == f"Alpaca's rows with the {column} of data.columns or a template"
    assert load(path, prompt_template=f"{{{column}}}")[0].prompt == "Add. 1 2 3"


def test_alpacas_rows_are_chat_if_the_task_is(write):
    examples = load(write([INSTRUCTION]), task="chat")
    assert "user\nAdd.\n\n1 2<|im_end|>" in examples[0].prompt
    assert examples[0].completion == "3"


def test_the_columns_beside_a_conversation_are_read(write):
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    examples = load(write([{"conversations": turns, "system": "Be brief."}]))
    assert "system\nBe brief.<|im_end|>" in examples[0].prompt
    row = {**INSTRUCTION, "history": [["a", "b"]], "system": "Be brief."}
    prompt = load(write([row]), task="chat")[0].prompt
    assert "system\nBe brief.<|im_end|>" in prompt
    assert "assistant\nb<|im_end|>" in prompt


@pytest.mark.parametrize("column", [{"system": "Be brief."}, {"history": [["a", "b"]]}])
def test_alpacas_prompt_drops_no_column(write, column):
    path = write([{**INSTRUCTION, **column}])
    with pytest.raises(DataError, match=f"'{next(iter(column))}' is set, .* data.task to chat"):
        load(path)
    assert load(path, prompt_template="{instruction}")[0].prompt == "Add."


def test_columns_that_are_not_read_are_said(write) -> None:
    """A `system` beside a prompt is read by the chat task alone."""
    train = write([{"system": "Be brief.", "prompt": "a", "completion": "b", "id": 1}])
    report = load(train).report
    assert str(report).endswith("1 of 1 rows; columns that are not read: system, id")
    assert load(train, task="chat").report.unread == ["id"]
    assert load(train, prompt_template="{system} {prompt}").report.unread == ["id"]


@pytest.mark.parametrize(
    ("task", "missing", "row"),
    [
        ("regression", "score", {"text": "a", "label": 1, "score": 0.5}),
        ("completion", "prompt", {**INSTRUCTION, "prompt": "a", "completion": "b"}),
        ("chat", "messages", {**INSTRUCTION, "messages": TURNS}),
    ],
)
def test_all_rows_are_read_from_the_same_columns(write, task, missing, row):
    """Also a row without a value in one of them, which has another layout of the task."""
    unread = [name for name in row if name in (*INSTRUCTION, "label")]
    assert load(write([row]), task=task).report.unread == unread
    with pytest.raises(DataError, match=f":2: '{missing}' is missing") as error:
        load(write([row, {**row, missing: None}]), task=task)
    assert f"from the same columns, and these are not read: {', '.join(unread)}." in str(
        error.value
    )


def test_rows_of_an_own_task_have_the_columns_with_a_value(write, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    hints = [{"q": "a", "a": "b", "hint": "park"}, {"q": "a", "a": "b", "hint": None}]
    examples = load(write([*hints, {"q": "a", "a": "b"}]), task=f"{tmp_path}/own.py:Hints")
    assert [example.prompt for example in examples] == ["a park:", "a none:", "a none:"]
    stars = load(write([{"review": "a", "label": 4}]), task=f"{tmp_path}/own.py:Stars")
    assert stars[0].label == 0.8


def test_a_target_that_is_named_comes_before_a_score(write):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 3.5, "score": 0.7, "stars": 4}]
    path = write(rows)
    assert load(path, task="regression")[0].label == 0.7
    named = load(path, task="regression", columns={"label": "stars"})
    assert named[0].label == 4
    assert named.report.unread == ["label", "score"]
    assert load(path, task="stsb")[0].label == 3.5  # whose layout has no score


def test_a_template_is_rendered_once_for_each_row(write, monkeypatch):
    rendered = []
    render = Template.render
    monkeypatch.setattr(Template, "render", lambda *of: rendered.append(of) or render(*of))
    templates = {"prompt_template": "Q: {prompt}", "completion_template": "A: {completion}"}
    assert len(load(write(PAIRS), **templates)) == len(PAIRS)
    assert len(rendered) == 2 * len(PAIRS)


def test_a_template_replaces_alpacas_prompt(write):
    path = write([INSTRUCTION])
    examples = load(path, prompt_template="{instruction} {input} =", completion_template="{output}")
    assert (examples[0].prompt, examples[0].completion) == ("Add. 1 2 =", "3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": ""}, r":1: 'output' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, r":1: 'input' is a number"),
        ({"conversations": [{"from": "human", "value": "x"}]}, ":1: 'conversations' has no assist"),
    ],
)
def test_an_invalid_row_is_named_by_its_own_column(write, row, message):
    with pytest.raises(DataError, match=message):
        load(write([row]))


def test_the_format_of_the_rows_is_said(write):
    def chat(key, role, content):
        return [{key: who, content: [{"type": "text", "text": "x"}]} for who in role]

    path = write([{"conversations": chat("from", ("human", "gpt"), "value")}])
    assert load(path).format == (
        "ShareGPT's conversations of from and value, contents as lists of parts"
    )
    path = write([{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}])
    assert load(path).format == "messages of role and content"
    assert load(write(PAIRS)).format == "prompt and completion"
    assert (
        load(write([{"text": "a"}])).format == "plain text, every token after the first is a target"
    )


def test_a_text_beside_other_columns_is_not_language_modelling_by_itself(write):
    path = write([{"text": "a", "sentiment": "good"}])
    with pytest.raises(
        DataError, match=r"text: +text, if it is the only column or data\.task is text"
    ):
        load(path)
    assert load(path, task="text").task == "text"


def test_validation_rows_that_are_training_rows_are_counted(write, tmp_path):
    rows = [{"prompt": "a", "completion": str(n), "id": n} for n in range(20)]
    train, validation = write(rows), tmp_path / "validation.jsonl"

    def held_out(rows):
        validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader, config = RowReader(), DataConfig(train=str(train), validation=str(validation))
        load_examples(config, "train", TOKENIZER, reader=reader)
        return load_examples(config, "validation", TOKENIZER, reader=reader).report

    again = [{"completion": "3", "prompt": "a", "id": 99}] * 2  # the fields count, not the columns
    others = [{"prompt": "a", "completion": f"new {n}"} for n in range(18)]
    assert "; 2 are training examples, so scores partly measure" in str(held_out(again + others))
    few = held_out(again[:1] + others)
    assert (few.in_train, "training examples" in str(few)) == (1, False)


def test_a_training_row_with_another_number_is_a_training_row(write, tmp_path):
    """GLUE numbers its rows; the number is no part of the example."""
    rows = [{"sentence1": f"a {n}", "sentence2": "b", "label": n % 2, "idx": n} for n in range(10)]
    train = write(rows)
    validation = tmp_path / "validation.jsonl"
    again = [{**row, "idx": 100 + row["idx"]} for row in rows]
    validation.write_text("".join(json.dumps(row) + "\n" for row in again))
    config = DataConfig(task="mrpc", train=str(train), validation=str(validation))
    reader = RowReader()
    load_examples(config, "train", TOKENIZER, reader=reader)
    assert load_examples(config, "validation", TOKENIZER, reader=reader).report.in_train == 10


def test_plain_texts_can_be_held_out(write):
    path = write([{"text": f"river {n}"} for n in range(20)])
    assert len(load(path, validation_fraction=0.25)) == 15
