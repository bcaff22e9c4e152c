"""An adapter at rest: what every file format reads into and is written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.stored_layer import StoredLayer, check_tensor
from lorakit.errors import AdapterFileError
from lorakit.methods import Method
from lorakit.methods.combined import lora_of


@dataclass(kw_only=True)
class StoredAdapter:
    """An adapter at rest.

    Raises:
        AdapterFileError: It holds nothing, or a number that is not finite.
    """

    method: Method
    """How it was made."""
    layers: dict[str, StoredLayer] = field(default_factory=dict)
    """The adapted layers, by their path in the base model."""
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What other methods add: tensors by name, by the path of the layer they sit on."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Base parameters that were trained in full (biases, heads), by their name in the base model."""
    base: BaseRecord | None = None
    """What it was made for; None where the file does not say."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What is known of its making; JSON values."""
    notices: list[str] = field(default_factory=list)
    """What the user should know, in sentences."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Base parameters that a file carries along though they need not have been trained (PEFT does
    so for adapted embeddings, a loralib file of a whole model for all). `formats.check_targets`
    drops those that equal the model's and moves the others to `trained`."""
    peft_config: dict[str, Any] | None = None
    """adapter_config.json of the PEFT folder it was read from."""

    def __post_init__(self) -> None:
        lora = lora_of(self.method)
        if lora is not None and not self.layers:
            raise AdapterFileError("it holds no lora_A and lora_B for any layer.")
        if not self.layers and not self.modules and not self.trained:
            raise AdapterFileError("it holds no tensors.")
        for tensors in (self.trained, self.base_copies, self.module_tensors):
            for name, tensor in tensors.items():
                check_tensor(f"'{name}'", tensor)
        layout = self.base.layout if self.base is not None else None
        if layout is not None:  # the live model knows its layers better than tensors show
            self.layers = {
                path: layout.describe(path, layer) for path, layer in self.layers.items()
            }
            if lora is not None and lora.tie_head:
                self.layers = layout.with_tied_head(self.layers)

    @property
    def module_tensors(self) -> dict[str, Tensor]:
        """The tensors in `modules` by layer path and name, joined by a dot."""
        found = self.modules.items()
        return {f"{path}.{name}": t for path, own in found for name, t in own.items()}

    @property
    def parameters(self) -> int:
        """Number of trained numbers in the file."""
        factors = ("A", "B", "magnitude")
        tensors = [
            t for layer in self.layers.values() for n, t in layer.tensors.items() if n in factors
        ]
        tensors += [*self.module_tensors.values(), *self.trained.values()]
        return sum(t.numel() for t in tensors)
