"""A model on a hub loads, loads again without it, or is an error that says what the hub has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import tiny_models
import torch
from huggingface_hub import constants, hf_hub_download
from small_hub import COMMIT, SmallHub, small_hub
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.errors import BaseModelError
from lorakit.models import hub as module
from lorakit.models.loading import load_base, load_tokenizer
from lorakit.models.sources import resolve

NAME = "organisation/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    monkeypatch.setattr(module, "_KEPT", 1e9)
    with small_hub(tmp_path / "cache", monkeypatch) as served:
        yield served


@pytest.fixture
def model(hub: SmallHub, tmp_path: Path) -> Path:
    """Return the folder of a model that the hub has."""
    folder = hub.models[NAME] = tmp_path / "model"
    tiny_models.build("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cached(hub: SmallHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model in the local cache, without the hub."""
    files = [hf_hub_download(NAME, file.name) for file in model.iterdir()]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Path(files[0]).parent


@pytest.mark.slow
@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_downloaded_model_loads_again_without_the_hub(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    tokenizer = load_tokenizer(NAME, revision=revision)
    asked = len(hub.requests)
    load_tokenizer(NAME, revision=revision)
    online = load_base(NAME, revision=revision, dtype="float32", tokenizer=tokenizer)
    info = re.compile(rf"/api/models/{NAME}(/revision/\w+)?")
    assert not any(map(info.fullmatch, hub.requests[asked:]))  # the first answer is kept
    files = {path for path in hub.requests if "/resolve/" in path and COMMIT not in path}
    assert files == {f"/{NAME}/resolve/{revision or 'main'}/config.json"}
    assert not any("local cache" in notice for notice in online.notices)
    assert online.source.revision == COMMIT
    record = lorakit.attach(online.model, lorakit.LoRA(rank=2)).base_record()
    assert (record.name, record.revision) == (NAME, COMMIT)

    hub.status = 503
    module._KNOWN.clear()
    monkeypatch.setattr(module, "_FAILURE_KEPT", -1)
    for offline, reason in (
        (False, "The hub answered with an error (Server error '503"),
        (True, "HF_HUB_OFFLINE"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.requests.clear()
        base = load_base(NAME, revision=revision, dtype="float32")
        assert len(hub.requests) == (not offline)
        assert base.notices[0].startswith(reason)
        assert base.notices[0].endswith("; the copy in the local cache is used.")
        assert base.source.revision == COMMIT
        assert base.text_tokenizer.get_vocab() == tokenizer.get_vocab()
        expected = tiny_models.build("llama").state_dict()
        assert all(torch.equal(w, expected[n]) for n, w in base.model.state_dict().items())
    hub.status = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_base(NAME, revision=revision).notices == online.notices


@pytest.mark.usefixtures("cached")
def test_a_failure_is_kept_for_seconds(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a route to the hub each request takes its whole time limit."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.status = 503
    hub.requests.clear()
    for source in (resolve(NAME), resolve(NAME, revision=COMMIT)):
        assert module.locate_on_hub(source).problem
    assert len(hub.requests) == 1
    hub.status = None
    monkeypatch.setattr(module, "_FAILURE_KEPT", -1)
    assert not module.locate_on_hub(resolve(NAME)).problem


@pytest.mark.usefixtures("model")
def test_the_model_is_of_the_commit_of_a_tokenizer_that_was_read_before(hub: SmallHub) -> None:
    tokenizer = load_tokenizer(NAME)
    hub.commits.append("f" * 40)
    module._KNOWN.clear()
    base = load_base(NAME, dtype="float32", tokenizer=tokenizer)
    assert base.tokenizer is tokenizer
    assert base.source.revision == COMMIT
    # For a file that the hub refuses, its client returns the older one in the cache.
    hub.file_status = 403
    assert module.locate_on_hub(resolve(NAME)).commit == "f" * 40


@pytest.mark.parametrize("reachable", [False, True])
def test_a_tokenizer_that_cannot_be_read(
    cached: Path, model: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    """A download that was cut off, or one that fails, does not mean that the model has no tokenizer."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not reachable)
    with monkeypatch.context() as patch:
        if reachable:
            failing = mock.Mock(side_effect=OSError("the download failed"))
            patch.setattr("transformers.AutoTokenizer.from_pretrained", failing)
        else:
            (cached / "tokenizer.json").write_text("{")
        message = rf"tokenizer of '{NAME}' cannot be read .* {NAME} --revision {COMMIT} --force"
        with pytest.raises(BaseModelError, match=message):
            load_base(NAME, dtype="float32")
    for path in [*cached.glob("tokenizer*"), *model.glob("tokenizer*")]:
        path.unlink()
    module._KNOWN.clear()
    assert load_base(NAME, dtype="float32").tokenizer is None


def test_a_file_that_is_missing_in_the_cache_may_be_on_the_hub(cached: Path) -> None:
    may_be = "Its copy in the local cache may be incomplete: connect to the hub"
    for path in cached.glob("tokenizer*"):
        path.unlink()
    base = load_base(NAME, dtype="float32")
    assert base.notices == [
        "HF_HUB_OFFLINE disables the hub; the copy in the local cache is used.",
        f"'{NAME}' has no tokenizer. {may_be}, and load it once.",
    ]
    with pytest.raises(BaseModelError, match=f"needs to read text.*{may_be}"):
        _ = base.text_tokenizer
    with pytest.raises(BaseModelError, match=f"has no tokenizer.*{may_be}"):
        load_tokenizer(NAME)
    (cached / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=rf"OSError: .*model\.safetensors\. {may_be}"):
        load_base(NAME, dtype="float32")


@pytest.mark.slow
def test_an_adapter_beside_the_model_is_not_loaded(hub: SmallHub, model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "organisation/other"}')
    base = load_base(NAME, dtype="float32")
    (notice,) = (n for n in base.notices if "also holds an adapter" in n)
    assert notice.startswith(f"'{NAME}' also holds an adapter (adapter_config.json)")
    assert torch.equal(base.model.lm_head.weight, tiny_models.build("llama").lm_head.weight)


@pytest.mark.usefixtures("model")
def test_a_gated_model(hub: SmallHub) -> None:
    """The hub tells everyone what it has, and refuses its files."""
    hub.file_status = 401
    for load in (load_base, load_tokenizer):
        with pytest.raises(BaseModelError, match=r"is gated\. Accept its terms.*hf auth login"):
            load(NAME)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "tokenizer.json"], f"'{NAME}' is an adapter, not a base model"),
        (["adapter_config.json", "config.json", "old/model.safetensors"], "no weights of a model"),
        (["a.gguf", "b.gguf"], rf"not a base model\. Download one.*: hf download {NAME} a\.gguf"),
        (["data.csv"], rf"'{NAME}' has no config\.json, so it is not a base model\.$"),
    ],
)
def test_a_name_of_something_else(
    hub: SmallHub, tmp_path: Path, files: list[str], message: str
) -> None:
    folder = hub.models[NAME] = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(BaseModelError, match=message):
        load_base(NAME)


@pytest.mark.usefixtures("model")
def test_names_that_the_hub_does_not_have() -> None:
    with pytest.raises(BaseModelError, match=r"No model 'organisation/other' exists"):
        load_base("organisation/other")
    with pytest.raises(BaseModelError, match=r"'minilm-16' exists.*Did you mean 'minilm-l6'\?"):
        load_base("minilm-16")
    with pytest.raises(BaseModelError, match=r"has no revision 'v2'"):
        load_base(NAME, revision="v2")


@pytest.mark.usefixtures("model")
def test_a_hub_that_fails_and_a_cache_that_cannot_be_written(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.file_status = 403
    message = r"not in the local cache, and the hub answered with an error \(.*403"
    with pytest.raises(BaseModelError, match=message):
        load_base(NAME)
    hub.file_status = None
    (tmp_path / "cache").touch()
    message = r"cannot be downloaded into the hub's cache \(\w+Error: .*Check that \$HF_HOME"
    with pytest.raises(BaseModelError, match=message):
        load_base(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(BaseModelError, match="and the hub cannot be reached"):
        load_base(NAME)
