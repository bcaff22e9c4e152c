"""`lorakit chat` through a pipe and on a terminal: the answers, its commands, Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest
import tiny_models
from random_adapters import randomise
from tiny_runs import save_base
from tiny_tokenizer import tiny_tokenizer
from transformers import TextStreamer

import lorakit
from lorakit.adapters import handle_of
from lorakit.cli import main
from lorakit.compute.adapter_file import AdapterFile
from lorakit.errors import AdapterFileError, DataError
from lorakit.evaluation.conversation import Conversation
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate

NEW = 8
"""New tokens per answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two of its adapters that change every answer."""
    folder = tmp_path_factory.mktemp("chat")
    save_base(folder / "base", max_position_embeddings=128)
    for seed, name in enumerate(("first", "second")):
        adapters = lorakit.attach(
            lorakit.load_base(folder / "base", dtype="float32").model, lorakit.LoRA(rank=4)
        )
        randomise(adapters, seed=seed)
        adapters.save(folder / name / "adapter", provenance={"task": "chat", "labels": []})
    return folder


class Pipe(io.StringIO):
    """Standard input with these lines."""

    def __init__(self, *lines: str, terminal: bool = False) -> None:
        super().__init__("".join(f"{line}\n" for line in lines))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def chat(folder: Path, monkeypatch, capsys):
    """Run `lorakit chat` on lines of input; return its status, output and notes."""

    def run(*lines: str, terminal: bool = False, options: tuple[str, ...] = ()):
        monkeypatch.setattr(sys, "stdin", Pipe(*lines, terminal=terminal))
        name = [] if "--base.name" in options else ["--base.name", str(folder / "base")]
        base = [*name, "--base.dtype", "float32"]
        status = main(["chat", *base, "--decoding.max_new_tokens", str(NEW), *options])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def answers(folder: Path, adapter: str | None, *messages: str, system: str = "") -> list[str]:
    """Generate each answer from the whole conversation before it."""
    base = lorakit.load_base(folder / "base", dtype="float32")
    if adapter:
        lorakit.load(base.model, folder / adapter / "adapter")
    text, texts = f"<|im_start|>system\n{system}<|im_end|>\n" if system else "", []
    for message in messages:
        text += f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        ids = tiny_tokenizer().encode(text)
        texts += generate(base.model, tiny_tokenizer(), [ids], Decoding(max_new_tokens=NEW))
        text += f"{texts[-1].strip()}<|im_end|>\n"
    return texts


def test_each_line_is_answered_from_the_conversation_before_it(folder, chat) -> None:
    status, out, err = chat("The river", "", "pub", options=("--system", "Be brief."))
    expected = answers(folder, None, "The river", "pub", system="Be brief.")
    assert (status, out, err) == (0, "".join(f"{text}\n" for text in expected), "")


@pytest.mark.slow
def test_commands_choose_the_adapter_and_start_anew(folder, chat) -> None:
    first, second = (str(folder / name / "adapter") for name in ("first", "second"))
    lines = ["river", "/reset", f"/adapter {second}", "river", "/reset", "/base", "river"]
    lines += ["/reset", "/adapter first", "river", "/quit", "river"]
    status, out, err = chat(*lines, options=("--adapter", first))
    expected = [answers(folder, name, "river")[0] for name in ("first", "second", None, "first")]
    assert len(set(expected)) == 3
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))
    assert [line.split(", ")[-1] for line in err.splitlines() if "adapter" in line] == [
        *("adapter first", "adapter second", "no adapter", "adapter first")
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program(folder, chat, monkeypatch) -> None:
    put, calls = TextStreamer.put, []

    def interrupting(self, value) -> None:
        calls.append(value)
        if len(calls) == 4:  # the prompt and three tokens
            signal.raise_signal(signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", interrupting)
    # A shell starts background jobs with an ignored SIGINT, which lorakit respects.
    before = signal.default_int_handler
    inherited = signal.signal(signal.SIGINT, before)
    try:
        status, out, _ = chat("river", "/reset", "river")
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)
    (whole,) = answers(folder, None, "river")
    stopped = out.removesuffix(f"\n{whole}\n")
    assert status == 0
    assert stopped != out
    assert whole.startswith(stopped.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(calls) < 2 * (1 + NEW)  # fewer tokens than two whole answers


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptor x", "Unknown command '/adaptor'. Did you mean '/adapter'?"),
        ("/adapter nowhere", "nowhere"),
        ("/adapter ~no-such-user/a", "~no-such-user/a"),
        ("pub " * 100, "fills the model's context of 128"),
        ("\udcff", "is not UTF-8 (byte 0xff)"),
    ],
)
def test_an_error_ends_a_pipe_but_not_a_terminal(line, message, folder, chat) -> None:
    (answer,) = answers(folder, None, "river")
    status, out, err = chat(line, "river")
    assert (status, out) == (1, "")
    assert message in err
    status, out, err = chat(line, "river", terminal=True)
    assert (status, out) == (0, f"> > {answer}\n> ")
    assert message in err


@pytest.mark.slow
def test_an_adapter_trained_for_something_else_says_so(folder, chat, tmp_path) -> None:
    for provenance in ({"task": "completion", "labels": []}, {}):
        adapters = lorakit.attach(
            lorakit.load_base(folder / "base", dtype="float32").model, lorakit.LoRA(rank=1)
        )
        name = tmp_path / (provenance.get("task") or "peft")
        adapters.save(name, provenance=provenance)
    _, _, err = chat(f"/adapter {tmp_path / 'completion'}", f"/adapter {tmp_path / 'peft'}")
    assert "was trained for completion, not for chat" in err
    assert "peft does not record its task; messages use the chat template" in err


def test_a_base_without_a_chat_template_is_refused_at_once(folder, chat, tmp_path) -> None:
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    lorakit.load_base(folder / "base", dtype="float32").model.save_pretrained(tmp_path)
    status, out, err = chat("river", options=("--base.name", str(tmp_path)))
    assert (status, out) == (1, "")
    assert "has no chat template" in err


@pytest.mark.parametrize("task", ["classification", "mrpc", "stsb"])
def test_an_adapter_for_labels_is_refused_before_the_base_is_loaded(
    task, folder, chat, tmp_path, monkeypatch, capsys
) -> None:
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=1))
    adapters.save(tmp_path / "labels", provenance={"task": task, "labels": []})
    _, _, err = chat(f"/adapter {tmp_path / 'labels'}", terminal=True)
    assert f"To apply it: lorakit predict --adapter {tmp_path / 'labels'}" in err
    monkeypatch.setattr("lorakit.compute.adapted.open_base", None)
    words = ["--adapter", str(tmp_path / "labels")]
    for status, err in (
        chat("river", options=tuple(words))[::2],
        (main(["generate", "--prompt", "x", *words]), capsys.readouterr().err),
    ):
        assert status == 1
        assert f"was trained for {task} and generates no text" in err


def test_an_adapter_on_the_base_it_is_merged_into_is_refused(folder, chat, tmp_path) -> None:
    base = lorakit.load_base(folder / "base", dtype="float32")
    lorakit.load(base.model, folder / "first" / "adapter").merge("first", keep_base=False)
    base.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    on_merged = ("--base.name", str(tmp_path))
    words = ("--adapter", str(folder / "first" / "adapter"), *on_merged)
    status, _, err = chat("river", options=words)
    assert (status, "is another base" in err, "--adapter null" in err) == (1, True, False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "lorakit_merged": True}))
    status, _, err = chat("river", options=words)
    assert (status, "in it already: use it without an adapter (--adapter null)" in err) == (1, True)
    status, out, _ = chat("river", options=(*on_merged, "--adapter", "null"))
    assert (status, out) == (0, f"{answers(folder, 'first', 'river')[0]}\n")


def test_beams_are_refused(chat) -> None:
    assert "needs one beam" in chat("river", options=("--decoding.beams", "2"))[2]


def test_an_adapter_that_is_refused_does_not_answer(folder, tmp_path) -> None:
    """On a terminal the chat goes on after the error."""
    base = lorakit.load_base(folder / "base", dtype="float32")
    adapters = lorakit.attach(base.model, lorakit.LoRA(rank=4))
    randomise(adapters, seed=2)
    base.tokenizer.add_tokens(["<new>"])
    adapters.save(tmp_path / "grown", tokenizer=base.tokenizer)
    conversation = Conversation(lorakit.load_base(folder / "base", dtype="float32"))
    conversation.load(AdapterFile.read(folder / "first" / "adapter"))
    handle = handle_of(conversation.base.model)
    for _ in range(2):
        with pytest.raises(AdapterFileError, match="vocabulary had grown"):
            conversation.load(AdapterFile.read(tmp_path / "grown"))
    assert handle.names == ("first",)
    assert handle.active == {conversation.adapter: 1.0} == {"first": 1.0}


def test_an_answer_ends_at_the_context_and_an_error_keeps_the_messages(folder) -> None:
    base = lorakit.load_base(folder / "base", dtype="float32")
    base.model.generation_config.eos_token_id = None
    conversation = Conversation(base)
    conversation.reply("river")  # 512 tokens do not fit
    messages = list(conversation.messages)
    with pytest.raises(DataError, match="/reset"):
        conversation.reply("pub")
    assert conversation.messages == messages
    conversation.reset()
    assert conversation.messages == []


def test_the_answer_of_an_encoder_decoder_has_a_context_of_its_own(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "bart", max_position_embeddings=64)
    base = lorakit.load_base(tmp_path / "base", task="seq2seq-lm", dtype="float32")
    conversation = Conversation(base, decoding=Decoding(max_new_tokens=NEW))
    assert [conversation._new_tokens(length) for length in (1, 60, 64)] == [NEW, NEW, NEW]
