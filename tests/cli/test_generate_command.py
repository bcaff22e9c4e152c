"""`lorakit generate` on conversations: the prompt has the token ids that training had before the answer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_tokenizer import THINKING_TEMPLATE, tiny_tokenizer

from lorakit.cli import main
from lorakit.compute.adapted import base_of
from lorakit.compute.adapter_file import AdapterFile, prompt_format
from lorakit.data import DataConfig, load_examples
from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError
from lorakit.evaluation.prompts import read_prompts
from lorakit.models.base_config import BaseConfig
from lorakit.tasks import Chat, Completion
from lorakit.training.config import HeldOutConfig
from lorakit.training.loop import train

USER = {"role": "user", "content": "Where is the river pub?"}
ANSWER = {"role": "assistant", "content": "Near the park."}
AGAIN = {"role": "user", "content": "Is it cheap?"}
LAST = {"role": "assistant", "content": "It is."}
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER]},
    {"messages": [USER, ANSWER, AGAIN, LAST]},
    {"messages": [USER, ANSWER], "tools": [{"name": "search"}]},
]
TEMPLATE = (
    "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_base(folder: Path, template: str | None = TEMPLATE) -> str:
    """Write the tiny model with a chat template."""
    base = tiny_runs.save_base(folder, max_position_embeddings=256)
    tiny_tokenizer(chat_template=template).save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations, its data and its base."""
    folder = tmp_path_factory.mktemp("chat")
    base = save_base(folder / "base")
    data = DataConfig(train=tiny_runs.write_rows(folder / "train.jsonl", ROWS))
    once = {"epochs": 1, "accumulation": 1, "evaluation": HeldOutConfig()}
    train(tiny_runs.config(folder, base, data=data, **once))
    return folder


@pytest.mark.slow
def test_an_adapter_is_asked_with_the_template_values_of_its_training(tmp_path, prompts) -> None:
    base = save_base(tmp_path / "base", THINKING_TEMPLATE)
    rows = tiny_runs.write_rows(tmp_path / "train.jsonl", ROWS[:2])
    data = DataConfig(train=rows, chat_template_kwargs={"enable_thinking": False})
    once = {"epochs": 1, "accumulation": 1, "evaluation": HeldOutConfig()}
    train(tiny_runs.config(tmp_path, base, data=data, **once))
    adapter = str(tmp_path / "run" / "adapter")
    generate(tmp_path, "--adapter", adapter, "--prompt", "river")
    expected = "<|im_start|>user\nriver<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert prompts == [tiny_tokenizer().encode(expected)]
    scored = ["--data.test", rows, "--scores", "loss"]  # without the values, the rows are invalid
    assert main(["evaluate", *options(base), "--adapter", adapter, *scored]) == 0


QUESTIONS = [{"question": "river", "answer": "pub"}, {"question": "park", "answer": "food"}]
TEMPLATED = {"prompt_template": "Q: {question} A:", "completion_template": " {answer}"}
MAPPED = {"columns": {"prompt": "question", "completion": "answer"}}


@pytest.fixture(scope="module")
def questions(trained: Path) -> Path:
    """Runs on columns of a user's own: by a template, and by other names; and their data."""
    write_csv(trained / "qa.csv", QUESTIONS)
    once = {"epochs": 1, "accumulation": 1, "evaluation": HeldOutConfig()}
    for name, settings in {"templated": TEMPLATED, "mapped": MAPPED}.items():
        data = DataConfig(train=str(trained / "qa.csv"), **settings)
        base, output = str(trained / "base"), str(trained / name)
        train(tiny_runs.config(trained, base, data=data, **{**once, "output": output}))
    return trained


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The token ids that `lorakit generate` passes on. Nothing is generated."""
    seen: list[list[int]] = []

    def spy(model, tokenizer, ids, *_: Any, **__: Any) -> list[str]:
        seen.extend(ids)
        return ["" for _ in ids]

    monkeypatch.setattr("lorakit.evaluation.generate.generate", spy)
    return seen


def trained_prompts(where: Path | str, task: str = "auto") -> list[list[int]]:
    """Return the token ids before each answer of a file, or of a folder's training data."""
    file = where / "train.jsonl" if isinstance(where, Path) else where
    config = DataConfig(train=str(file), task=task)
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    return [example.prompt_ids for example in load_examples(config, "train", tokenizer)]


def options(base: Path | str) -> list[str]:
    return ["--base.name", str(base), "--base.dtype", "float32", "--base.device", "cpu"]


def generate(folder: Path, *arguments: str) -> None:
    assert main(["generate", *options(folder / "base"), *arguments]) == 0


def user_turn(text: str) -> list[int]:
    """Return the token ids of a user message, up to the answer."""
    turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tiny_tokenizer().encode(turn)


def test_answered_prompts_of_a_file_are_counted(trained, tmp_path, capsys) -> None:
    (tmp_path / "lines.txt").write_text("river\npub\npark\n")
    short = ("--raw", "--decoding.max_new_tokens", "1")
    generate(trained, "--file", str(tmp_path / "lines.txt"), *short)
    assert capsys.readouterr().err.endswith("3 of 3 prompts answered\n")
    generate(trained, "--prompt", "river", *short)
    assert "answered" not in capsys.readouterr().err


def test_an_output_of_another_process_stays(trained, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(
        "lorakit.evaluation.generate.generate",
        lambda *_, **__: [str(output.write_text("first"))],
    )
    settings = ("--raw", "--prompt", "river", "--output", str(output))
    assert main(["generate", *options(trained / "base"), *settings]) == 1
    assert "in the meantime, so the result is in" in capsys.readouterr().err
    assert output.read_text() == "first"


def test_the_prompts_of_a_file_end_before_the_last_answer(trained, prompts, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    generate(trained, "--file", str(trained / "train.jsonl"), "--output", str(output))
    assert prompts == trained_prompts(trained)
    written = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert written == [row["messages"][:-1] for row in ROWS]


def test_messages_as_prompt_and_completion_are_read_as_in_training(
    trained, prompts, tmp_path
) -> None:
    rows = [{"prompt": [USER, ANSWER, AGAIN], "completion": [LAST]}, ROWS[2]]
    generate(trained, "--file", tiny_runs.write_rows(tmp_path / "rows.jsonl", rows))
    assert prompts[0] == prompts[1]


def test_a_conversation_that_ends_with_the_user_is_kept_whole(trained, prompts, tmp_path) -> None:
    rows = [{"messages": [USER, ANSWER, AGAIN]}, ROWS[2]]
    generate(trained, "--file", tiny_runs.write_rows(tmp_path / "open.jsonl", rows))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("adapter", [True, False])
def test_the_messages_of_a_row_come_before_its_prompt(adapter, trained, prompts, tmp_path) -> None:
    """ultrachat_200k and no_robots have both columns; the prompt is the first question."""
    row = {"prompt": "river", "prompt_id": "7", "messages": [SYSTEM, USER, ANSWER, AGAIN, ANSWER]}
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [row])
    options = ["--adapter", str(trained / "run" / "adapter")] if adapter else []
    generate(trained, "--file", file, *options)
    assert prompts == trained_prompts(file)
    # Another task is trained on the prompt.
    assert read_prompts(file, Completion) == ["river"]


def test_the_columns_beside_a_prompt_are_those_of_training(trained, prompts, tmp_path) -> None:
    file = tiny_runs.write_rows(
        tmp_path / "rows.jsonl", [{"system": "Be brief.", "prompt": "river", "completion": "pub"}]
    )
    generate(trained, "--file", file, "--adapter", str(trained / "run" / "adapter"))
    assert prompts == trained_prompts(file, "chat")


INSTRUCTIONS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]
TALKS: list[dict[str, Any]] = [
    *({**INSTRUCTIONS[0], "system": "Be brief.", "history": turns} for turns in ([], [["a", "b"]])),
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "Be brief.",
    },
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    return str(path)


def write_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


@pytest.mark.parametrize("task", ["completion", "chat"])
@pytest.mark.parametrize(
    ("write", "suffix"),
    [(tiny_runs.write_rows, "jsonl"), (write_json, "json"), (write_csv, "csv")],
)
def test_the_rows_of_alpaca_have_the_ids_of_training(
    trained, prompts, tmp_path, write, suffix, task
) -> None:
    file = write(tmp_path / f"rows.{suffix}", INSTRUCTIONS)
    generate(trained, "--file", file, *(["--chat"] if task == "chat" else []))
    assert prompts == trained_prompts(file, task)
    prompts.clear()
    open_rows = [{k: v for k, v in row.items() if k != "output"} for row in INSTRUCTIONS]
    file = write(tmp_path / f"open.{suffix}", open_rows)
    generate(trained, "--file", file, *(["--chat"] if task == "chat" else []))
    assert prompts == trained_prompts(write(tmp_path / f"rows.{suffix}", INSTRUCTIONS), task)


def test_a_lone_prompt_beside_alpacas_columns_is_read_if_it_is_named(tmp_path) -> None:
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [{**INSTRUCTIONS[0], "prompt": "1 2 3"}])
    (prompt,) = read_prompts(file, Completion)
    assert "### Instruction:\nAdd." in str(prompt)
    assert read_prompts(file, Completion, {"prompt": "prompt"}) == ["1 2 3"]
    assert read_prompts(file, Completion, template=Template("Q: {prompt}")) == ["Q: 1 2 3"]


@pytest.mark.parametrize("row", TALKS, ids=["system", "history", "sharegpt"])
def test_the_columns_beside_a_conversation_are_read(trained, prompts, tmp_path, row) -> None:
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [row])
    generate(trained, "--file", file, "--chat")
    assert prompts == trained_prompts(file, "chat")


@pytest.mark.parametrize(("run", "text"), [("templated", "Q: {} A:"), ("mapped", "{}")])
@pytest.mark.parametrize("task", [[], ["--data.task", "completion"]], ids=["", "named"])
def test_rows_are_read_by_the_columns_of_training(
    questions, prompts, tmp_path, run, text, task
) -> None:
    adapter = ["--adapter", str(questions / run / "adapter"), *task]
    generate(questions, *adapter, "--file", str(questions / "qa.csv"))
    expected = [tiny_tokenizer().encode(text.format(row["question"])) for row in QUESTIONS]
    assert prompts == expected
    prompts.clear()
    open_rows = [{"question": row["question"]} for row in QUESTIONS]
    generate(questions, *adapter, "--file", write_csv(tmp_path / "open.csv", open_rows))
    assert prompts == expected


def test_a_template_of_training_that_is_not_applied_is_named(
    questions, prompts, tmp_path, capsys
) -> None:
    adapter = ["--adapter", str(questions / "templated" / "adapter")]
    note = "was trained with the prompt_template 'Q: {question} A:', and prompts are used unchanged"
    (tmp_path / "lines.txt").write_text("river\n")
    for words in (["--prompt", "river"], ["--file", str(tmp_path / "lines.txt")]):
        generate(questions, *adapter, *words)
        assert note in capsys.readouterr().err
    generate(questions, *adapter, "--prompt", "river", "--raw")
    assert "prompt_template" not in capsys.readouterr().err
    assert prompts == [tiny_tokenizer().encode("river")] * 3
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [{"prompt": "river"}])
    generate(questions, *adapter, "--file", file, "--raw")
    assert prompts[3] == prompts[0]
    assert main(["generate", *options(questions / "base"), *adapter, "--file", file]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:1: 'question' is missing" in error
    assert "needs the columns of the adapter's prompt_template 'Q: {question} A:'" in error


def test_a_rendered_prompt_must_be_unicode(questions, tmp_path, capsys) -> None:
    (tmp_path / "qa.csv").write_bytes("question\ncaf\u00e9\n".encode("latin-1"))
    words = ["--adapter", str(questions / "templated" / "adapter"), "--file"]
    assert main(["generate", *options(questions / "base"), *words, str(tmp_path / "qa.csv")]) == 1
    assert "qa.csv:2: 'prompt' is not UTF-8" in capsys.readouterr().err


def test_a_row_without_a_column_of_training_names_it(questions, tmp_path, capsys) -> None:
    file = write_csv(tmp_path / "rows.csv", [{"text": "river"}])
    words = ["--adapter", str(questions / "mapped" / "adapter"), "--file", file]
    assert main(["generate", *options(questions / "base"), *words]) == 1
    assert "A row needs 'question' (a string), 'messages'" in capsys.readouterr().err


def test_a_line_that_is_no_row_is_named(trained, tmp_path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\nb\n')
    arguments = ["--file", str(tmp_path / "rows.jsonl")]
    assert main(["generate", *options(trained / "base"), *arguments]) == 1
    assert "rows.jsonl:2: not valid JSON" in capsys.readouterr().err


def test_a_row_with_an_answer_alone_is_named(trained, tmp_path, capsys) -> None:
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"messages": [ANSWER]}])
    assert main(["generate", "--base.name", str(trained / "base"), "--file", file]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:2: 'messages' has no message before the assistant's turn" in error


def test_prompts_of_a_chat_adapter_have_the_ids_of_its_training(trained, prompts, capsys) -> None:
    adapter = ["--adapter", str(trained / "run" / "adapter"), "--prompt", USER["content"]]
    generate(trained, *adapter)
    assert prompts == trained_prompts(trained)[:1]
    assert "was trained for chat: prompts are user messages in the chat template" in (
        capsys.readouterr().err
    )
    generate(trained, *adapter, "--system", SYSTEM["content"])
    assert prompts[1] == trained_prompts(trained)[1]
    generate(trained, *adapter, "--raw", "true")
    assert prompts[2] == tiny_tokenizer().encode(USER["content"])
    generate(trained, *adapter[2:], "--data.task", "chat")  # the base alone
    assert prompts[3] == prompts[0]


def test_lines_and_rows_of_a_chat_adapter_are_user_messages(trained, prompts, tmp_path) -> None:
    adapter = ["--adapter", str(trained / "run" / "adapter")]
    (tmp_path / "lines.txt").write_text(f"{USER['content']}\n{AGAIN['content']}\n")
    generate(trained, *adapter, "--file", str(tmp_path / "lines.txt"))
    rows = [{"prompt": USER["content"]}, {"messages": [AGAIN]}]
    generate(trained, *adapter, "--file", tiny_runs.write_rows(tmp_path / "rows.jsonl", rows))
    assert prompts[:2] == prompts[2:] == [user_turn(m["content"]) for m in (USER, AGAIN)]


def test_an_adapter_without_record_leaves_prompts_unchanged_and_says_so(
    trained, prompts, tmp_path, capsys
) -> None:
    adapter = shutil.copytree(trained / "run" / "adapter", tmp_path / "peft")
    (adapter / "lorakit.json").unlink()
    generate(trained, "--adapter", str(adapter), "--prompt", "river")
    assert prompts == [tiny_tokenizer().encode("river")]
    assert "does not record its task, and plain prompts are used unchanged. --chat" in (
        capsys.readouterr().err
    )


def test_the_base_that_a_folder_of_peft_records(trained, prompts, tmp_path) -> None:
    adapter = shutil.copytree(trained / "run" / "adapter", tmp_path / "peft")
    (adapter / "lorakit.json").unlink()
    file = adapter / "adapter_config.json"
    options = {**json.loads(file.read_text()), "revision": "main"}  # a local base has no revisions
    file.write_text(json.dumps(options | {"base_model_name_or_path": str(trained / "base")}))
    assert main(["generate", "--adapter", str(adapter), "--prompt", "river"]) == 0
    assert prompts == [tiny_tokenizer().encode("river")]
    file.write_text(json.dumps(options | {"base_model_name_or_path": "owner/name"}))
    stored = AdapterFile.read(adapter)
    assert base_of(None, stored) == BaseConfig(name="owner/name", revision="main")
    assert base_of(BaseConfig(revision="v2"), stored).revision == "v2"
    assert base_of(BaseConfig(name="mine"), stored) == BaseConfig(name="mine")


def test_a_base_with_a_chat_template_says_that_prompts_are_unchanged(
    trained, prompts, capsys
) -> None:
    generate(trained, "--prompt", "river")
    assert "prompts are used unchanged; --chat formats them" in capsys.readouterr().err
    generate(trained, "--prompt", "river", "--raw", "true")
    assert prompts == [tiny_tokenizer().encode("river")] * 2
    assert "note" not in capsys.readouterr().err


def test_a_custom_chat_task_is_formatted_as_chat(trained) -> None:
    adapter = AdapterFile.read(trained / "run" / "adapter")
    assert adapter is not None
    adapter.provenance["task"] = "support"
    prompting = prompt_format(adapter, None, None)
    assert prompting.task is Chat
    assert "was trained for support: prompts are user messages" in prompting.note


def test_the_task_of_a_shared_file_formats_the_prompts(trained, prompts, tmp_path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: t.jsonl, task: chat}\nlora: {rank: 4}\n")
    generate(trained, "--config", str(file), "--prompt", "river")
    assert prompts == [user_turn("river")]
    generate(trained, "--config", str(file), "--prompt", "river", "--raw")
    assert prompts[1] == tiny_tokenizer().encode("river")
    file.write_text("data: {train: t.jsonl, task: auto}\nlora: {rank: 4}\n")
    generate(trained, "--config", str(file), "--prompt", "river")
    assert prompts[2] == prompts[1]


@pytest.mark.parametrize("encoding", [None, "prompt"])
def test_a_custom_template_of_training_is_not_replaced(trained, encoding) -> None:
    adapter = AdapterFile.read(trained / "run" / "adapter")
    assert adapter is not None
    data = {"prompt_template": "SQL for {context}"}
    adapter.provenance.update(task="wikisql", encoding="prompt", config={"data": data})
    with pytest.raises(ConfigurationError, match=r"prompt_template 'SQL for \{context\}'.*--raw"):
        prompt_format(adapter, None, encoding)
    assert prompt_format(adapter, None, "paper").encoding == "paper"


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPPING = TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)


@pytest.mark.parametrize("template", [REFUSING + TEMPLATE, DROPPING], ids=["refuses", "drops"])
def test_without_a_system_role_the_system_text_starts_the_first_message(
    template, prompts, tmp_path, capsys
) -> None:
    save_base(tmp_path / "base", template)
    generate(tmp_path, "--prompt", "river", "--chat", "true", "--system", "Be brief.")
    assert prompts == [user_turn("Be brief.\n\nriver")]
    assert "no system role; the system text starts the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--raw", "true", "--chat", "true"], "chat and raw exclude each other"),
        (["--prompt", "x", "--system", "y"], "system is a turn of the chat template"),
        (
            ["--prompt", "x", "--output", "out.txt"],
            "output is .out.txt.; it must be a file name that ends in .jsonl",
        ),
        (["--file", "{train}", "--raw", "true"], "has 'messages', which need the chat template"),
        (
            ["--file", "{train}", "--system", "y"],
            r"train.jsonl:2: 'system' is set, and the messages",
        ),
    ],
)
def test_options_that_do_not_fit_the_prompts(arguments, message, trained, capsys) -> None:
    arguments = [word.format(train=trained / "train.jsonl") for word in arguments]
    assert main(["generate", *options(trained / "base"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_text_ends_where_an_answer_ended_in_training(tmp_path, capsys, monkeypatch) -> None:
    """The template's end of a turn is a token other than eos, as in Llama 3 and base models."""
    base = save_base(tmp_path / "base", TEMPLATE.replace("<|im_end|>", "<|bos|>"))
    seen = []

    def spy(model, tokenizer, ids, decoding, *, stop_ids, **_: Any) -> list[str]:
        seen.append(tokenizer.convert_ids_to_tokens(stop_ids))
        return [""]

    monkeypatch.setattr("lorakit.evaluation.generate.generate", spy)
    arguments = ["--prompt", "x", "--chat", "true"]
    assert main(["generate", *options(base), *arguments]) == 0
    assert seen == [["<|bos|>"]]


def test_an_encoder_gets_the_end_token_of_its_training(prompts, tmp_path) -> None:
    tiny_runs.save_base(tmp_path / "base", "t5")
    generate(tmp_path, "--prompt", "river")
    tokenizer = tiny_tokenizer()
    assert prompts == [[*tokenizer.encode("river"), tokenizer.eos_token_id]]
