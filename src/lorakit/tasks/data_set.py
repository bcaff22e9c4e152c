"""The data set of a named task: files in a folder, or a hub data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data set of a named task.

    A split has one or several names. Among local files (`train.jsonl`, `train_subset.jsonl.gz`) the first name that
    exists is used; on the hub, the first name. A split without names does not exist.
    """

    folder: str
    """Sub-folder of `data.root` with its files."""
    hub: str | None = None
    """`owner/name` or `owner/name:config`; None if the hub does not have it."""
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    def names(self, split: str) -> tuple[str, ...]:
        """Return the names of a split, the hub's first. A plus in a name joins several splits."""
        return getattr(self, split)
