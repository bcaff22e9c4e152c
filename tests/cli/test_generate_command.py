"""`lorakit generate` on conversations: the prompt has the token ids that training had before the answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import tiny_runs
from tiny_tokenizer import tiny_tokenizer

from lorakit.cli import main
from lorakit.data import DataConfig, load_examples
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


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The token ids that `lorakit generate` passes on. Nothing is generated."""
    seen: list[list[int]] = []

    def spy(model, tokenizer, ids, *_: Any, **__: Any) -> list[str]:
        seen.extend(ids)
        return ["" for _ in ids]

    monkeypatch.setattr("lorakit.evaluation.generate.generate", spy)
    return seen


def trained_prompts(folder: Path) -> list[list[int]]:
    """Return the token ids before each answer of the training data."""
    config = DataConfig(train=str(folder / "train.jsonl"))
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    return [example.prompt_ids for example in load_examples(config, "train", tokenizer)]


def generate(folder: Path, *arguments: str) -> None:
    base = ["--base.name", str(folder / "base"), "--base.dtype", "float32", "--base.device", "cpu"]
    assert main(["generate", *base, *arguments]) == 0


def test_the_prompts_of_a_file_end_before_the_last_answer(trained, prompts, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    generate(trained, "--file", str(trained / "train.jsonl"), "--output", str(output))
    assert prompts == trained_prompts(trained)
    written = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert written == [row["messages"][:-1] for row in ROWS]


def test_a_conversation_that_ends_with_the_user_is_kept_whole(trained, prompts, tmp_path) -> None:
    rows = [{"messages": [USER, ANSWER, AGAIN]}, ROWS[2]]
    generate(trained, "--file", tiny_runs.write_rows(tmp_path / "open.jsonl", rows))
    assert prompts[0] == prompts[1]


def test_a_row_with_an_answer_alone_is_named(trained, tmp_path, capsys) -> None:
    file = tiny_runs.write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"messages": [ANSWER]}])
    assert main(["generate", "--base.name", str(trained / "base"), "--file", file]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:2: 'messages' has no message before the assistant's turn" in error
