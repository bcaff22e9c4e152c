"""A tokenizer's files are validated when they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_runs import save_base

from lorakit import LoRA, attach
from lorakit.compute.adapted import add_adapter
from lorakit.compute.adapter_file import AdapterFile
from lorakit.errors import AdapterFileError, BaseModelError, LorakitError
from lorakit.models.loading import load_base, load_tokenizer
from lorakit.models.tokenizer import read_tokenizer


def set_length(folder: Path, length: str) -> None:
    """Write `length`, which may be a number that Python cannot write, as model_max_length."""
    path = folder / "tokenizer_config.json"
    text = json.dumps(json.loads(path.read_text()) | {"model_max_length": "@"})
    path.write_text(text.replace('"@"', length))


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


def test_the_tokenizer_of_an_adapter_is_validated_too(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    adapters = attach(base.model, LoRA(rank=2))
    adapters.save(tmp_path / "adapter")
    adapters.detach()
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    set_length(tmp_path / "adapter", '"x"')
    with pytest.raises(AdapterFileError, match=r"adapter.tokenizer_config\.json' has 'x'"):
        add_adapter(base, AdapterFile.read(tmp_path / "adapter"))
