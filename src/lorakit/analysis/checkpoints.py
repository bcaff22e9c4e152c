"""A checkpoint of a training run, read as the adapter that it would have become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.errors import AdapterFileError
from lorakit.models.layers import ADAPTERS
from lorakit.storage.tensors import read_safetensors
from lorakit.training.checkpoint import NAME, WEIGHTS
from lorakit.training.run_folder import ADAPTER, BEST
from lorakit.training.setup import ADAPTER as ADAPTER_NAME


def is_checkpoint(path: str | Path) -> bool:
    """Whether a training run's checkpoint is at `path` (``RUN/checkpoints/step-000100``)."""
    path = Path(path)
    return NAME.fullmatch(path.name) is not None and (path / WEIGHTS).is_file()


def saved_adapter(checkpoint: str | Path) -> Path:
    """The adapter folder of a checkpoint's run, which says what the checkpoint's tensors are.

    Raises:
        AdapterFileError: The run has saved none yet.
    """
    run = Path(checkpoint).resolve().parent.parent
    saved = [run / name for name in (ADAPTER, BEST) if (run / name).is_dir()]
    if not saved:
        raise AdapterFileError(
            f"'{checkpoint}' holds tensors alone, and the run has saved no adapter yet that says what they are. It "
            f"does so in '{run / ADAPTER}' at its end, and in '{run / BEST}' once it has validated."
        )
    return saved[0]


def read_checkpoint(path: str | Path) -> StoredAdapter:
    """The adapter at a checkpoint: its tensors, in the form of the adapter that the run has saved.

    Raises:
        AdapterFileError: The run has saved none yet, or the checkpoint is of other tensors.
    """
    path = Path(path)
    saved = saved_adapter(path)
    stored = formats.read(saved)
    left = read_safetensors(path / WEIGHTS)
    try:
        for place, layer in stored.layers.items():
            start = f"{place}.{ADAPTERS}.{ADAPTER_NAME}"
            names = {"A": "lora_A", "B": "lora_B"} | {
                name: name
                for name in ("magnitude", "initial_A", "initial_B")
                if getattr(layer, name) is not None
            }
            found = {field: left.pop(f"{start}.{name}") for field, name in names.items()}
            stored.layers[place] = replace(layer, **found)  # type: ignore[arg-type]
        for name in stored.trained:
            place, _, attribute = name.rpartition(".")
            key = f"{place}.{ADAPTERS}.{ADAPTER_NAME}.trained.{attribute}"
            stored.trained[name] = left.pop(key)
    except KeyError as error:
        raise AdapterFileError(f"'{path}' has no {error}, which '{saved}' has.") from None
    if left:
        raise AdapterFileError(f"'{path}' has '{min(left)}', which '{saved}' has not.")
    stored.provenance = {**stored.provenance, "step": int(path.name.removeprefix("step-"))}
    return stored
