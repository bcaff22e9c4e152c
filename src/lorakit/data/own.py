"""The data of a named task: files below `data.root`, or a hub data set."""

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
    """The splits of a named task."""

    task: type[Task]
    data_set: DataSet
    """Data set that the task declares."""
    root: str | None
    """Folder of all named tasks; None reads the hub."""

    @property
    def folder(self) -> Path:
        """Return the task's folder below `root`."""
        assert self.root is not None
        return Path(self.root) / self.data_set.folder

    @property
    def settles_labels(self) -> bool:
        """Return whether the labels are known without reading data: the task declares its classes, or has none."""
        return self.task.kind != "classification" or bool(self.task.classes)

    def names(self, split: str, chosen: str | None = None) -> tuple[str, ...]:
        """Return the possible names of a split: the configured one, or those of the task."""
        return (chosen,) if chosen else self.data_set.names(split)

    def source(self, split: str, chosen: str | None = None) -> str | list[str] | None:
        """Return the file or files of a split, or its hub data set; None if the split does not exist.

        Raises:
            DataError: The task's folder is missing, has two files for one split or lacks the chosen one; or without
                `root` the task has no hub data set.
        """
        names = self.names(split, chosen)
        if not names:
            return None
        if self.root is None:
            if self.data_set.hub is None:
                raise DataError(
                    f"task {self.task.name} has no data set on the hub; set data.root to the folder that holds "
                    f"{self.data_set.folder}/{joined(names[0])[0]}.jsonl."
                )
            return self.data_set.hub
        files = self._files()
        for name in names:
            parts = [self._file(files, part, split) for part in joined(name)]
            paths = [str(file) for file in parts if file is not None]
            if len(paths) == len(parts):
                return paths if len(paths) > 1 else paths[0]
        if chosen or split == "train":
            raise DataError(self.why_not(split, chosen))
        return None

    def why_not(self, split: str, chosen: str | None = None) -> str:
        """Return the error message for a missing split, with the file names that were tried."""
        names = self.names(split, chosen)
        if not names:
            others = [name for name in ("validation", "test") if self.data_set.names(name)]
            return (
                f"task {self.task.name} has no {split} data with public labels; score its {' or '.join(others)} "
                f"set, or set data.{split} to a file."
            )
        files = [file.name for file in self._files()] if self.root is not None else []
        expected = " or ".join(
            " with ".join(f"{part}.jsonl" for part in joined(name)) for name in names
        )
        return (
            f"{self.folder} has no {split} data of task {self.task.name}: looked for {expected} (or another of "
            f"{', '.join(READERS)}; text formats also in .gz), found {', '.join(files) or 'no data file'}. Add the "
            f"file, or set data.{split} to one."
        )

    def _file(self, files: list[Path], name: str, split: str) -> Path | None:
        """Return the file called `name`, without suffixes; None if there is none."""
        matches = [file for file in files if stem(file) == name]
        if len(matches) > 1:
            raise DataError(
                f"{self.folder} has {' and '.join(file.name for file in matches)}, which are the same split; "
                f"remove one, or set data.{split} to one of them."
            )
        return matches[0] if matches else None

    def _files(self) -> list[Path]:
        """Return the data files in the task's folder."""
        with storage.reading(str(self.folder), DataError):
            if self.folder.is_dir():
                return sorted(file for file in self.folder.iterdir() if reader_for(file))
            root = Path(self.root or "")
            folders = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        expected = f"{self.data_set.folder}/{self.data_set.train[0]}.jsonl"
        if not root.is_dir():
            raise DataError(
                f"data.root is '{self.root}', but there is no such folder. Set it to the folder that holds {expected}, "
                f"or omit data.root to read '{self.data_set.hub}' from the hub."
            )
        raise DataError(
            f"data.root is '{self.root}', but it has no folder '{self.data_set.folder}', where task "
            f"{self.task.name} expects {expected}. Folders in it: {', '.join(folders[:12]) or 'none'}."
            + nearest(self.data_set.folder, folders)
        )
