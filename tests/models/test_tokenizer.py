"""A tokenizer's files are validated when they are read, and run no code."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from tiny_runs import save_base

from lorakit import LoRA, attach
from lorakit.compute.adapted import add_adapter
from lorakit.compute.adapter_file import AdapterFile
from lorakit.errors import AdapterFileError, BaseModelError, LorakitError
from lorakit.models.loading import Base, load_base, load_tokenizer
from lorakit.models.tokenizer import read_tokenizer


def set_length(folder: Path, length: str) -> None:
    """Write `length`, which may be a number that Python cannot write, as model_max_length."""
    path = folder / "tokenizer_config.json"
    text = json.dumps(json.loads(path.read_text()) | {"model_max_length": "@"})
    path.write_text(text.replace('"@"', length))


def write_code(folder: Path) -> Path:
    """Let the tokenizer of a folder need Python code of the folder; return the file that this code would write."""
    ran = folder / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ran


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    return Path(save_base(tmp_path / "model"))


WRONG = {
    '"x"': "'x'",
    '"512"': "'512'",
    "-5": "-5",
    "0": "0",
    "2.5": "2.5",
    "1e400": "inf",
    "NaN": "nan",
    "true": "True",
    "[1]": "[1]",
}


@pytest.mark.parametrize(("length", "shown"), WRONG.items(), ids=WRONG)
def test_a_length_that_is_no_whole_number_is_refused(folder: Path, length: str, shown: str) -> None:
    set_length(folder, length)
    found = rf"model.tokenizer_config\.json' has {re.escape(shown)} as model_max_length; a whole"
    for read in (load_base, load_tokenizer):
        with pytest.raises(BaseModelError, match=found):
            read(folder)


@pytest.mark.parametrize(
    "length", ["512", "512.0", "1e30", "1000000000000000019884624838656", "null"]
)
def test_a_length_or_no_limit_is_read(folder: Path, length: str) -> None:
    set_length(folder, length)
    tokenizer = read_tokenizer(str(folder), LorakitError)
    assert tokenizer("a b c", truncation=True)["input_ids"]


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Path:
    """An adapter folder with a tokenizer that lorakit.json does not list."""
    adapters = attach(base.model, LoRA(rank=2))
    adapters.save(tmp_path / "adapter")
    adapters.detach()
    base.text_tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_tokenizer_of_an_adapter_is_validated_too(base: Base, adapter: Path) -> None:
    set_length(adapter, '"x"')
    with pytest.raises(AdapterFileError, match=r"adapter.tokenizer_config\.json' has 'x'"):
        add_adapter(base, AdapterFile.read(adapter))


def test_code_in_an_adapter_never_runs(
    base: Base, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an explicit trust_remote_code, transformers asks on standard input whether to run it."""
    ran = write_code(adapter)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\nthe next line\n"))
    fix = r"is never run from an adapter's folder\). To use the base's tokenizer, delete '.*config.json'"
    with pytest.raises(AdapterFileError, match=fix):
        add_adapter(base, AdapterFile.read(adapter))
    assert sys.stdin.read() == "y\nthe next line\n"
    assert not ran.exists()


def test_a_base_s_tokenizer_with_code_is_not_saved_with_the_adapter(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = write_code(folder)
    own = "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own.py").write_text((folder / "own.py").read_text() + own)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    base = load_base(folder, trust_remote_code=True)
    assert ran.exists()
    adapters = attach(base.model, LoRA(rank=2))
    adapters.save(tmp_path / "adapter", tokenizer=base.tokenizer)
    assert not (tmp_path / "adapter" / "tokenizer_config.json").exists()
    assert "The tokenizer needs Python code of its own, so it was not saved" in caplog.text
    adapters.detach()
    add_adapter(base, AdapterFile.read(tmp_path / "adapter"))


@pytest.mark.parametrize("config", ["{}", '{"tokenizer_class": "FooTokenizer"}', "{"])
def test_a_tokenizer_that_cannot_be_read_is_an_error(
    config: str, base: Base, adapter: Path
) -> None:
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer_config.json").write_text(config)
    with pytest.raises(
        AdapterFileError, match=r"tokenizer in '.*adapter' cannot be read .*Restore"
    ):
        add_adapter(base, AdapterFile.read(adapter))


def test_a_tokenizer_is_given_up_without_the_record(base: Base, tmp_path: Path) -> None:
    """The message about an unreadable tokenizer says which file to delete."""
    tokenizer = base.text_tokenizer
    provenance = {"task": "completion", "labels": []}
    adapters = attach(base.model, LoRA(rank=2))
    adapters.save(tmp_path / "adapter", tokenizer=tokenizer, provenance=provenance)
    adapters.detach()
    (tmp_path / "adapter/tokenizer_config.json").unlink()
    adapter = AdapterFile.read(tmp_path / "adapter")
    assert adapter is not None
    assert adapter.provenance.items() >= provenance.items()
    (notice,) = adapter.stored.notices
    assert "so commands use the base's tokenizer" in notice
    assert add_adapter(base, adapter) is tokenizer


@pytest.mark.parametrize("is_peft", [False, True])
def test_a_chat_template_without_its_tokenizer_is_reported(
    is_peft: bool, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, adapters = tmp_path / "adapter", attach(base.model, LoRA(rank=2))
    adapters.save(folder)
    adapters.detach()
    if is_peft:
        (folder / "lorakit.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    add_adapter(base, AdapterFile.read(folder))
    assert "has chat_template.jinja but no tokenizer_config.json, so commands use" in caplog.text
