"""`lorakit convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.errors import RunFolderError


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `lorakit convert` turns into what."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's), or a loralib file."""
    output: str
    """What to write: a folder for peft, a file for loralib."""
    to: Literal["peft", "loralib"] = "peft"
    """The format to write."""
    alpha: float | None = None
    """The constant of a loralib file that is read, which does not record it."""
    overwrite: bool = False
    """Replace an existing output."""


def run(argv: Sequence[str]) -> None:
    """Read one format, write the other."""
    from lorakit import storage
    from lorakit.adapters import formats
    from lorakit.cli.parsing import parse

    config = parse(
        ConvertConfig,
        "convert",
        "Turn a loralib file into a PEFT folder, or an adapter folder into a loralib file; the tensors are "
        "taken over bit for bit. Usage: lorakit convert ADAPTER OUTPUT.",
        argv,
        "adapter",
        "output",
    )
    stored = formats.read(config.adapter, alpha=config.alpha)
    if config.to == "loralib":
        if Path(config.output).exists() and not config.overwrite:
            raise RunFolderError(f"'{config.output}' exists. Set --overwrite true to replace it.")
        formats.write_loralib(stored, config.output)
        notices = ["loralib files record neither alpha nor rank: keep them beside the file."]
    else:
        if config.overwrite:
            formats.check_replaceable(config.output)
        with storage.atomic_folder(config.output, overwrite=config.overwrite) as temporary:
            notices = formats.write(stored, temporary)
    print(f"{len(stored.layers)} layers written to {config.output} ({config.to}).")
    for notice in [*stored.notices, *notices]:
        print(f"note: {notice}")
