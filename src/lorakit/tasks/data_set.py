"""Where the rows of a named task lie: files in a folder of its own, or a data set of the hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data set of a named task.

    A split has one or several names, of which the first that there is a file of counts (`train.jsonl`,
    `train_subset.jsonl.gz`), and the first of all is the hub's. No name means that there is no such split.
    """

    folder: str
    """Sub-folder of `data.root` that holds its files."""
    hub: str | None = None
    """`owner/name` or `owner/name:config`; None where the hub has none."""
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    def names(self, split: str) -> tuple[str, ...]:
        """Return the names of a split, the first being the hub's; one that is several sets joins theirs with a plus."""
        return getattr(self, split)
