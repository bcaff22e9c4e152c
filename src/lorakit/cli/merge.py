"""`lorakit merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import RunFolderError
from lorakit.models.base_config import BaseConfig

SAVED = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Suffixes of the files of a model and its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What `lorakit merge` folds together."""

    adapter: str
    """Adapter folder."""
    output: str
    """Folder for the merged model; must not exist unless overwrite is set."""
    base: BaseConfig | None = None
    """The base model; by default the one that the adapter records, in the precision of its weights."""
    allow_other_base: bool = False
    """Merge into a base other than the one the adapter records, knowing what that means."""
    method: str | None = None
    """A method of your own that the adapter was trained with: path/to/file.py:Class."""
    overwrite: bool = False
    """Replace an existing output folder."""


def run(argv: Sequence[str]) -> None:
    """Merge, save, and compare what the two models say."""
    import torch
    from transformers.utils import logging

    from lorakit import storage
    from lorakit.adapters import handle_of
    from lorakit.cli.parsing import parse
    from lorakit.compute.adapted import open_adapted
    from lorakit.methods.registry import use_method

    config = parse(
        MergeConfig,
        "merge",
        "Fold an adapter into its base and save an ordinary model, which needs neither lorakit nor PEFT. "
        "Usage: lorakit merge ADAPTER OUTPUT.",
        argv,
        "adapter",
        "output",
    )
    if config.method is not None:
        use_method(config.method)
    output = storage.require_free_folder(config.output, overwrite=config.overwrite)
    _require_replaceable(output)
    base = open_adapted(config.base, config.adapter, allow_other_base=config.allow_other_base)
    _require_apart(output, config.adapter, base.source.path_or_id)
    model, tokenizer = base.model, base.tokenizer
    assert tokenizer is not None  # open_adapted refuses a base without
    handle = handle_of(model)
    assert handle is not None
    handle.require_mergeable()
    probe = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    probe = probe.to(model.device)
    if model.config.is_encoder_decoder:  # what it says depends on both sides
        probe["decoder_input_ids"] = probe["input_ids"]
    with torch.no_grad():
        before = model(**probe).logits.float()
        handle.merge(keep_base=False)
        after = model(**probe).logits.float()
    logging.disable_progress_bar()
    with storage.atomic_folder(config.output, overwrite=config.overwrite) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    difference, scale = (after - before).abs().max(), before.abs().max()
    print(f"Merged model in {config.output} ({str(model.dtype).removeprefix('torch.')}).")
    print(
        f"Largest difference of its logits from the unmerged model's: {difference:.2g} of {scale:.3g}."
    )
    print(f'Load it with: {type(model).__name__}.from_pretrained("{config.output}")')


def _require_replaceable(output: Path) -> None:
    """Refuse to overwrite what is no merged model: a folder with anything that `save_pretrained` does not write."""
    others = (
        sorted(p.name for p in output.iterdir() if p.suffix not in SAVED) if output.is_dir() else []
    )
    if others or (
        output.is_dir() and any(output.iterdir()) and not (output / "config.json").exists()
    ):
        raise RunFolderError(
            f"'{output}' is no merged model's folder, and overwriting would delete what it holds"
            f"{': ' if others else ''}{', '.join(others[:3])}. Choose another folder."
        )


def _require_apart(output: Path, *inputs: str) -> None:
    """Refuse to overwrite what is merged, or a folder around it."""
    for name in inputs:
        path = Path(name).resolve()
        if path.exists() and (path == output or output in path.parents):
            raise RunFolderError(
                f"'{output}' holds what is merged ({name}); it would be replaced. Choose another folder."
            )
