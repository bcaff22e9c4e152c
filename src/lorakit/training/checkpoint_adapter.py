"""Read a checkpoint of a training run as an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import LAYER_ATTRIBUTES
from lorakit.errors import AdapterFileError
from lorakit.file_names import ADAPTER, BEST, CONFIG, WEIGHTS
from lorakit.models.layers import ADAPTERS
from lorakit.storage.tensors import read_safetensors
from lorakit.training.checkpoint import NAME, step_of
from lorakit.training.job import TRAINED
from lorakit.training.run_folder import adapter_of_run


def is_checkpoint(path: str | Path) -> bool:
    """Return whether `path` is a checkpoint of a training run (``RUN/checkpoints/step-000100``)."""
    path = Path(path)
    return NAME.fullmatch(path.name) is not None and (path / WEIGHTS).is_file()


def saved_adapter(checkpoint: str | Path) -> Path:
    """Return the adapter folder of a checkpoint's run, which describes the checkpoint's tensors.

    Raises:
        AdapterFileError: The run has saved no adapter yet.
    """
    # Either the checkpoint may be a link, or the folder `checkpoints` of its run.
    paths = (Path(checkpoint).absolute(), Path(checkpoint).resolve())
    runs = [path.parent.parent for path in paths]
    run = next((run for run in runs if (run / CONFIG).exists()), runs[-1])
    saved = adapter_of_run(run)
    if saved is None:
        raise AdapterFileError(
            f"'{checkpoint}' contains only tensors, and the run has saved no adapter yet that describes them. The run "
            f"saves one in '{run / BEST}' after its first validation, and in '{run / ADAPTER}' at its end."
        )
    return saved


def read_checkpoint(path: str | Path) -> StoredAdapter:
    """Read a checkpoint's tensors into the adapter that its run has saved.

    Raises:
        AdapterFileError: The run has saved no adapter yet, or the checkpoint has other tensors.
    """
    path = Path(path)
    saved = saved_adapter(path)
    stored = replace(formats.read(saved), path=str(path))
    tensors = read_safetensors(path / WEIGHTS, mapped=True)
    try:
        for module, layer in stored.layers.items():
            prefix = f"{module}.{ADAPTERS}.{TRAINED}"
            if layer.is_stacked:  # the experts' module has the adapters of all its weights
                experts, _, weight = module.rpartition(".")
                prefix = f"{experts}.{ADAPTERS}.{TRAINED}.{weight}"
            fields = {
                field: tensors.pop(f"{prefix}.{name}")
                for field, name in LAYER_ATTRIBUTES.items()
                if getattr(layer, field) is not None
            }
            stored.layers[module] = replace(layer, **fields)  # type: ignore[arg-type]
        for module, own in stored.modules.items():
            prefix = f"{module}.{ADAPTERS}.{TRAINED}"
            stored.modules[module] = {name: tensors.pop(f"{prefix}.{name}") for name in own}
        # A trained copy replaces the base's parameter during training, so it has the parameter's name.
        stored.trained = {name: tensors.pop(name) for name in stored.trained}
    except KeyError as error:
        raise AdapterFileError(
            f"'{path}' has no tensor {error}, but the run's adapter '{saved}' does. Use a checkpoint of that run."
        ) from None
    if tensors:
        raise AdapterFileError(
            f"'{path}' has the tensor '{min(tensors)}', but the run's adapter '{saved}' does not. Use a checkpoint of "
            "that run."
        )
    stored.provenance = {**stored.provenance, "step": step_of(path)}
    return stored
