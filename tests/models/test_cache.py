"""Folders in the cache are made once, and folders with other names do not wait for them."""

from __future__ import annotations

import threading
from pathlib import Path

import filelock
import pytest

from lorakit.errors import BaseModelError
from lorakit.models import cache
from lorakit.models.cache import cache_folder, cached


def test_another_folder_can_be_made_meanwhile(tmp_path: Path) -> None:
    first_began, second_ended = threading.Event(), threading.Event()

    def slowly() -> None:
        first_began.set()
        assert second_ended.wait(5)
        (tmp_path / "first").mkdir()

    thread = threading.Thread(target=cached, args=(tmp_path / "first", ["file"], slowly))
    thread.start()
    assert first_began.wait(5)
    second = threading.Thread(
        target=cached, args=(tmp_path / "second", ["file"], second_ended.set), daemon=True
    )
    second.start()
    second.join(4)
    assert second_ended.is_set()
    thread.join()
    assert (tmp_path / "first").is_dir()


def test_failures_leave_a_fixed_number_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LOCKS", 3)
    for number in range(20):
        with pytest.raises(ZeroDivisionError):
            cached(tmp_path / f"folder-{number}", ["file"], lambda: 1 / 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock-0", ".lock-1", ".lock-2"]


def test_the_home_folder_in_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.setenv("LORAKIT_CACHE", "~nobody-of-this-name/models")
    assert cache_folder() == Path("~nobody-of-this-name/models")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of filelock raise this error there."""

    def acquire(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(BaseModelError, match=r"has no locks\)\. Set LORAKIT_CACHE"):
        cached(tmp_path / "folder", ["file"], lambda: None)
