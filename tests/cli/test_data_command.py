"""What `lorakit data` prints about the format of the rows and the loss mask."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import tiny_tokenizer

from lorakit.cli import main

ROWS = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b [c]"}]
    },
    "text": {"text": "a b"},
}
MASK = {
    "sharegpt": "[[b· ·[·c·]·<|im_end|>]]",
    "text": "a·[[ b·<|im_end|>]]",
}
FIRST = {
    "sharegpt": "task chat: ShareGPT's conversations of from and value",
    "text": "task text: plain text, every token after the first is a target",
}


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """Return what `lorakit data` prints for these rows."""

    def shown(*rows):
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = str(tmp_path / "rows.jsonl")
        assert main(["data", "--base.name", str(tmp_path), "--data.train", data]) == 0
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize("layout", ROWS)
def test_the_format_and_the_loss_mask_without_a_terminal(shown, layout):
    out = shown(ROWS[layout])
    assert out.splitlines()[0] == FIRST[layout]
    assert MASK[layout] in out
    assert "Tokens between [[ and ]] contribute to the loss" in out


def test_control_characters_of_the_data_are_escaped(shown):
    label = "x\nlorakit: all is well\u202e"
    out = shown({"text": "a\tb \x1b[2J\r\nd", "label": label}, {"text": "b", "label": "y"})
    assert not [c for c in out if c not in "\n\t" and not c.isprintable()]
    assert r"labels x\nlorakit: all is well\u202e, y" in out
    assert "\\u001b·[·" in out
    assert "\n  label x\\nlorakit: all is well\\u202e: 1\n" in out


def test_colours_replace_the_brackets_unless_no_color_is_set(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = shown(ROWS["text"])
    assert "[[" not in out
    assert "Green tokens contribute" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[" in shown(ROWS["text"])
