"""`lorakit convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath
from lorakit.formatting import visible


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `lorakit convert`."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT), or a loralib file."""
    output: LocalPath
    """Where to write: a folder for peft, a file for loralib."""
    to: Literal["peft", "loralib"] | None = None
    """The format to write. Default: loralib if `output` ends in .safetensors, .bin, .pt or .pth, else peft."""
    alpha: float | None = None
    """alpha of a loralib file to read, which does not store it."""
    overwrite: bool = False
    """Replace an existing output."""


CONFIGS = (ConvertConfig,)


def run(argv: Sequence[str]) -> None:
    """Read one format and write the other."""
    config = parse(
        ConvertConfig,
        "convert",
        "Convert a loralib file to a PEFT folder, or an adapter folder to a loralib file. Copies the tensors bit "
        "for bit, and the tokenizer if the folder has one.",
        argv,
        "adapter",
        "output",
    )
    from lorakit import storage
    from lorakit.adapters import formats
    from lorakit.adapters.formats.loralib import SUFFIXES
    from lorakit.analysis.saving import check_output

    to = config.to or ("loralib" if config.output.endswith(SUFFIXES) else "peft")
    if to == "loralib":
        storage.require_free_file(config.output, overwrite=config.overwrite)
    else:
        check_output(config.output, overwrite=config.overwrite)
    stored = formats.read(config.adapter, alpha=config.alpha)
    if to == "loralib":
        alpha, ranks = formats.write_loralib(stored, config.output)
        text = f"{alpha!r}".removesuffix(".0")
        notices = [
            f"loralib files store neither alpha nor rank: read this one with --alpha {text} "
            f"(loralib: r={' or '.join(map(str, ranks))}, lora_alpha={text})."
        ]
    else:
        with storage.atomic_folder(config.output, overwrite=config.overwrite) as temporary:
            formats.copy_tokenizer(config.adapter, temporary)
            notices = formats.write(stored, temporary)
    print(visible(f"{len(stored.layers)} layers written to {config.output} ({to})."))
    for notice in [*stored.notices, *notices]:
        print(visible(f"note: {notice}"))
