"""The handle on a model's adapters: activate, merge, save, detach."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters import export, merging, saving
from lorakit.adapters.activation import Activation, Active
from lorakit.adapters.formats.fingerprint import BaseRecord, base_record
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import (
    InstalledAdapter,
    adapted_layers,
    backbone_of,
    base_parameters,
    install,
)
from lorakit.adapters.layer_adapters import (
    LayerAdapters,
    remove_adapter,
    remove_hooks,
    remove_idle_hooks,
)
from lorakit.adapters.summary import Summary, summarise
from lorakit.errors import AdapterStateError, ConfigurationError, nearest
from lorakit.methods.method import Method
from lorakit.methods.module import AdapterModule
from lorakit.methods.virtual_tokens import VirtualTokens
from lorakit.models.quantised import require_exact_layers

Choice = str | Mapping[str, float] | None
"""One adapter, several by weight, or none."""

_HANDLE = "_lorakit_adapters"


class Adapters:
    """All adapters of one model, by name. Obtained from `attach` or `load`, one for each model.

    The base stays what it was: the types of its modules, its keys and, under ``activate(None)``, what it
    computes. Adapter tensors are children of the layers they adapt (`<layer>.adapters.<name>`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._activation = Activation()
        self._installed: dict[str, InstalledAdapter] = {}
        self._merged: Active | None = None
        self._requires_grad = {name: p.requires_grad for name, p in base_parameters(model)}

    # --- reading -----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's adapters, in the order they came."""
        return tuple(self._installed)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights."""
        return dict(self._activation.active.weights)

    @property
    def merged(self) -> dict[str, float]:
        """The merged adapters and their weights; empty when nothing is merged."""
        return dict(self._merged.weights) if self._merged else {}

    def method(self, name: str | None = None) -> Method:
        """The settings that an adapter was made with."""
        return self._get(name).method

    def provenance(self, name: str | None = None) -> dict[str, Any]:
        """What an adapter's file says about its making; empty for one that was attached here."""
        return self._get(name).provenance

    def modules(self, name: str | None = None) -> dict[str, AdapterModule]:
        """An adapter's modules by the path of the layer they sit on."""
        return dict(self._get(name).modules)

    def summary(self, name: str | None = None) -> Summary:
        """Trainable and total parameters, layer by layer, and the size of the file."""
        return summarise(self.model, self._get(name))

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that each sequence takes under what is active: for most methods none."""
        for name in self.active:
            tokens = getattr(self._installed[name].method, "virtual_tokens", None)
            if tokens is not None:
                return tokens
        return VirtualTokens()

    def trainable_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The adapter's tensors that require a gradient, each once: what an optimizer needs."""
        return [p for p in self._get(name).parameters() if p.requires_grad]

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self.names)}; active: {self.active or 'none'})"

    # --- choosing ------------------------------------------------------------------------------------

    def activate(self, choice: Choice) -> None:
        """Let one adapter act, several by weight, or none (the base as it was).

        Args:
            choice: A name, ``{name: weight}`` (each delta is scaled by its weight), or None.

        Raises:
            AdapterStateError: A name is unknown, an adapter is merged, or one whose effect is not linear
                in a weight (DoRA, trained biases or modules) is mixed or weighted.
        """
        self._refuse_merged("activate another adapter")
        self._set(self._resolve(choice))

    @contextlib.contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[None]:
        """Run one batch with an adapter of its own for each row.

        Args:
            names: One adapter name, or None for the bare base, for each row of the batch.

        Raises:
            AdapterStateError: A name is unknown, or an adapter is merged.
        """
        self._refuse_merged("choose adapters by row")
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise AdapterStateError(
                f"per_sample takes one name (or None) for each row of the batch, not {names!r}."
            )
        for name in names:
            if name is not None:
                self._get(name)
        before = self._activation.active
        self._set(Active(rows=tuple(names)))
        try:
            yield
        finally:
            self._set(before)

    # --- merging ---------------------------------------------------------------------------------------

    def merge(self, choice: Choice = None, *, keep_base: bool = True) -> None:
        """Fold adapters into the weights: ``W + scaling * B A`` in float32, rounded once to W's dtype.

        Where W is quantised it is ``W_q`` that is added to, and the sum is not quantised anew.

        The merged weights are new tensors that take the base's place; the base's are kept, and `unmerge`
        puts them back bit for bit. Nothing is ever subtracted.

        Args:
            choice: What to merge, as for `activate`; None merges what is active.
            keep_base: False drops the base weights and all adapters: the model is then a plain merged
                model, for export, and this handle is at its end. Of a quantised base the other layers are
                expanded too, so that nothing of the model is quantised any more.

        Raises:
            AdapterStateError: Nothing is active, something is merged already, or an adapter cannot be merged.
        """
        self._refuse_merged("merge")
        active = self._activation.active if choice is None else self._resolve(choice)
        if not active.weights:
            raise AdapterStateError(
                f"No adapter is active, so there is nothing to merge. Name one: {self._known()}."
            )
        before = self._activation.active
        self._set(Active())
        try:
            self._swap_trained(active)
            merging.merge(self.model, active)
        except BaseException:
            self._swap_trained(Active())
            self._set(before)
            raise
        self._merged = active
        if not keep_base:
            merging.forget_base(self.model)
            self._merged = None
            self._remove_all()

    def require_mergeable(self) -> None:
        """Raise an AdapterStateError where what is active cannot be merged: its effect is no change of weights."""
        merging.require_mergeable(self.model, self._activation.active)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit, and let the merged adapters act unmerged.

        Raises:
            AdapterStateError: Nothing is merged.
        """
        if self._merged is None:
            raise AdapterStateError("No adapter is merged, so there is nothing to unmerge.")
        active, self._merged = self._merged, None
        merging.unmerge(self.model)
        self._set(active)

    # --- leaving ---------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Take one adapter off the model; the last one leaves the model as `detach` does."""
        self._refuse_merged("remove an adapter")
        adapter = self._get(name)
        if len(self._installed) == 1:
            self.detach()
            return
        if name in self._activation.active.names:
            self._set(Active())
        self._remove(adapter)

    def detach(self) -> None:
        """Take all adapters off: the model is bit for bit what it was, without a hook or a key more."""
        if handle_of(self.model) is not self:
            return  # nothing of this handle is left; the model may have a new one
        self._refuse_inside_per_sample("detach")
        if self._merged is not None:
            merging.unmerge(self.model)
            self._merged = None
        self._set(Active())
        self._remove_all()

    # --- files -----------------------------------------------------------------------------------------

    def stored(self, name: str | None = None) -> StoredAdapter:
        """The adapter as it is written to a file: settings, tensors, base record, provenance."""
        return saving.store(self.model, self._get(name))

    def base_record(self, name: str | None = None) -> BaseRecord:
        """Return the fingerprint of the base, without the parameters that the adapter trains in full."""
        return base_record(self.model, exclude=tuple(self._get(name).trained))

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        tokenizer: Any = None,
        provenance: dict[str, Any] | None = None,
        base: BaseRecord | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write an adapter as a folder that PEFT, transformers and vLLM load, with lorakit.json and a card.

        The folder appears whole or not at all.

        Args:
            folder: Where to write; must not exist unless `overwrite`.
            name: Which adapter; may be left out when there is one.
            tokenizer: Saved beside the adapter, chat template included.
            provenance: What to record about its making (configuration, data, scores), JSON values only.
            base: The base's fingerprint, if `base_record` has been called before; hashing a large base takes seconds.
            overwrite: Replace an existing folder.

        Raises:
            RunFolderError: The folder exists, is in use, or the disk is full.
        """
        adapter = self._get(name)
        if provenance:
            adapter.provenance = {**adapter.provenance, **provenance}
        return saving.save(
            self.model,
            adapter,
            Path(folder),
            tokenizer=tokenizer,
            base=base,
            overwrite=overwrite,
        )

    # --- adding, for `attach` and `load` -------------------------------------------------------------

    def owns(self, adapters: LayerAdapters) -> bool:
        """Whether what sits on a layer belongs to this handle."""
        return adapters.activation is self._activation

    def check_can_add(self, name: str) -> None:
        """Refuse a name that is taken or cannot be one, and any addition while an adapter is merged."""
        self._refuse_merged("add another adapter")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ConfigurationError(
                f"{name!r} cannot name an adapter. Use letters, digits, '-' and '_', starting with a letter or digit."
            )
        if hasattr(LayerAdapters(self._activation), name):
            raise ConfigurationError(
                f"'{name}' is a name that PyTorch's modules or lorakit need themselves. Choose another one."
            )
        if name in self._installed:
            raise AdapterStateError(
                f"The model already carries an adapter named '{name}'. Choose another name, or remove('{name}') first."
            )

    @contextlib.contextmanager
    def deactivated(self) -> Iterator[None]:
        """Deactivate all adapters, so that a new one sees the base's own weights; on an error, put them back."""
        before = self._activation.active
        self._set(Active())
        try:
            yield
        except BaseException:
            self._set(before)
            raise

    def add(
        self,
        name: str,
        method: Method,
        modules: dict[str, AdapterModule],
        trained: list[str],
        provenance: dict[str, Any] | None = None,
    ) -> InstalledAdapter:
        """Install an adapter's modules on the model and freeze the base."""
        require_exact_layers(self.model)
        adapter = install(self.model, name, method, modules, trained, self._activation)
        adapter.provenance = provenance or {}
        self._installed[name] = adapter
        self._activation.names.add(name)
        if adapter.trained:
            self._activation.swapping.add(name)
        if handle_of(self.model) is None:
            self._take_over()
        for _, parameter in base_parameters(self.model):
            parameter.requires_grad_(False)
        return adapter

    # --- inner -----------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        # A compiled graph does not look at hooks again unless asked to before it is compiled: an
        # adapter attached later would silently be left out. Graphs made until now are dropped.
        if torch._dynamo.config.skip_nnmodule_hook_guards:
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._dynamo.reset()
        setattr(self.model, _HANDLE, self)
        if hasattr(self.model, "save_pretrained"):
            self.model.__dict__["save_pretrained"] = functools.partial(
                export.save_pretrained, self.model
            )
        self.model.register_load_state_dict_pre_hook(export.keep_base_weights)

    def _remove(self, adapter: InstalledAdapter) -> None:
        """Remove an adapter's modules from the model, with the hooks that no other adapter needs."""
        del self._installed[adapter.name]
        self._activation.names.discard(adapter.name)
        self._activation.swapping.discard(adapter.name)
        for path in adapter.modules:
            remove_adapter(self.model.get_submodule(path), adapter.name)
        needed = [hook for other in self._installed.values() for hook in other.backbone_hooks]
        remove_hooks(backbone_of(self.model), adapter.backbone_hooks, needed)
        remove_idle_hooks(self.model)

    def _remove_all(self) -> None:
        for adapter in list(self._installed.values()):
            self._remove(adapter)
        for name, parameter in base_parameters(self.model):
            parameter.requires_grad_(self._requires_grad.get(name, False))
        self.model.__dict__.pop(_HANDLE, None)
        self.model.__dict__.pop("save_pretrained", None)
        hooks = self.model._load_state_dict_pre_hooks
        for key in [
            k for k, h in hooks.items() if getattr(h, "hook", h) is export.keep_base_weights
        ]:
            del hooks[key]

    def _set(self, active: Active) -> None:
        self._swap_trained(active)
        self._activation.active = active

    def _swap_trained(self, active: Active) -> None:
        """Let the trained copies of the one active adapter take their base parameters' places."""
        for _, layer, adapters in adapted_layers(self.model):
            for attribute in list(adapters.replaced):
                adapters.restore(layer, attribute)
        for name, _ in active.weights:
            for path, module in self._installed[name].modules.items():
                layer = self.model.get_submodule(path)
                adapters = layer.adapters
                assert isinstance(adapters, LayerAdapters)
                for attribute, copy in module.trained.items():
                    adapters.replace(layer, attribute, copy)

    def _resolve(self, choice: Choice) -> Active:
        if choice is None:
            return Active()
        if not isinstance(choice, (str, Mapping)):
            raise AdapterStateError(
                f"{choice!r} chooses no adapter. Give a name, {{name: weight}} for several, or None."
            )
        weights = {choice: 1.0} if isinstance(choice, str) else dict(choice)
        for name, weight in weights.items():
            adapter = self._get(name)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight):
                raise AdapterStateError(
                    f"The weight of '{name}' is {weight!r}; it must be a finite number."
                )
            if not adapter.scales and (len(weights) > 1 or weight != 1):
                raise AdapterStateError(
                    f"'{name}' ({type(adapter.method).__name__}) has parts whose effect is not linear in a weight, "
                    "so it can only act alone and with weight 1. Of LoRA these are DoRA, and biases or modules "
                    "trained in full."
                )
        return Active(weights=tuple((name, float(weight)) for name, weight in weights.items()))

    def _get(self, name: str | None) -> InstalledAdapter:
        if name is None:
            if len(self._installed) == 1:
                return next(iter(self._installed.values()))
            raise AdapterStateError(
                f"The model carries {len(self._installed)} adapters; say which one: {self._known()}."
            )
        if name not in self._installed:
            raise AdapterStateError(
                f"No adapter is named '{name}'. There are: {self._known()}."
                + nearest(str(name), self.names)
            )
        return self._installed[name]

    def _known(self) -> str:
        return ", ".join(self.names) or "none"

    def _refuse_inside_per_sample(self, wish: str) -> None:
        if self._activation.active.rows is not None:
            raise AdapterStateError(f"You cannot {wish} inside per_sample. Leave the block first.")

    def _refuse_merged(self, wish: str) -> None:
        self._refuse_inside_per_sample(wish)
        if self._merged is not None:
            raise AdapterStateError(
                f"{', '.join(self.merged)} is merged into the weights. Call unmerge() before you {wish}."
            )


def handle_of(model: nn.Module) -> Adapters | None:
    """The handle of a model that carries adapters, else None."""
    return getattr(uncompiled(model), _HANDLE, None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped; any other as it is."""
    return getattr(model, "_orig_mod", model)
