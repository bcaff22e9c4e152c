"""The store of adapters: identity by content, leases, the byte budget, and what is refused."""

from __future__ import annotations

import builtins
import errno
import gc
import io
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stores import (
    IDS,
    LARGE,
    LORA,
    TENSORS,
    alone,
    answer,
    open_base,
    same_tensors,
    settle,
    tensors_on_model,
    write_adapter,
)
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.adapters import formats, handle_of
from lorakit.data import DataConfig
from lorakit.errors import AdapterFileError, AdapterStateError, WrongBaseError
from lorakit.methods.method import Method
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import load_base
from lorakit.serving import folders
from lorakit.serving.errors import UnknownAdapterError
from lorakit.serving.store import AdapterStore
from lorakit.training.config import CheckpointConfig, HeldOutConfig, TrainConfig

# --- identity -----------------------------------------------------------------------------------------


def test_an_adapter_answers_as_it_does_alone(store: AdapterStore, root: Path) -> None:
    assert store.names() == ["a", "b", "c", "d"]
    for name in ("a", "b"):
        with store.acquire(name) as lease:
            torch.testing.assert_close(answer(store, lease), alone(root / name))
            assert lease.receipt.adapters == ((name, store.describe(name)["digest"], 1.0),)
    with store.acquire(None) as lease:
        assert lease.blend == ()
        assert lease.receipt.adapters == ()
        torch.testing.assert_close(answer(store, lease), open_base().model(IDS).logits)


def test_equal_content_is_loaded_once(store: AdapterStore, root: Path) -> None:
    shutil.copytree(root / "a", root / "copy")
    one, other = store.acquire("a"), store.acquire("copy")
    assert one.blend == other.blend
    assert (store.stats().loads, store.stats().loaded) == (1, 1)
    assert [name for name, *_ in other.receipt.adapters] == ["copy"]
    with store.acquire({"a": 0.25, "copy": 0.5}) as both:  # one adapter with both weights
        assert both.blend == ((one.blend[0][0], 0.75),)


def test_reload_under_the_old_name_gives_the_new_content_and_old_leases_keep_the_old(
    store: AdapterStore, root: Path
) -> None:
    old = store.acquire("a")
    before = answer(store, old)
    write_adapter(root / "a", seed=9)
    new = store.acquire("a")
    assert new.blend != old.blend
    assert new.receipt.fingerprint != old.receipt.fingerprint
    torch.testing.assert_close(answer(store, old), before)
    torch.testing.assert_close(answer(store, new), alone(root / "a"))
    old.release()
    settle(store)
    assert store.handle.names == (new.blend[0][0],)


def test_a_replaced_folder_has_no_digest_until_it_is_read(store: AdapterStore, root: Path) -> None:
    """The list must not show the facts of the new content with the digest of the old."""

    def described() -> tuple[Any, ...]:
        return tuple(store.describe("a")[fact] for fact in ("rank", "digest", "loaded"))

    def serve() -> str:
        with store.acquire("a") as lease:
            return lease.receipt.adapters[0][1]

    assert described() == (2, None, False)
    digest = serve()
    assert described() == (2, digest, True)
    write_adapter(root / "a", method=lorakit.LoRA(rank=3, alpha=4, targets="attention.qv"))
    assert described() == (3, None, False)
    digest = serve()
    assert described() == (3, digest, True)


def test_a_name_outlives_a_folder_that_is_replaced_in_two_steps(root: Path) -> None:
    """`mv v1 old; mv new v1`, with requests in between."""
    store = AdapterStore(open_base(), root, budget=LARGE, pinned=["b"])
    pinned = store.handle.names
    store.add("alias", "a")
    for name in "ab":
        (root / name).rename(root / f"{name}-old")
    for name in ("alias", "a", "b"):
        with pytest.raises(UnknownAdapterError):
            store.acquire(name)
    assert store.names() == ["a-old", "b-old", "c", "d"]
    settle(store)
    assert set(pinned) < set(store.handle.names)
    shutil.copytree(root / "c", root / "a")
    shutil.copytree(root / "d", root / "b")
    assert store.are_pinned(["b"])
    for name, folder in (("alias", "c"), ("a", "c"), ("b", "d")):
        with store.acquire(name) as lease:
            torch.testing.assert_close(answer(store, lease), alone(root / folder))
    settle(store)
    assert set(store.handle.names).isdisjoint(pinned)


def test_a_name_whose_files_are_gone_is_free(store: AdapterStore, root: Path) -> None:
    for name in ("one", "two", "three"):
        store.add(name, "a")
    shutil.rmtree(root / "a")
    store.add("one", "b")
    shutil.copytree(root / "b", root / "two")
    for name in ("one", "two"):
        with store.acquire(name) as lease:
            torch.testing.assert_close(answer(store, lease), alone(root / "b"))
    assert store.stats().loaded == 2
    with pytest.raises(UnknownAdapterError):
        store.remove("three")
    settle(store)
    assert store.stats().loaded == 1
    shutil.copytree(root / "c", root / "a")
    with pytest.raises(UnknownAdapterError):
        store.acquire("three")


def test_content_changed_in_place_is_seen_although_size_and_time_are_equal(
    store: AdapterStore, root: Path
) -> None:
    file = root / "a" / "adapter_model.safetensors"
    store.acquire("a").release()
    seen = file.stat()
    for name in ("adapter_model.safetensors", "lorakit.json"):
        content = (root / "b" / name).read_bytes()
        (root / "a" / name).write_bytes(content)  # the same inode
        os.utime(root / "a" / name, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_size) == (seen.st_ino, seen.st_size)
    with store.acquire("a") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "b"))


def test_no_file_is_opened_for_an_adapter_that_is_loaded(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.acquire("a").release()
    opened: list[Any] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (opened.append(args), original(*args, **kwargs))[1]

    for owner in (builtins, io, os):
        monkeypatch.setattr(owner, "open", counting(owner.open))
    store.acquire("a").release()
    assert opened == []
    store.acquire("b").release()
    assert opened != []


def test_files_that_change_while_they_are_read_are_read_again(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, reads = folders.Location.read, []

    def read_and_replace(self: folders.Location) -> Any:
        stored = original(self)
        reads.append(self)
        if len(reads) == 1:
            shutil.rmtree(root / "a")
            shutil.copytree(root / "b", root / "a")
        return stored

    monkeypatch.setattr(folders.Location, "read", read_and_replace)
    with store.acquire("a") as lease:
        assert len(reads) == 2
        torch.testing.assert_close(answer(store, lease), alone(root / "b"))


def test_files_that_change_all_the_time_are_refused(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = folders.Location.read

    def read_and_touch(self: folders.Location) -> Any:
        os.utime(root / "a" / "lorakit.json")
        return original(self)

    monkeypatch.setattr(folders.Location, "read", read_and_touch)
    with pytest.raises(AdapterFileError, match="changed each time it was read"):
        store.acquire("a")
    assert store.handle.names == ()


# --- names and paths ----------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones_with_the_nearest(
    store: AdapterStore, root: Path
) -> None:
    (root / "a").rename(root / "weather")
    with pytest.raises(UnknownAdapterError, match=r"'wether'.*b, c, d, weather.*mean 'weather'"):
        store.acquire("wether")
    with pytest.raises(UnknownAdapterError):
        store.acquire({"b": 0.5, "none": 0.5})
    assert store.stats().leases == 0
    assert "a" not in store.names()


@pytest.mark.parametrize("name", ["../root/a", "a/", "/", "..", ".", ".hidden", "", "a\0", "\\a"])
def test_a_name_is_not_a_path(store: AdapterStore, name: str) -> None:
    with pytest.raises(UnknownAdapterError):
        store.acquire(name)


def test_another_spelling_of_a_folder_is_another_name(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and macOS open "a" by "A" too; unloading "a" would leave that one."""
    is_adapter, upper, lower = formats.is_adapter, str(root / "A"), str(root / "a")
    monkeypatch.setattr(
        formats, "is_adapter", lambda folder: is_adapter(folder.replace(upper, lower))
    )
    with pytest.raises(UnknownAdapterError):
        store.acquire("A")
    store.acquire("a").release()
    store.remove("a")
    for name in ("a", "A"):
        with pytest.raises(UnknownAdapterError):
            store.acquire(name)
    assert store.names() == ["b", "c", "d"]


ODD_NAMES = [b"a\nb", b" a", b"a ", b"\xff", "\u202ea".encode(), b"a" * 201]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_with_an_unprintable_name_is_not_offered(
    store: AdapterStore, root: Path, name: bytes
) -> None:
    shutil.copytree(root / "a", os.fsdecode(os.fsencode(root) + b"/" + name))
    assert store.names() == ["a", "b", "c", "d"]
    with pytest.raises(UnknownAdapterError):
        store.acquire(os.fsdecode(name))


def test_a_loop_of_links_leaves_the_list_whole(store: AdapterStore, root: Path) -> None:
    (root / "loop").symlink_to("loop")
    assert store.names() == ["a", "b", "c", "d"]


def test_a_file_that_cannot_fit_is_refused_unread(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes costs its writer nothing, and the server minutes."""
    monkeypatch.setattr("lorakit.storage.sha256", lambda *_: pytest.fail("was read"))
    with (root / "a" / TENSORS).open("ab") as file:
        file.truncate(5 * LARGE)
    with pytest.raises(AdapterFileError, match="is 5 GB, and more than 4 GB"):
        store.acquire("a")


def test_paths_outside_the_root_are_refused(
    store: AdapterStore, root: Path, tmp_path: Path
) -> None:
    outside = shutil.copytree(root / "a", tmp_path / "outside")
    for path in ("../outside", str(outside), "a/../../outside", "..", ".", "", "a\0"):
        with pytest.raises(AdapterFileError, match="outside the folder of adapters"):
            store.add("x", path)
    (root / "link").symlink_to(outside)
    (root / "b" / "adapter_model.safetensors").unlink()
    (root / "b" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    assert "link" not in store.names()
    for name in ("link", "b"):
        with pytest.raises(AdapterFileError, match="leads outside"):
            store.acquire(name)
    with pytest.raises(AdapterFileError, match="outside the folder"):
        store.add("x", "link")
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        store.add("x", "missing")
    assert store.handle.names == ()
    with pytest.raises(AdapterFileError, match="no folder of adapters"):
        AdapterStore(open_base(), None, budget=LARGE).add("x", str(root / "a"))


def test_the_adapter_of_a_run_folder_has_the_name_of_the_run(
    store: AdapterStore, root: Path
) -> None:
    (root / "run").mkdir()
    shutil.copytree(root / "a", root / "run" / "adapter")
    assert "run" in store.names()
    assert store.acquire("run").blend == store.acquire("a").blend


def test_add_and_replace(store: AdapterStore, root: Path) -> None:
    (root / "deep").mkdir()
    shutil.copytree(root / "b", root / "deep" / "er")
    store.add("x/y", "deep/er")
    assert store.names() == ["a", "b", "c", "d", "x/y"]
    old = store.acquire("x/y")
    with pytest.raises(AdapterStateError, match="'x/y' already"):
        store.add("x/y", "a")
    with pytest.raises(AdapterStateError, match="'a' already"):
        store.add("a", "b")
    store.add("x/y", "a", replace=True)
    assert store.acquire("x/y").blend == store.acquire("a").blend != old.blend
    for name in ("", " x", "a\n", "x" * 201):
        with pytest.raises(AdapterStateError, match="cannot name an adapter"):
            store.add(name, "a")


def test_a_replacement_that_is_damaged_leaves_the_old_adapter(
    store: AdapterStore, root: Path
) -> None:
    store.add("x", "a")
    file = root / "b" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterFileError):
        store.add("x", "b", replace=True)
    with store.acquire("x") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "a"))


def test_a_removed_name_is_unknown_at_once_and_its_memory_is_freed(
    store: AdapterStore, root: Path
) -> None:
    lease = store.acquire("a")
    module = next(iter(store.handle.modules(lease.blend[0][0]).values()))
    tensor, expected = weakref.ref(module.lora_A), alone(root / "a")
    del module
    store.remove("a")
    for _ in range(2):
        with pytest.raises(UnknownAdapterError):
            store.acquire("a")
    with pytest.raises(UnknownAdapterError):
        store.remove("a")
    assert "a" not in store.names()
    torch.testing.assert_close(answer(store, lease), expected)  # the request in flight goes on
    lease.release()
    lease.release()
    settle(store)
    gc.collect()
    assert tensor() is None
    assert (store.stats().loaded, store.stats().bytes, store.handle.names) == (0, 0, ())
    store.add("a", "a")
    with store.acquire("a") as lease:
        torch.testing.assert_close(answer(store, lease), expected)


def test_a_folder_that_gets_the_name_of_an_unloaded_adapter_is_served(
    store: AdapterStore, root: Path
) -> None:
    (root / "staging").mkdir()
    shutil.copytree(root / "a", root / "staging/new")
    store.add("new", "staging/new")
    store.remove("new")
    with pytest.raises(UnknownAdapterError):
        store.acquire("new")
    (root / "staging/new").rename(root / "new")
    assert "new" in store.names()
    with store.acquire("new") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "a"))
    store.add("b", "new", replace=True)
    store.remove("b")  # of another folder, but its own would be served in its place
    assert "b" not in store.names()


def test_a_new_folder_of_an_unloaded_name_is_served(store: AdapterStore, root: Path) -> None:
    expected = alone(root / "a")
    store.remove("b")
    for change in (lambda: (root / "b" / TENSORS).chmod(0o600), lambda: shutil.rmtree(root / "b")):
        change()
        assert "b" not in store.names()
        with pytest.raises(UnknownAdapterError):
            store.acquire("b")
    shutil.copytree(root / "a", root / "b")
    assert "b" in store.names()
    with store.acquire("b") as lease:
        torch.testing.assert_close(answer(store, lease), expected)
    store.remove("b")
    assert "b" not in store.names()


def test_an_adapter_whose_folder_cannot_be_read_is_unloaded(
    store: AdapterStore, root: Path
) -> None:
    """One of its files is a link into a cache that was pruned."""
    store.acquire("b").release()
    (root / "b" / "tokenizer.json").symlink_to(root / "missing")
    store.remove("b")
    settle(store)
    assert "b" not in store.names()
    assert store.handle.names == ()
    with pytest.raises(UnknownAdapterError):
        store.acquire("b")
    store.add("b", "a")
    with store.acquire("b") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "a"))


def test_unloading_after_traffic_returns(store: AdapterStore) -> None:
    for _ in range(20):
        for name in "abcd":
            store.acquire(name).release()
    waiting = threading.Thread(target=lambda: [store.remove(name) for name in "abcd"], daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    settle(store)
    assert store.stats().bytes == 0


def test_the_handle_stays_when_the_last_adapter_is_removed(store: AdapterStore, root: Path) -> None:
    assert handle_of(store.base.model) is store.handle
    store.acquire("a").release()
    store.remove("a")
    settle(store)
    assert handle_of(store.base.model) is store.handle
    assert not any(p.requires_grad for p in store.base.model.parameters())
    with store.acquire("b") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "b"))


# --- what is refused ----------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_and_the_next_good_content_accepted(
    store: AdapterStore, root: Path
) -> None:
    file = root / "a" / "adapter_model.safetensors"
    content = file.read_bytes()
    store.acquire("a").release()
    file.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(AdapterFileError, match=r"has changed|truncated"):
            store.acquire("a")
    settle(store)
    assert store.stats().loaded == 0  # the old content is not served either
    assert store.describe("a")["digest"] is None
    file.write_bytes(content)
    with store.acquire("a") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "a"))


@pytest.mark.parametrize(
    "short",
    [MemoryError(), OSError(errno.EMFILE, os.strerror(errno.EMFILE))],
    ids=["memory", "files"],
)
def test_an_adapter_is_read_again_after_the_system_lacked_something(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, short: Exception
) -> None:
    def fail(content: bytes) -> None:
        raise short

    with monkeypatch.context() as full:
        full.setattr("lorakit.storage.tensors.load", fail)
        with pytest.raises((MemoryError, AdapterFileError)):
            store.acquire("a")
    store.acquire("a").release()


def test_an_adapter_that_matches_no_module_is_refused(root: Path, tmp_path: Path) -> None:
    base = open_base("gpt2")
    store = AdapterStore(base, root, budget=LARGE, allow_other_base=True)
    with pytest.raises(AdapterFileError, match="layers that the model does not have"):
        store.acquire("a")
    with pytest.raises(WrongBaseError):
        AdapterStore(open_base(seed=1), root, budget=LARGE).acquire("a")
    other = AdapterStore(open_base(seed=1), root, budget=LARGE, allow_other_base=True)
    other.acquire("a").release()


def test_a_refused_adapter_leaves_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is remembered: neither the tensors nor the first request may stay with it."""
    tensors: list[weakref.ref[torch.Tensor]] = []

    def refuse(model: Any, stored: Any, **_: Any) -> None:
        tensors.append(weakref.ref(next(iter(stored.layers.values())).A))
        raise WrongBaseError(f"'{stored.path}' was trained on another base.")

    monkeypatch.setattr("lorakit.serving.preparing.check_base", refuse)
    store = AdapterStore(open_base(), root, budget=LARGE)
    for _ in range(2):
        with pytest.raises(WrongBaseError, match="another base"):
            store.acquire("a")
    gc.collect()
    assert [tensor() for tensor in tensors] == [None]  # read once


CONVOLUTION = lorakit.LoRA(rank=1, alpha=1, targets=("conv.conv",))


@pytest.mark.parametrize(
    ("arch", "method", "reason"),
    [
        ("llama", lorakit.PrefixEmbedding(prefix_length=2), "has virtual tokens"),
        ("llama", lorakit.PrefixLayer(prefix_length=2), "has virtual tokens"),
        (
            "llama",
            lorakit.Combined(methods=(LORA, lorakit.PrefixEmbedding(prefix_length=2))),
            "has virtual tokens",
        ),
        ("deberta-v2", CONVOLUTION, "cannot be used in a batch"),
    ],
)
def test_an_adapter_that_mixes_tokens_is_refused_before_its_first_pass(
    arch: str, method: Method, reason: str, tmp_path: Path
) -> None:
    base = open_base(arch)
    write_adapter(tmp_path / "root" / "x", method=method, base=base)
    store = AdapterStore(base, tmp_path / "root", budget=LARGE)
    with pytest.raises(AdapterStateError, match=reason):
        store.acquire("x")
    assert store.handle.names == ()


@pytest.mark.parametrize(
    "method",
    [
        lorakit.LoRA(rank=2, alpha=4, targets="all-linear", bias="none"),
        lorakit.LoRA(rank=2, alpha=4, targets="attention.qv", dora=True),
        lorakit.LoRA(rank=2, alpha=4, targets=("embedding", "attention.q")),
        lorakit.LoRA(rank=2, alpha=4, targets="attention.q", train_modules=("norm",)),
        lorakit.BottleneckAdapter(size=4, kind="houlsby"),
    ],
    ids=str,
)
def test_what_the_store_accepts_a_pass_by_token_computes(method: Method, tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "x", method=method)
    store = AdapterStore(open_base(), tmp_path / "root", budget=LARGE)
    with store.acquire("x") as lease:
        torch.testing.assert_close(answer(store, lease), alone(tmp_path / "root" / "x"))


def test_blends(store: AdapterStore, root: Path, tmp_path: Path) -> None:
    with store.acquire({"a": 0.5, "b": -2}) as lease:
        assert [weight for _, weight in lease.blend] == [0.5, -2.0]
        assert [(n, w) for n, _, w in lease.receipt.adapters] == [("a", 0.5), ("b", -2.0)]
    for choice in ({"a": float("nan")}, 3, {"a": None}):
        with pytest.raises(AdapterStateError):
            store.acquire(choice)  # type: ignore[arg-type]
    write_adapter(
        root / "dora", method=lorakit.LoRA(rank=2, alpha=4, targets="attention.q", dora=True)
    )
    with pytest.raises(AdapterStateError, match="linear in a weight"):
        store.acquire({"dora": 0.5, "a": 0.5})
    assert store.stats().leases == 0
    store.acquire({"dora": 1.0}).release()


# --- tokenizers ---------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_folders_own(store: AdapterStore, root: Path) -> None:
    own = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")
    write_adapter(root / "own", seed=1, tokenizer=own)
    write_adapter(root / "again", seed=2, tokenizer=own)
    write_adapter(root / "same", seed=3, tokenizer=tiny_tokenizer())
    leases = {name: store.acquire(name) for name in ("own", "again", "same", "a")}
    assert leases["own"].tokenizer.chat_template == own.chat_template
    assert leases["again"].tokenizer is leases["own"].tokenizer  # read once
    assert leases["same"].tokenizer is leases["a"].tokenizer is store.base.tokenizer
    with pytest.raises(AdapterStateError, match="different tokenizers"):
        store.acquire({"own": 0.5, "a": 0.5})
    store.acquire({"own": 0.5, "again": 0.5}).release()
    store.acquire({"same": 0.5, "a": 0.5}).release()


def test_a_tokenizer_that_needs_code_is_refused(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask whether to run it. The error is remembered, so the folder is not read again."""
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (root / "a/tokenizer_config.json").write_text(json.dumps(config))
    (root / "a/own.py").write_text("raise SystemExit")
    for _ in range(2):
        with pytest.raises(AdapterFileError, match="needs Python code of its own"):
            store.acquire("a")
        monkeypatch.setattr("lorakit.serving.store.tokenizer_in", lambda _: pytest.fail("read"))
    store.acquire("b").release()


def test_a_lack_of_file_handles_is_not_remembered(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library tokenizers raises a plain exception."""

    def fail(*_: Any, **__: Any) -> None:
        raise Exception("Too many open files (os error 24)")

    write_adapter(root / "own", tokenizer=tiny_tokenizer(chat_template="{{ messages }}"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(OSError, match="os error 24"):
        store.acquire("own")
    monkeypatch.undo()
    store.acquire("own").release()


@pytest.mark.parametrize("base_has_one", [False, True])
def test_an_adapter_answers_chats_if_its_tokenizer_has_a_template(
    root: Path, base_has_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description opens no tokenizer, and agrees with the one that a lease has."""
    base = open_base()
    assert base.tokenizer is not None
    base.tokenizer.chat_template = "{{ messages }}" if base_has_one else None
    with_one = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")
    without = tiny_tokenizer()
    without.chat_template = None
    write_adapter(root / "own", seed=1, tokenizer=with_one)
    write_adapter(root / "none", seed=2, tokenizer=without)
    write_adapter(root / "recorded", seed=3, tokenizer=without)
    (root / "recorded/lorakit.json").unlink()  # it has checksums
    config = root / "recorded/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ 1 }}"}))
    write_adapter(root / "damaged", seed=4, tokenizer=without)
    (root / "damaged/tokenizer_config.json").write_text("{")
    store = AdapterStore(base, root, budget=LARGE)
    monkeypatch.setattr("lorakit.serving.store.tokenizer_in", lambda _: pytest.fail("read"))
    described = {name: store.describe(name) for name in store.names()}
    monkeypatch.undo()
    assert store.describe_base()["chat"] is base_has_one
    assert described["damaged"]["chat"] is None
    assert "tokenizer_config.json" in described["damaged"]["error"]
    chats = {name: described[name]["chat"] for name in ("a", "own", "none", "recorded")}
    assert chats == {"a": base_has_one, "own": True, "none": False, "recorded": True}
    for name, chat in chats.items():
        with store.acquire(name) as lease:
            assert bool(lease.tokenizer.chat_template) == chat


# --- classification -----------------------------------------------------------------------------------

LABELS = {"two": ("no", "yes"), "three": ("a", "b", "c"), "four": ("n", "e", "s", "w")}


@pytest.mark.parametrize("arch", ["llama", "roberta", "deberta-v2", "bert", "gpt2"])
def test_heads_of_different_sizes_share_a_batch(arch: str, tmp_path: Path) -> None:
    """Adapters with 2, 3 and 4 labels in one batch give the logits that each gives alone."""
    head = "sequence-classification"
    modules = {"llama": "score", "gpt2": "score"}.get(arch, "classifier")
    batch = {"input_ids": torch.randint(3, 90, (3, 5)), "attention_mask": torch.ones(3, 5).long()}
    weights = open_base(arch, head, num_labels=4).model.state_dict()
    expected = {}
    for i, (name, labels) in enumerate(LABELS.items()):
        base = open_base(arch, head, num_labels=len(labels))
        own = base.model.state_dict()
        shared = {key: t for key, t in weights.items() if t.shape == own[key].shape}
        base.model.load_state_dict({**own, **shared})
        # DeBERTa's q and k also see positions, which belong to no row.
        method = lorakit.LoRA(rank=2, alpha=4, targets="attention.v", train_modules=modules)
        provenance = {"labels": list(labels), "task": "classification"}
        write_adapter(tmp_path / name, method=method, base=base, seed=i, provenance=provenance)
        lorakit.load(base.model, tmp_path / name, name="x")
        with torch.no_grad():
            expected[name] = base.model(**batch).logits[i]
    base = open_base(arch, head, num_labels=4)
    store = AdapterStore(base, tmp_path, budget=LARGE)
    leases = [store.acquire(name) for name in LABELS]
    assert [lease.labels for lease in leases] == list(LABELS.values())
    assert [lease.outputs for lease in leases] == [2, 3, 4]
    with torch.no_grad(), store.handle.per_sample([dict(lease.blend) for lease in leases]):
        logits = base.model(**batch).logits
    for i, (name, labels) in enumerate(LABELS.items()):
        torch.testing.assert_close(logits[i, : len(labels)], expected[name])
        assert not logits[i, len(labels) :].any()
    with pytest.raises(AdapterStateError, match="not linear in a weight"):
        store.acquire({"two": 0.5, "three": 0.5})


def test_a_head_with_more_labels_than_the_base_is_refused(tmp_path: Path) -> None:
    head = "sequence-classification"
    method = lorakit.LoRA(rank=2, alpha=4, targets="attention.q", train_modules="score")
    write_adapter(tmp_path / "x", method=method, base=open_base("llama", head, num_labels=5))
    with pytest.raises(AdapterFileError, match=r"has 5 labels.*--num_labels 5"):
        AdapterStore(open_base("llama", head, num_labels=4), tmp_path, budget=LARGE).acquire("x")


def test_a_blend_of_different_labels_is_the_clients_mistake(tmp_path: Path) -> None:
    base = open_base("llama", "sequence-classification", num_labels=2)
    for name, labels in (("one", ["no", "yes"]), ("other", ["bad", "good"])):
        write_adapter(tmp_path / name, base=base, provenance={"labels": labels})
    store = AdapterStore(base, tmp_path, budget=LARGE)
    with pytest.raises(AdapterStateError, match="predict different labels"):
        store.acquire({"one": 0.5, "other": 0.5})


def test_a_random_head_is_never_used(root: Path) -> None:
    base = open_base("llama", "sequence-classification", new_weights=["score.weight"])
    store = AdapterStore(base, root, budget=LARGE, allow_other_base=True)
    with pytest.raises(AdapterStateError, match="no trained 'score"):
        store.acquire(None)
    with pytest.raises(AdapterFileError, match="no tensors for 'score"):
        store.acquire("a")


# --- training runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_followed_while_it_trains(root: Path, tmp_path: Path) -> None:
    """The newest checkpoint, then the finished adapter."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"river {i}:", "completion": " pub"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = tmp_path / "base"
    base = open_base()
    base.model.save_pretrained(source)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(source)
    run = tmp_path / "run"

    def train(steps: int) -> None:
        lorakit.train(
            TrainConfig(
                base=BaseConfig(name=str(source), dtype="float32"),
                data=DataConfig(train=str(data), validation=str(data), task="completion"),
                method="lora",
                lora=LORA,
                output=str(run),
                batch_size=2,
                max_steps=steps,
                evaluation=HeldOutConfig(every=1),
                checkpoints=CheckpointConfig(every=2),
                resume=True,
            )
        )

    followed = {"live": str(run)}
    store = AdapterStore(load_base(source, dtype="float32"), root, budget=LARGE, followed=followed)
    assert "live" in store.names()
    with pytest.raises(AdapterFileError, match="has saved no adapter yet"):
        store.acquire("live")
    train(2)
    final = store.acquire("live")
    assert store.describe("live")["step"] == 2
    assert same_tensors(tensors_on_model(store, final), load_file(run / "adapter" / TENSORS))
    (run / "result.json").unlink()  # as while it trains
    newest = store.acquire("live")
    assert newest.receipt.adapters != final.receipt.adapters
    assert store.describe("live")["path"].endswith("step-000002")
    assert same_tensors(tensors_on_model(store, newest), tensors_on_model(store, final))
    (run / "checkpoints").rename(tmp_path / "larger disk")
    (run / "checkpoints").symlink_to(tmp_path / "larger disk")
    later = AdapterStore(load_base(source, dtype="float32"), root, budget=LARGE, followed=followed)
    with later.acquire("live") as linked:
        assert same_tensors(tensors_on_model(later, linked), tensors_on_model(store, final))
    train(4)
    with store.acquire("live") as lease:
        assert store.describe("live")["step"] == 4
        assert same_tensors(tensors_on_model(store, lease), load_file(run / "adapter" / TENSORS))
        assert not same_tensors(tensors_on_model(store, lease), tensors_on_model(store, newest))


def test_a_followed_run_cannot_have_the_name_of_an_adapter(root: Path) -> None:
    with pytest.raises(AdapterStateError, match="'a' already"):
        AdapterStore(open_base(), root, budget=LARGE, followed={"a": str(root / "b")})
