"""`lorakit merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.cli.parsing import parse
from lorakit.errors import RunFolderError
from lorakit.models.base_config import BaseConfig

SAVED = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Suffixes of the files that `save_pretrained` of a model and its tokenizer writes."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Options of `lorakit merge`."""

    adapter: str
    """Adapter folder."""
    output: str
    """Folder for the merged model. Must not exist unless overwrite is set."""
    base: BaseConfig | None = None
    """The base model; its dtype is that of the merged model. Default: the base recorded in the adapter, in dtype
    auto."""
    allow_other_base: bool = False
    """Allow a base other than the one recorded in the adapter."""
    method: str | None = None
    """Custom method of the adapter: path/to/file.py:Class."""
    overwrite: bool = False
    """Replace an existing output folder."""


CONFIGS = (MergeConfig,)


def run(argv: Sequence[str]) -> None:
    """Merge and save, and print the largest change of the logits on a probe sentence."""
    config = parse(
        MergeConfig,
        "merge",
        "Merge an adapter into its base and save an ordinary model, which needs neither lorakit nor PEFT.",
        argv,
        "adapter",
        "output",
    )
    import torch
    from transformers.utils import logging

    from lorakit import storage
    from lorakit.adapters import handle_of
    from lorakit.compute.adapted import AdapterFile, open_adapted
    from lorakit.methods.registry import use_method

    if config.method is not None:
        use_method(config.method)
    output = storage.require_free_folder(config.output, overwrite=config.overwrite)
    _require_replaceable(output)
    base = open_adapted(
        config.base, AdapterFile.read(config.adapter), allow_other_base=config.allow_other_base
    )
    _require_apart(output, config.adapter, base.source.path_or_id)
    model, tokenizer = base.model, base.tokenizer
    assert tokenizer is not None  # open_adapted rejects a base without a tokenizer
    handle = handle_of(model)
    assert handle is not None
    handle.require_mergeable()  # fail before the first forward pass
    probe = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    probe = probe.to(model.device)
    if model.config.is_encoder_decoder:  # the logits depend on both inputs
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
        f"Largest difference from the unmerged logits: {difference:.2g}; largest logit: {scale:.3g}."
    )
    print(f'Load it with: {type(model).__name__}.from_pretrained("{config.output}")')


def _require_replaceable(output: Path) -> None:
    """Reject overwriting a folder that is not a merged model's: it has other files, or no config.json."""
    if not output.is_dir():
        return
    others = sorted(p.name for p in output.iterdir() if p.suffix not in SAVED)
    if others or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise RunFolderError(
            f"'{output}' is not the folder of a merged model, and overwriting would delete its files"
            f"{': ' if others else ''}{', '.join(others[:3])}. Choose another folder."
        )


def _require_apart(output: Path, *inputs: str) -> None:
    """Reject overwriting an input of the merge, or a folder that contains one."""
    for name in inputs:
        path = Path(name).resolve()
        if path.exists() and (path == output or output in path.parents):
            raise RunFolderError(
                f"'{output}' contains an input of the merge ({name}), and overwriting would delete it. "
                "Choose another folder."
            )
