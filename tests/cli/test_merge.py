"""`lorakit merge` on decoder-only and encoder-decoder models."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from random_adapters import randomise
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import lorakit
from lorakit.cli import main
from lorakit.training.loop import train

FLOAT32 = ("--base.name", "base", "--base.dtype", "float32")


@pytest.mark.parametrize(
    ("arch", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)]
)
def test_the_merged_model_says_what_the_adapted_one_said(arch, auto, tmp_path, capsys):
    base = tiny_runs.save_base(tmp_path / "base", arch)
    model = auto.from_pretrained(base).eval()
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2, targets="attention"))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.normal_(std=0.3)
    adapters.save(str(tmp_path / "adapter"))
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base.name", base]
    words += ["--base.dtype", "float32"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "The merge changes the most likely token in none of" in out
    assert "Largest difference" in out
    assert "100.0 % of the adapter's weight update survives rounding to float32." in out
    assert "merge in float32" not in out
    batch = tiny_models.example_batch(arch, model)
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, expected = merged(**batch).logits, model(**batch).logits
        # One product instead of two: float32 rounding, for logits of order 10.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    """An adapter folder that records its base, `base` in the working folder."""
    monkeypatch.chdir(tmp_path)
    tiny_runs.save_base(tmp_path / "base")
    handle = lorakit.attach(lorakit.load_base("base", dtype="float32").model, lorakit.LoRA(rank=2))
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.normal_(std=0.02)
    handle.save("adapter")
    return tmp_path


def test_the_base_of_the_adapter_is_used_with_another_dtype(decoder, capsys):
    """`--base.dtype` needs no `--base.name`, and a lossy merge says what to write instead."""
    assert main(["merge", "adapter", "narrow", "--base.dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "weight update survives rounding to bfloat16." in out
    assert "merge in float32: add --base.dtype float32." in out
    assert main(["merge", "adapter", "wide", "--base.dtype", "float32"]) == 0
    assert "merge in float32" not in capsys.readouterr().out
    weights = AutoModelForCausalLM.from_pretrained("wide", dtype="auto")
    assert weights.dtype == torch.float32
    # `auto` computes a merged model in the dtype of its file (tests/models/test_dtype_choice.py).
    assert weights.config.lorakit_merged


def test_the_merged_model_of_a_chat_adapter_stops_where_turns_ended(decoder, capsys):
    """The base's own end token may be another one, as in Qwen2.5-0.5B, which is no chat model."""
    base = lorakit.load_base("base", dtype="float32")
    pad, end = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    GenerationConfig(eos_token_id=pad).save_pretrained("base")
    handle = lorakit.attach(base.model, lorakit.LoRA(rank=2))
    handle.save("chat", provenance={"task": "chat", "labels": []})
    assert main(["merge", "chat", "merged", *FLOAT32]) == 0
    assert GenerationConfig.from_pretrained("merged").eos_token_id == [pad, end]
    assert "ends texts at <|im_end|> too, as in training" in capsys.readouterr().out


def test_flags_of_sampling_without_sampling_are_kept(decoder):
    """transformers saves such flags of a base only if its configuration is as it was loaded: no pad id is set."""
    flags = {"temperature": 0.9, "top_p": 0.6}
    Path("base/generation_config.json").write_text(json.dumps({**flags, "eos_token_id": 1}))
    base = lorakit.load_base("base", dtype="float32")
    lorakit.attach(base.model, lorakit.LoRA(rank=2)).save(
        "chat", provenance={"task": "chat", "labels": []}
    )
    assert main(["merge", "chat", "merged", *FLOAT32]) == 0
    saved = json.loads(Path("merged/generation_config.json").read_text())
    assert saved.items() >= {**flags, "pad_token_id": base.tokenizer.pad_token_id}.items()
    assert set(saved["eos_token_id"]) >= {1, base.tokenizer.eos_token_id}


def test_the_sentencepiece_model_of_the_base_is_copied(decoder):
    """llama.cpp needs it for some architectures. It then reads no added tokens in tokenizer.json."""
    Path("base/tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained("base")
    start = len(tokenizer)
    model = AutoModelForCausalLM.from_pretrained("base")
    model.resize_token_embeddings(start + 2)
    model.save_pretrained("base")
    tokenizer.add_tokens(["<of_base>"], special_tokens=True)
    tokenizer.save_pretrained("base")
    base = lorakit.load_base("base", dtype="float32")
    tokenizer.add_tokens(["<of_adapter>"])
    lorakit.attach(base.model, lorakit.LoRA(rank=2)).save("own", tokenizer=tokenizer)
    assert main(["merge", "own", "merged", *FLOAT32]) == 0
    assert Path("merged/tokenizer.model").read_bytes() == b"pieces"
    config = json.loads(Path("merged/tokenizer_config.json").read_text(encoding="utf-8"))
    added = config["added_tokens_decoder"]
    expected = json.loads(Path("merged/tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [{"id": int(i), **token} for i, token in added.items()] == expected
    assert [added[str(start + i)]["content"] for i in range(2)] == ["<of_base>", "<of_adapter>"]
    assert [added[str(start + i)]["special"] for i in range(2)] == [True, False]
    merged = AutoTokenizer.from_pretrained("merged")
    assert merged.get_vocab() == tokenizer.get_vocab()
    text = "river <of_base> pub<of_adapter>"
    assert merged(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_merge_ends_without_a_sentencepiece_model_that_cannot_be_read(decoder):
    Path("base/tokenizer.model").mkdir()
    assert main(["merge", "adapter", "merged", *FLOAT32]) == 0
    assert not Path("merged/tokenizer.model").exists()
    assert "added_tokens_decoder" not in Path("merged/tokenizer_config.json").read_text()


def test_the_files_of_a_merged_model_have_the_mode_of_other_files(decoder):
    old = os.umask(0o027)
    try:
        assert main(["merge", "adapter", "merged", *FLOAT32]) == 0
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path("merged").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}


def test_notices_of_the_base_are_printed(decoder, caplog, monkeypatch):
    """A file with more layers than the model has is not an error, but the user must know."""
    config = Path("base", "config.json")
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    )
    handle = lorakit.attach(lorakit.load_base("base", dtype="float32").model, lorakit.LoRA(rank=2))
    handle.save("short")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for command in (
        ["chat", "--adapter", "short", *FLOAT32],
        ["merge", "short", "merged", *FLOAT32],
        [
            "generate",
            "--adapter",
            "short",
            "--prompt",
            "river",
            "--decoding.max_new_tokens",
            "2",
            *FLOAT32,
        ],
    ):
        caplog.clear()
        assert main(command) == 0
        assert (
            "Weights of the checkpoint that this task does not use: model.layers.1" in caplog.text
        )


def test_a_base_of_nan_is_an_error(decoder, capsys):
    model = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("base")
    for command in (
        ["merge", "adapter", "merged", "--allow_other_base", "true"],
        ["generate", "--prompt", "river", "--decoding.max_new_tokens", "2"],
    ):
        assert main([*command, *FLOAT32]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert "'model.layers.1.mlp.up_proj.weight' holds NaN" in printed.err
    assert not Path("merged").exists()


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "roberta"])
def test_a_classifier_without_a_recorded_task_merges(arch, labels, tmp_path, capsys):
    """`adapters.save` records the class of the base, and PEFT its task_type; the head has a row for each label."""
    base = tiny_runs.save_base(tmp_path / "base", arch, None if arch == "llama" else "base")
    head = {"task": "regression"} if labels == 1 else {"num_labels": labels}
    head = {"task": "sequence-classification", **head}
    model = lorakit.load_base(base, dtype="float32", **head).model
    heads = ("score",) if arch == "llama" else ("classifier",)
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, train_modules=heads))
    randomise(handle)
    handle.save(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "peft")
    (tmp_path / "peft/lorakit.json").unlink()
    batch = tiny_models.example_batch(arch, model)
    for name in ("own", "peft"):
        words = ["merge", str(tmp_path / name), str(tmp_path / f"{name}-merged")]
        assert main([*words, "--base.name", base, "--base.dtype", "float32"]) == 0
        assert "ForSequenceClassification.from_pretrained" in capsys.readouterr().out
        assert main(["generate", "--adapter", str(tmp_path / name), "--prompt", "river"]) == 1
        assert f"To apply it: lorakit merge {tmp_path / name} OUTPUT" in capsys.readouterr().err
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{name}-merged")
        with torch.no_grad():
            found, expected = merged.eval()(**batch).logits, model(**batch).logits
        assert found.shape[1] == labels
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_merged_classifier_names_its_labels(tmp_path, caplog):
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    rows = [{**row, "label": ("dry", "wet")[row["label"]]} for row in tiny_runs.labelled(16)]
    tiny_runs.write_rows(tmp_path / "train.jsonl", rows)
    tiny_runs.write_rows(tmp_path / "validation.jsonl", rows)
    train(tiny_runs.config(tmp_path, base, max_steps=1))
    words = ["merge", str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")]
    assert main([*words, "--base.name", base, "--base.dtype", "float32"]) == 0
    assert "Newly initialised" not in caplog.text  # the adapter has the head
    folder = tmp_path / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "dry", 1: "wet"}
    assert model.config.label2id == {"dry": 0, "wet": 1}
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    assert classify("river food")[0]["label"] in ("dry", "wet")
