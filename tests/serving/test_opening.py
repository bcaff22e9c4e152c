"""What a server opens: the base that its adapters record."""

from __future__ import annotations

import json
import ntpath
import shutil
from types import SimpleNamespace

import pytest
from stores import LARGE, TENSORS, open_base

from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.serving import cards, folders
from lorakit.serving.cards import Card, read_card
from lorakit.serving.engine import Limits
from lorakit.serving.folders import FileState, Location, digests_of
from lorakit.serving.http.errors import without_folders
from lorakit.serving.opening import _base, _cards, _memory_notice, _task, sources
from lorakit.serving.serve_config import ServeConfig
from lorakit.serving.store import AdapterStore

NAME = "owner/model"


@pytest.mark.parametrize(
    ("revisions", "expected"), [([None, None], None), ([""], None), (["v2", None], "v2")]
)
def test_the_base_has_the_revision_that_the_adapters_record(revisions, expected) -> None:
    cards = [Card(base=NAME, revision=revision) for revision in revisions]
    assert _base(None, cards) == BaseConfig(name=NAME, revision=expected)


def test_a_followed_run_that_is_not_there_is_a_notice(tmp_path, caplog) -> None:
    (tmp_path / "first").mkdir()
    assert _cards(None, {"first": str(tmp_path / "first"), "frist": str(tmp_path / "frist")}) == []
    (notice,) = caplog.messages
    assert notice.startswith(f"There is no run at '{tmp_path}/frist' yet;")
    assert notice.endswith(f"Did you mean '{tmp_path}/first'?")


@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        ("classification", "classification", ()),
        ("mrpc", "classification", ("not_equivalent", "equivalent")),
        ("stsb", "regression", ()),
        ("chat", "text", ()),
        ("auto", "text", ()),
    ],
)
def test_a_run_without_an_adapter_yet_decides_base_and_head(tmp_path, task, kind, labels) -> None:
    settings = {"base": {"name": NAME, "revision": "v2"}, "data": {"task": task}}
    run = {**settings, "method": "lora", "output": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(json.dumps(run))
    cards = _cards(None, {"run": str(tmp_path)})
    assert _base(None, cards) == BaseConfig(name=NAME, revision="v2")
    assert (_task(cards).kind, _task(cards).labels) == (kind, labels)


def test_adapters_decide_before_a_run_without_one(made, tmp_path) -> None:
    """The run may spell the base as its user did, and leave the task to its data."""
    settings = {"base": {"name": "./base"}, "data": {"task": "auto"}, "method": "lora"}
    (tmp_path / "config.yaml").write_text(json.dumps({**settings, "output": str(tmp_path)}))
    alone, both = _cards(made, {}), _cards(made, {"run": str(tmp_path)})
    assert alone
    assert both == alone
    assert _cards(None, {"run": str(tmp_path)}) == [Card(base="./base", revision="", task="auto")]


def test_a_run_that_has_not_begun_has_no_base(tmp_path, caplog) -> None:
    assert _cards(None, {"run": str(tmp_path)}) == []
    with pytest.raises(ConfigurationError, match=r"no adapter and no run yet .* --base.name MODEL"):
        _base(None, [])
    (tmp_path / "config.yaml").write_text("base: [")
    assert _cards(None, {"run": str(tmp_path)}) == []
    assert "is not valid YAML" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "cache_tokens", "expected"),
    [
        ([10, 20, None], 8192, None),
        ([], None, None),
        ([30] * 10, 5000, "--adapter_memory 100B holds about 3 of 10 adapters at a time"),
        ([10], 4096, "--cache_memory 2GB holds 4,096 tokens of running requests"),
        (
            [300],
            4096,
            "--adapter_memory 100B is too small for one of 1 adapter at a time; --cache_memory",
        ),
    ],
)
def test_the_start_says_what_fits_into_memory(sizes, cache_tokens, expected) -> None:
    config = ServeConfig(adapter_memory="100B")
    limits = Limits(4096, queue=1, running=1, cache_tokens=cache_tokens)
    notice = _memory_notice(config, [Card(size=size) for size in sizes], limits)
    assert notice == expected if expected is None else str(notice).startswith(expected)


def test_the_size_of_a_followed_run_is_that_of_its_checkpoint(made, tmp_path) -> None:
    location = Location(str(made / "a"), str(tmp_path / "step-3"))
    files = Location(location.folder).state()
    assert sum(file.path.endswith(".safetensors") for file in files) == 1
    checkpoint = FileState(f"{location.checkpoint}/weights.safetensors", 0, 700, 0, 0)
    assert read_card(location, (*files, checkpoint)).size == 700


def test_paths_of_windows_are_read_alike(made, tmp_path, monkeypatch) -> None:
    """Its scandir joins a name to the folder by a backslash."""
    folder = tmp_path / "adapter"
    shutil.copytree(made / "a", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    location = Location(str(folder))
    state = location.state()
    card, digests = read_card(location, state), digests_of(location, state)
    assert (card.chat, card.size) == (True, (folder / TENSORS).stat().st_size)

    names = {f.path: f.path.removeprefix(f"{folder}/").replace("/", "\\") for f in state}
    for path, name in names.items():
        shutil.copy(path, f"{folder}\\{name}")  # on other systems the name of a file
    windows = tuple(f._replace(path=f"{folder}\\{names[f.path]}") for f in state)
    for module in (cards, folders):
        monkeypatch.setattr(module, "os", SimpleNamespace(path=ntpath, sep="\\"))
    assert read_card(location, windows) == card
    assert digests_of(location, windows) == digests


@pytest.mark.parametrize("named", ["", "run="])
def test_a_followed_run_may_be_in_the_home_folder(tmp_path, monkeypatch, named) -> None:
    """No shell expands the ~ of a file of settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ServeConfig(follow=[f"{named}~/runs/run"])
    assert sources(config) == (None, {"run": f"{tmp_path}/runs/run"})


def test_a_followed_run_has_another_name_than_the_adapters(made) -> None:
    config = ServeConfig(adapters=str(made), follow=[str(made / "a")])
    with pytest.raises(ConfigurationError, match=r"have the name 'a'.*--follow NAME=.*leave out"):
        sources(config)


def test_clients_see_no_folder_of_a_relative_path(root, monkeypatch) -> None:
    monkeypatch.chdir(root.parent.parent)
    folder, _ = sources(ServeConfig(adapters=f"{root.parent.name}/{root.name}"))
    store = AdapterStore(open_base(), folder, budget=LARGE)
    tensors = root / "a" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(AdapterFileError) as raised:
        store.acquire("a")
    assert root.parent.name in str(raised.value)
    assert without_folders(str(raised.value)).startswith(f"'a/{TENSORS}'")


def test_several_revisions_need_a_choice() -> None:
    cards = [Card(base=NAME, revision="v2"), Card(base=NAME, revision="")]
    with pytest.raises(ConfigurationError, match=r"revisions of owner/model: the default one, v2"):
        _base(None, cards)
    assert _base(BaseConfig(name=NAME), cards).revision is None
