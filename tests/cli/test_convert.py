"""`lorakit convert`: the tensors and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny_models
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

import lorakit
from lorakit.adapters import formats
from lorakit.cli import main

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Write an adapter folder with a tokenizer that has a custom chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|tool|>"])
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2))
    return adapters.save(tmp_path / "adapter", tokenizer=tokenizer)


def convert(source: Path, target: Path, *options: str) -> None:
    assert main(["convert", str(source), str(target), *options]) == 0


def test_the_tokenizer_comes_along(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "converted")
    found = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert found.chat_template == TEMPLATE
    assert found.tokenize("<|tool|>") == ["<|tool|>"]
    assert formats.read(tmp_path / "converted").notices == []  # the checksums cover all files


def test_nothing_else_comes_along(adapter: Path, tmp_path: Path) -> None:
    before = {path.name for path in adapter.iterdir()}
    for name in ("optimizer.pt", "notes.md", "trainer_state.json"):
        (adapter / name).write_text("{}")
    convert(adapter, tmp_path / "converted")
    assert {path.name for path in (tmp_path / "converted").iterdir()} == before


@pytest.mark.parametrize(
    "link", ["merges.txt", "tokenizer_config.json", "additional_chat_templates"]
)
def test_links_out_of_the_folder_are_refused(adapter: Path, tmp_path: Path, capsys, link) -> None:
    """An unpacked archive could otherwise publish files of this machine."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key.jinja").write_text("secret")
    (adapter / "lorakit.json").unlink()  # its checksums would refuse a changed file
    (adapter / link).unlink(missing_ok=True)
    (adapter / link).symlink_to(secrets if "." not in link else secrets / "key.jinja")
    assert main(["convert", str(adapter), str(tmp_path / "converted")]) == 1
    assert "outside the adapter's folder" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


def test_links_of_the_hubs_cache_are_copied(adapter: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me/snapshots/main", tmp_path / "models--me/blobs"
    snapshot.mkdir(parents=True)
    for path in adapter.rename(blobs).iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(snapshot, tmp_path / "converted")
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").chat_template == TEMPLATE
    assert not any(path.is_symlink() for path in (tmp_path / "converted").iterdir())


def test_in_place_nothing_is_lost(adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    convert(adapter, adapter, "--overwrite", "true")
    after = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[n] == after[n] for n in before if n.startswith("token") or n == TENSORS)


@pytest.mark.parametrize("options", [(), ("--to", "loralib")])
def test_there_and_back_the_tensors_are_the_same(adapter: Path, tmp_path: Path, options) -> None:
    convert(adapter, tmp_path / "lora.bin", *options)
    assert (tmp_path / "lora.bin").is_file()
    convert(tmp_path / "lora.bin", tmp_path / "back", "--alpha", "16")
    before, after = load_file(adapter / TENSORS), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize(
    ("settings", "rank", "alpha"),
    [
        ({"rank": 4}, "4", "16"),
        ({"rank": 4, "scaling": "rslora"}, "4", "32"),
        ({"rank": 8, "scaling": "rslora"}, "8", "45.25483399593904"),
        ({"rank": 4, "init": "pissa"}, "8", "32"),  # the file has twice the rank
        ({"rank": 4, "rank_pattern": {"q_proj": 2}}, "2 or 4", "16"),
    ],
    ids=str,
)
def test_the_note_names_rank_and_alpha_that_a_loralib_file_needs(
    settings: dict, rank: str, alpha: str, tmp_path: Path, capsys
) -> None:
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(**settings))
    folder = adapters.save(tmp_path / "adapter")
    convert(folder, tmp_path / "lora.bin")
    assert f"--alpha {alpha} (loralib: r={rank}, lora_alpha={alpha})" in capsys.readouterr().out
    found = formats.read(tmp_path / "lora.bin", alpha=float(alpha)).layers
    expected = formats.read(folder).layers
    assert {p: one.scaling for p, one in found.items()} == {
        p: one.scaling for p, one in expected.items()
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("to", ["peft", "loralib"])
def test_base_weights_that_may_be_trained_are_refused(tmp_path: Path, capsys, to: str) -> None:
    """Only a model shows whether they were trained: a resized table of PEFT."""
    model = tiny_models.build("llama")
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    output = tmp_path / "out.bin"
    assert main(["convert", str(tmp_path / "peft"), str(output), "--to", to]) == 1
    assert "does not record whether they were trained" in capsys.readouterr().err
    assert not output.exists()
