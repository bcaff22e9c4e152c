"""`lorakit convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
        "taken over bit for bit, and a tokenizer beside them comes along. Usage: lorakit convert ADAPTER OUTPUT.",
        argv,
        "adapter",
        "output",
    )
    if config.to == "loralib":
        storage.require_free_file(config.output, overwrite=config.overwrite)
    else:
        storage.require_free_folder(config.output, overwrite=config.overwrite)
        formats.check_replaceable(config.output)
    stored = formats.read(config.adapter, alpha=config.alpha)
    if config.to == "loralib":
        formats.write_loralib(stored, config.output)
        notices = ["loralib files record neither alpha nor rank: keep them beside the file."]
    else:
        with storage.atomic_folder(config.output, overwrite=config.overwrite) as temporary:
            formats.copy_tokenizer(config.adapter, temporary)
            notices = formats.write(stored, temporary)
    print(f"{len(stored.layers)} layers written to {config.output} ({config.to}).")
    for notice in [*stored.notices, *notices]:
        print(f"note: {notice}")
