"""The data that a named task brings: its files below `data.root`, or its data set on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorakit import storage
from lorakit.data.readers import READERS, reader_for
from lorakit.data.sources import joined, stem
from lorakit.errors import DataError, nearest
from lorakit.tasks import DataSet, Task


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """Where a named task finds its splits."""

    task: type[Task]
    root: str | None
    """The folder of all named tasks; None reads the hub."""

    @property
    def data_set(self) -> DataSet:
        """The task's own account of it."""
        assert self.task.data_set is not None  # DataConfig makes none for a task without
        return self.task.data_set

    @property
    def folder(self) -> Path:
        """The task's folder below `root`."""
        assert self.root is not None
        return Path(self.root).expanduser() / self.data_set.folder

    @property
    def settles_labels(self) -> bool:
        """Whether the task says its classes, or needs none, so that no data is read to know them."""
        return self.task.kind != "classification" or bool(self.task.classes)

    def names(self, split: str, chosen: str | None = None) -> tuple[str, ...]:
        """Return the names that a split can have: the one that a configuration chose, or the task's."""
        return (chosen,) if chosen else self.data_set.names(split)

    def source(self, split: str, chosen: str | None = None) -> str | list[str] | None:
        """Return the file (files, where a name joins several) or the hub data set of a split; None where there is none.

        Raises:
            DataError: The task's folder is not there, holds two files for one split, or not the chosen one; or the
                hub is meant and has no such data set.
        """
        names = self.names(split, chosen)
        if not names:
            return None
        if self.root is None:
            if self.data_set.hub is None:
                raise DataError(
                    f"task {self.task.name} has no data set on the hub; set data.root to the folder that holds "
                    f"{self.data_set.folder}/{joined(names[0])[0]}.jsonl"
                )
            return self.data_set.hub
        files = self._files()
        for name in names:
            found = [self._file(files, part, split) for part in joined(name)]
            there = [str(file) for file in found if file is not None]
            if len(there) == len(found):
                return there if len(there) > 1 else there[0]
        if chosen or split == "train":
            raise DataError(self.why_not(split, chosen))
        return None

    def why_not(self, split: str, chosen: str | None = None) -> str:
        """Return the message that a split is not there, with what was looked for."""
        names = self.names(split, chosen)
        if not names:
            others = [name for name in ("validation", "test") if self.data_set.names(name)]
            return (
                f"task {self.task.name} has no {split} data with public labels; score its {' or '.join(others)} "
                f"set, or name a file with data.{split}"
            )
        files = [file.name for file in self._files()] if self.root is not None else []
        wanted = " or ".join(
            " with ".join(f"{part}.jsonl" for part in joined(name)) for name in names
        )
        return (
            f"{self.folder} has no {split} data of task {self.task.name}: looked for {wanted} (or another of "
            f"{', '.join(READERS)}; text formats also in .gz), found {', '.join(files) or 'no data file'}. Put it "
            f"there, or name a file with data.{split}"
        )

    def _file(self, files: list[Path], name: str, split: str) -> Path | None:
        found = [file for file in files if stem(file) == name]
        if len(found) > 1:
            raise DataError(
                f"{self.folder} holds {' and '.join(file.name for file in found)}, which are one split; "
                "remove one, or name the file with data." + split
            )
        return found[0] if found else None

    def _files(self) -> list[Path]:
        with storage.reading(str(self.folder), DataError):
            if self.folder.is_dir():
                return sorted(file for file in self.folder.iterdir() if reader_for(file))
            root = Path(self.root or "").expanduser()
            beside = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        wanted = f"{self.data_set.folder}/{self.data_set.train[0]}.jsonl"
        if not root.is_dir():
            raise DataError(
                f"data.root is '{self.root}', and there is no such folder. Name the folder that holds {wanted}, or "
                f"leave data.root out to read '{self.data_set.hub}' from the hub"
            )
        raise DataError(
            f"data.root is '{self.root}', and it has no folder '{self.data_set.folder}', where task "
            f"{self.task.name} looks for {wanted}. Folders in it: {', '.join(beside[:12]) or 'none'}."
            + nearest(self.data_set.folder, beside)
        )
