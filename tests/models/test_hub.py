"""A model on a hub loads, loads again without it, or is an error that says what the hub has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import constants
from small_hub import COMMIT, SmallHub, small_hub
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.errors import BaseModelError
from lorakit.models import hub as module
from lorakit.models.loading import load_base, load_tokenizer

NAME = "organisation/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    monkeypatch.setattr(module, "_KEPT", 1e9)
    with small_hub(tmp_path / "cache") as served:
        yield served


@pytest.fixture
def model(hub: SmallHub, tmp_path: Path) -> Path:
    """Return the folder of a model that the hub has."""
    folder = hub.models[NAME] = tmp_path / "model"
    tiny_models.build("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_downloaded_model_loads_again_without_the_hub(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    tokenizer = load_tokenizer(NAME, revision=revision)
    asked = len(hub.requests)
    load_tokenizer(NAME, revision=revision)
    assert not any(path.startswith(f"/api/models/{NAME}/re") for path in hub.requests[asked:])
    online = load_base(NAME, revision=revision, dtype="float32")
    assert not any("local cache" in notice for notice in online.notices)
    assert online.source.revision == COMMIT
    record = lorakit.attach(online.model, lorakit.LoRA(rank=2)).base_record()
    assert (record.source.name, record.source.revision) == (NAME, COMMIT)

    hub.status = 503
    for offline, reason in (
        (False, "The hub answered with an error (Server error '503"),
        (True, "HF_HUB_OFFLINE"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        module._locate.cache_clear()
        hub.requests.clear()
        base = load_base(NAME, revision=revision, dtype="float32")
        assert len(hub.requests) == (not offline)
        assert base.notices[0].startswith(reason)
        assert base.notices[0].endswith("; the copy in the local cache is used.")
        assert base.source.revision == COMMIT
        assert base.text_tokenizer.get_vocab() == tokenizer.get_vocab()
        expected = tiny_models.build("llama").state_dict()
        assert all(torch.equal(w, expected[n]) for n, w in base.model.state_dict().items())


@pytest.mark.slow
def test_an_adapter_beside_the_model_is_not_loaded(hub: SmallHub, model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "organisation/other"}')
    base = load_base(NAME, dtype="float32")
    (notice,) = (n for n in base.notices if "also holds an adapter" in n)
    assert notice.startswith(f"'{NAME}' also holds an adapter (adapter_config.json)")
    assert torch.equal(base.model.lm_head.weight, tiny_models.build("llama").lm_head.weight)


def test_a_gated_model(hub: SmallHub, model: Path) -> None:
    """The hub tells everyone what it has, and refuses its files."""
    hub.gated.add(NAME)
    for load in (load_base, load_tokenizer):
        with pytest.raises(BaseModelError, match=r"is gated\. Accept its terms.*hf auth login"):
            load(NAME)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "tokenizer.json"], f"'{NAME}' is an adapter, not a base model"),
        (["adapter_config.json", "config.json"], "no weights of a model"),
        (["a.gguf", "b.gguf"], rf"not a base model\. Download one.*: hf download {NAME} a\.gguf"),
        (["data.csv"], rf"'{NAME}' has no config\.json, so it is not a base model\.$"),
    ],
)
def test_a_name_of_something_else(
    hub: SmallHub, tmp_path: Path, files: list[str], message: str
) -> None:
    folder = hub.models[NAME] = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(BaseModelError, match=message):
        load_base(NAME)


@pytest.mark.usefixtures("model")
def test_names_that_the_hub_does_not_have() -> None:
    with pytest.raises(BaseModelError, match=r"No model 'organisation/other' exists"):
        load_base("organisation/other")
    with pytest.raises(BaseModelError, match=r"has no revision 'v2'"):
        load_base(NAME, revision="v2")
