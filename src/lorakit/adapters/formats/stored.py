"""The content of an adapter file, in the one form that all file formats read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.layout import BaseLayout
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.tensor_checks import check_tensor
from lorakit.configuration import setting
from lorakit.errors import AdapterFileError
from lorakit.methods import Method
from lorakit.methods.combined import lora_of


@dataclass(kw_only=True)
class StoredAdapter:
    """The content of an adapter file.

    Raises:
        AdapterFileError: It holds no tensors, or a number that is not finite.
    """

    method: Method
    """The method that trained it."""
    layers: dict[str, StoredLayer] = field(default_factory=dict, repr=False)
    """The adapted layers, by their path in the base model."""
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """The tensors of methods other than LoRA, by layer path and name."""
    trained: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Base parameters that were trained in full (biases, heads), by their name in the base model."""
    base: BaseRecord | None = None
    """The base model it was trained on; None if the file does not record it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was trained (configuration, data, scores); JSON values."""
    notices: list[str] = field(default_factory=list)
    """Sentences for the user, which are logged as warnings when it is loaded."""
    base_copies: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Base parameters in the file that training may not have changed (PEFT stores those of adapted
    embeddings). `formats.check_targets` drops those that equal the model's and moves the others to
    `trained`."""
    peft_config: dict[str, Any] | None = None
    """adapter_config.json of the PEFT folder it was read from."""
    layout: BaseLayout | None = field(default=None, repr=False)
    """Names and shapes of the live base, which writing PEFT's form needs; None for an adapter from a file."""
    path: str = "the adapter"
    """The file or folder that it was read from, for messages."""

    def __post_init__(self) -> None:
        lora = lora_of(self.method)
        if lora is not None and not self.layers:
            raise AdapterFileError("it holds no lora_A and lora_B for any layer.")
        if not self.layers and not self.modules and not self.trained:
            raise AdapterFileError("it holds no tensors.")
        for tensors in (self.trained, self.base_copies, self.module_tensors):
            for name, tensor in tensors.items():
                check_tensor(f"'{name}'", tensor)

    def copy(self) -> StoredAdapter:
        """Return a copy that can be loaded onto a model, which would complete this adapter in place.

        It shares the layers and tensors, which loading does not change.
        """
        return replace(
            self,
            layers=dict(self.layers),
            modules={path: dict(tensors) for path, tensors in self.modules.items()},
            trained=dict(self.trained),
            provenance=dict(self.provenance),
            notices=[*self.notices],
            base_copies=dict(self.base_copies),
        )

    @property
    def base_name(self) -> str | None:
        """The name of the base: that of its record, else the one in the file of PEFT."""
        if self.base is not None:
            return self.base.name
        name = (self.from_peft or {}).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def from_peft(self) -> Mapping[str, Any] | None:
        """What is recorded of the PEFT folder that it was made from, if no base is recorded; None for others."""
        recorded = self.provenance.get("peft")
        return recorded if self.base is None and isinstance(recorded, Mapping) else None

    def setting(self, *names: str) -> Any:
        """Return a setting of the run that trained it, such as ("base", "dtype"); None if it is not recorded."""
        return setting(self.provenance, ".".join(("config", *names)))

    def require_no_base_copies(self) -> None:
        """Refuse `base_copies`, which no format can write before a model has shown which of them were trained.

        Raises:
            AdapterFileError: There are some.
        """
        if self.base_copies:
            raise AdapterFileError(
                f"The file contains base weights ('{next(iter(self.base_copies))}'), and does not record whether they "
                "were trained. Load the adapter on its base with lorakit.load and save it again."
            )

    @property
    def module_tensors(self) -> dict[str, Tensor]:
        """The tensors in `modules` by layer path and name, joined by a dot."""
        modules = self.modules.items()
        return {f"{path}.{name}": t for path, tensors in modules for name, t in tensors.items()}

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters in the file: without PiSSA's start, base norms and base copies."""
        factors = [
            t
            for layer in self.layers.values()
            for t in (layer.A, layer.B, layer.B_bias, layer.magnitude)
        ]
        others = [*self.module_tensors.values(), *self.trained.values()]
        return sum(t.numel() for t in (*factors, *others) if t is not None)
