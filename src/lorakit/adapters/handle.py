"""The handle on a model's adapters: activate, merge, save, detach."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import merging, saving
from lorakit.adapters.activation import Activation, Block
from lorakit.adapters.choice import (
    BASE,
    AdapterChoice,
    Blend,
    Choice,
    choice_by_row,
    choice_by_token,
    choice_for_batch,
)
from lorakit.adapters.formats.fingerprint import BaseRecord, base_record
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.hooks import add_hooks, add_module
from lorakit.adapters.installed import (
    InstalledAdapter,
    adapted_layers,
    add_copies,
    check_installable,
    ignore_in_ddp,
    uninstall,
)
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.model_setup import freeze_base, prepare_model, release_model
from lorakit.adapters.names import require_valid
from lorakit.adapters.row_layout import row_layouts
from lorakit.adapters.slots import Slots
from lorakit.adapters.statistics import require_unchanged_statistics, restore_statistics
from lorakit.adapters.summary import Summary, summarise
from lorakit.errors import AdapterStateError, nearest
from lorakit.methods.method import Method
from lorakit.methods.module import AdapterModule
from lorakit.methods.virtual_tokens import VirtualTokens, virtual_tokens_of
from lorakit.models.heads import backbone_of
from lorakit.models.layers import ADAPTERS
from lorakit.models.quantised import Cleared
from lorakit.models.tree import base_modules, submodule, unwrapped

_LOG = logging.getLogger(__name__)

_HANDLE = "_lorakit_adapters"


class Adapters:
    """All adapters of one model, by name. `attach` and `load` return one handle for each model.

    Adapters leave the base unchanged: the types of its modules, its keys and, after ``activate(None)``, its
    outputs. Adapter tensors are children of the layers they adapt (`<layer>.adapters.<name>`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        """The adapted model."""
        self._activation = Activation()
        self._installed: dict[str, InstalledAdapter] = {}
        self._is_kept = False
        self._cleared: list[Cleared] = []
        """Flags of a quantised base that are cleared while it has the handle."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's adapters, in the order they were added."""
        return tuple(self._installed)

    @property
    def active(self) -> dict[str, float]:
        """The adapters that `activate` set, and their weights."""
        return dict(self._activation.active.blends[0])

    @property
    def merged(self) -> dict[str, float]:
        """The merged adapters and their weights; empty when nothing is merged."""
        return dict((self._activation.merged or BASE).blends[0])

    def method(self, name: str | None = None) -> Method:
        """Return the settings of an adapter."""
        return self._get(name).method

    def provenance(self, name: str | None = None) -> dict[str, Any]:
        """Return the provenance of an adapter's file; empty for an adapter from `attach` that was not saved."""
        return dict(self._get(name).provenance)

    def modules(self, name: str | None = None) -> dict[str, AdapterModule]:
        """Return an adapter's modules by the path of the adapted layer."""
        return dict(self._get(name).modules)

    def summary(self, name: str | None = None) -> Summary:
        """Return trainable and total parameters, trainable parameters by layer, and the file size."""
        return summarise(self.model, self._get(name))

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that the active adapters need in each sequence; most methods need none."""
        blend = self._activation.choice.whole or ()
        return virtual_tokens_of(self._installed[name].method for name, _ in blend)

    def trainable_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """Return the adapter's tensors that require a gradient, each once, for an optimizer.

        Raises:
            AdapterStateError: The adapter is frozen, as `load` leaves it.
        """
        adapter = self._get(name)
        if trainable := [p for p in adapter.parameters() if p.requires_grad]:
            return trainable
        raise AdapterStateError(
            f"The adapter {adapter.name!r} is frozen: none of its tensors requires a gradient. To train it, load it "
            "with trainable=True; in PEFT with is_trainable=True. get_peft_model() on this model freezes it too."
        )

    def __repr__(self) -> str:
        if own_handle(self.model) is not self:
            return "Adapters(detached)"
        state = f"merged: {self.merged}" if self.merged else f"active: {self.active or 'none'}"
        return f"Adapters({', '.join(self.names) or 'none'}; {state})"

    def activate(self, choice: AdapterChoice) -> None:
        """Activate one adapter, several by weight, or none (the base alone), for all threads.

        As with `module.train()`, call it while no forward pass of another thread runs.

        Args:
            choice: A name, ``{name: weight}`` (each delta is scaled by its weight), or None.

        Raises:
            AdapterStateError: A name is unknown, an adapter is merged, or an adapter whose effect is not linear in its
                weight (DoRA, trained biases or modules) is mixed or weighted. Or a layer of an adapter was replaced,
                or the handle was detached, or a block is open here.
        """
        self._require_attached()
        self._refuse_block_or_merged("activate another adapter")
        chosen = choice_for_batch(choice, self._get)
        self._require_in_place(chosen.names)
        self._set_active(chosen)

    def using(self, choice: AdapterChoice) -> contextlib.AbstractContextManager[None]:
        """Use other adapters, for the length of a `with` block, in this thread or asyncio task (see `per_sample`).

        Args:
            choice: A name, ``{name: weight}``, or None for the base alone, as for `activate`.

        Raises:
            AdapterStateError: As for `activate`, but a block may be open.
        """
        return self._opened(lambda: choice_for_batch(choice, self._get))

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Use the base alone, for the length of a `with` block: ``using(None)``."""
        return self.using(None)

    def per_sample(
        self, names: Sequence[AdapterChoice], *, repeat: int = 1
    ) -> contextlib.AbstractContextManager[None]:
        """Use a different adapter for each row of a batch, for the length of a `with` block.

        Call it anew for each `with`, as `using` and `per_token`; without `with` it has no effect.

        The block holds for its thread or asyncio task (and for what copies its context, such as
        `asyncio.to_thread`). Other threads see what `activate` set. `generate` keeps the choice at its start, and
        repeats rows for its beams. Do not edit, add or remove adapters inside the block, and suspend no generator.

        Args:
            names: For each row of the batch, in the order in which the model gets them: a name, ``{name: weight}``, or
                None for the base alone.
            repeat: The batch may also hold each row this many times, one after the other.

        Raises:
            AdapterStateError: A name is unknown, or an adapter is merged. In a forward pass: the batch has another
                number of rows, or a layer sees something else than whole rows in its first axis.
        """
        return self._opened(lambda: choice_by_row(names, repeat, self._get), Slots())

    def per_token(
        self, spans: Iterable[tuple[AdapterChoice, int]], *, slots: Slots | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Use a different adapter for each span of tokens, for the length of a `with` block, as `per_sample` does.

        Packed batches hold several sequences in one row. Only adapters whose effect on a token is independent of
        other tokens can be used.

        Args:
            spans: Choice and number of tokens of each span, in order. They cover all tokens of the batch
                (batch, length), row after row, padding included.
            slots: The thin matrices that earlier blocks have kept, as a server does between its steps. Adapters may be
                added and removed meanwhile, but not edited.

        Raises:
            AdapterStateError: A name is unknown, or an adapter is merged. In a forward pass: the batch has another
                number of tokens, or a layer or an adapter mixes tokens.
        """
        return self._opened(lambda: choice_by_token(spans, self._get), slots)

    @contextlib.contextmanager
    def _opened(self, choose: Callable[[], Choice], slots: Slots | None = None) -> Iterator[None]:
        """Open a block with a choice."""
        self._require_attached()
        self._refuse_merged("open a using, disabled, per_sample or per_token block")
        choice = choose()
        self._require_in_place(choice.names)
        if choice.whole != self._activation.active.whole:
            self._refuse_read_directly(choice.names | self._activation.active.names)
        with self._activation.opened(Block(choice, slots)):
            yield

    def _refuse_read_directly(self, names: Iterable[str]) -> None:
        """Raise an AdapterStateError for an adapter that a block cannot replace: its layer may not be called."""
        for name in names:
            if (path := self._installed[name].read_directly(self.model)) is not None:
                raise AdapterStateError(
                    f"'{name}' trains '{path}' in full, and the model may read it without calling its layer, so a with "
                    f"block cannot replace it. Use activate('{name}') for a whole batch, and activate(None) before a "
                    "block of other adapters."
                )

    def merge(self, choice: AdapterChoice = None, *, keep_base: bool = True) -> None:
        """Merge adapters into the weights: ``W + scaling * B A`` in float32, rounded once to W's dtype.

        For a quantised W the delta is added to ``W_q``, and the sum is not quantised again.

        The merged weights are new tensors that replace the base's. The base's are kept, and `unmerge`
        restores them bit for bit. Nothing is ever subtracted.

        Args:
            choice: The adapters to merge, as for `activate`; None merges the active ones.
            keep_base: False drops the base weights and all adapters, layer by layer, so that the model never needs
                the memory of two. The model is then a plain merged model for export, and the handle cannot be used
                afterwards. All other quantised layers are dequantised too.

        Raises:
            AdapterStateError: Nothing is active, something is merged already, or an adapter cannot be merged: a merged
                layer would compute something else. Or a layer of an adapter was replaced, or the handle was detached.
            AdapterFileError: An adapter or a merged weight holds NaN or infinity.
        """
        self._require_attached()
        self._refuse_block_or_merged("merge")
        merged = self._activation.active
        if choice is not None:
            merged = choice_for_batch(choice, self._get)
        if not merged.names:
            raise AdapterStateError(
                f"No adapter is active, so there is nothing to merge. Name one: {self._known()}."
            )
        self._require_in_place(merged.names)
        self._activation.forbid_recomputation()
        with self.changing():
            self._swap_trained(merged)  # the merged model keeps the trained biases and heads
            if keep_base:
                merging.merge(self.model, merged.blends[0])
                self._activation.merged = merged
            else:
                merging.merge_permanently(self.model, merged.blends[0], abandon=self._remove_all)
                self._remove_all()

    def merged_weights(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield base, unrounded and rounded tensor of each weight that merging the active adapters would change.

        Parameters that an adapter trains in full are not included.

        Raises:
            AdapterStateError: As for `merge`.
        """
        blend = self._activation.active.blends[0]
        for layer in merging.merged_layers(self.model, blend):
            with torch.no_grad():
                tensors = layer.tensors(blend)
            yield from tensors.values()

    def require_mergeable(self) -> None:
        """Raise an AdapterStateError if the effect of an active adapter is not a weight change."""
        merging.require_mergeable(self.model, self._activation.active.names)

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit, and activate the merged adapters.

        Raises:
            AdapterStateError: Nothing is merged.
        """
        merged = self._activation.merged
        if merged is None:
            raise AdapterStateError("No adapter is merged, so there is nothing to unmerge.")
        self._activation.forbid_recomputation()
        try:
            self._undo_merge(merged)
        except BaseException:
            self._undo_merge(merged)  # half of the layers would be merged
            raise
        self._report_replaced(merged.names)

    def _undo_merge(self, active: Choice) -> None:
        """Restore the base's weights, also those of half a merge, and activate adapters."""
        merging.unmerge(self.model)
        self._set_active(active)
        self._activation.merged = None  # last: `unmerge` needs it to complete what was interrupted

    def remove(self, name: str) -> None:
        """Remove one adapter from the model; removing the last one is a `detach`, except on a server.

        The other active adapters stay active with their weights. If there are none, the base alone is active.
        """
        self._refuse_block_or_merged("remove an adapter")
        adapter = self._get(name)
        if len(self._installed) == 1 and not self._is_kept:
            self.detach()
            return
        self._report_replaced([name])
        if name in self._activation.active.names:
            others = {other: w for other, w in self.active.items() if other != name}
            self._set_active(choice_for_batch(others, self._get))
        self._remove(adapter)

    def keep(self) -> None:
        """Put the handle on the model before its first adapter, and keep it there without adapters until `detach`.

        The base is frozen from now on.
        """
        if own_handle(self.model) is None:
            self._put_on_model()
            freeze_base(self.model)
        self._require_attached()
        self._is_kept = True

    def blend(self, choice: AdapterChoice) -> Blend:
        """Return the names and weights of a choice of adapters; empty for None.

        Raises:
            AdapterStateError: As for `activate`, if a name is unknown or the adapters cannot be mixed.
        """
        return choice_for_batch(choice, self._get).blends[0]

    def detach(self) -> None:
        """Remove all adapters and restore the model bit for bit, without added hooks or keys.

        Raises:
            AdapterStateError: A block is open here.
        """
        if own_handle(self.model) is not self:
            return  # already detached; the model may have a new handle
        self._refuse_inside_block("detach")
        if self._activation.merged is not None:
            self.unmerge()
        self._report_replaced(self._installed)
        self._set_active(BASE)
        restore_statistics(self.model)
        self._remove_all()

    def stored(self, name: str | None = None) -> StoredAdapter:
        """Return the content of the adapter's file: settings, tensors, base record, provenance.

        Raises:
            AdapterStateError: A layer of the adapter was replaced.
        """
        self._require_in_place([self._get(name).name])
        return saving.store(self.model, self._get(name), self.base_record(name))

    def base_record(self, name: str | None = None, *, tokenizer: Any = None) -> BaseRecord:
        """Return the fingerprint of the base, without the parameters that the adapter trains in full.

        Args:
            name: The adapter; may be omitted if the model has only one.
            tokenizer: The base's tokenizer, to record it too.
        """
        modules = self._get(name).modules.items()
        # A tied parameter that is trained at two layers has two names here, as when the file is loaded.
        trained = [
            f"{path}.{attribute}" for path, module in modules for attribute in module.trained
        ]
        return base_record(self.model, exclude=trained, tokenizer=tokenizer)

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        tokenizer: Any = None,
        provenance: dict[str, Any] | None = None,
        base: BaseRecord | None = None,
        overwrite: bool = False,
        is_main_process: bool = True,
    ) -> Path:
        """Write an adapter as a folder that PEFT and transformers load, with lorakit.json and a card.

        The folder is written atomically.

        Args:
            folder: Where to write; must not exist unless `overwrite`.
            name: The adapter; may be omitted if the model has only one.
            tokenizer: Saved in the same folder, chat template included, and recorded in the base's fingerprint.
            provenance: How the adapter was trained (configuration, data, scores), JSON values only.
            base: The base's fingerprint, if `base_record` has been called before; hashing a large base takes seconds.
            overwrite: Replace an existing folder.
            is_main_process: False in all processes but one, which writes. Call `save` in all processes if FSDP2 or
                DeepSpeed's ZeRO-3 shards the weights: they gather the adapter together.

        Raises:
            RunFolderError: The folder exists, is in use, or the disk is full.
            AdapterStateError: A layer of the adapter was replaced, or training has changed the running statistics of
                batch or instance normalisation.
        """
        adapter = self._get(name)
        self._require_in_place([adapter.name])
        require_unchanged_statistics(self.model)
        recorded = {**adapter.provenance, **(provenance or {})}
        path = saving.save(
            self.model,
            replace(adapter, provenance=recorded),
            Path(folder),
            base or self.base_record(name, tokenizer=tokenizer),
            tokenizer=tokenizer,
            overwrite=overwrite,
            is_main_process=is_main_process,
        )
        adapter.provenance = recorded
        return path

    def owns(self, adapters: LayerAdapters) -> bool:
        """Return whether a layer's adapters belong to this handle."""
        return adapters.activation is self._activation

    def check_can_add(self, name: str) -> None:
        """Reject an invalid or taken name, and any addition while an adapter is merged."""
        self._refuse_block_or_merged("add another adapter")
        require_valid(name)
        if name in self._installed:
            raise AdapterStateError(
                f"The model already has an adapter named '{name}'. To replace it, call "
                f"lorakit.handle_of(model).remove('{name}') first. Another name (name='{name}-2') adds a second "
                "adapter beside it."
            )

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Add or merge adapters in a `with` block, in which no adapter is active.

        An error undoes a merge and reactivates the former adapters. Otherwise no adapter is active afterwards, and the
        caller activates or merges one. (`using` is the block for users.)
        """
        before = self._activation.active
        self._set_active(BASE)
        try:
            yield
        except BaseException:
            if self._installed:  # a merge that stops between two layers has removed them
                self._undo_merge(before)
            raise

    def add(
        self,
        name: str,
        method: Method,
        modules: dict[str, AdapterModule],
        trained: Mapping[str, Tensor | None],
        *,
        trainable: bool = True,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Add an adapter to the layers, without activating it: its modules, and copies of base parameters.

        The first adapter freezes the base. A parameter that the user unfreezes afterwards stays trainable.

        Args:
            name: See `check_can_add`.
            method: Its settings.
            modules: Its modules by the path of the layer.
            trained: The numbers of each copy by the parameter's name; None copies the base's.
            trainable: Whether the copies require a gradient.
            provenance: See `provenance`.
        """
        check_installable(self.model, modules, trained)
        copied = add_copies(self.model, modules, trained, trainable=trainable)
        adapter = InstalledAdapter(name, method, modules, copied, provenance or {})
        layers = {path: submodule(self.model, path) for path in modules}
        new = [path for path, layer in layers.items() if ADAPTERS not in layer._modules]
        layouts = row_layouts(self.model, new)
        is_first = own_handle(self.model) is None
        try:
            if is_first:
                self._put_on_model()
            for path, layer in layers.items():
                owner = submodule(self.model, path.rpartition(".")[0])
                layout = layouts.get(path)
                add_module(layer, owner, name, modules[path], self._activation, layout)
            add_hooks(backbone_of(self.model), adapter.backbone_hooks)
        except BaseException:
            uninstall(self.model, adapter, self._installed.values())
            if is_first:
                self._remove_all()
            raise
        ignore_in_ddp(self.model, adapter)
        self._installed[name] = adapter
        self._activation.add(name)
        if is_first:
            freeze_base(self.model)

    def _put_on_model(self) -> None:
        setattr(self.model, _HANDLE, self)
        self._cleared = prepare_model(self.model, self._activation)

    def _remove(self, adapter: InstalledAdapter) -> None:
        self._activation.forbid_recomputation()
        del self._installed[adapter.name]
        uninstall(self.model, adapter, self._installed.values())

    def _remove_all(self) -> None:
        """Remove all adapters and the handle."""
        for adapter in list(self._installed.values()):
            self._remove(adapter)
        release_model(self.model, self._cleared)
        self.model.__dict__.pop(_HANDLE, None)
        self._is_kept = False

    def _set_active(self, active: Choice) -> None:
        try:
            self._swap_trained(active)
            self._activation.active = active
        except BaseException:  # an interrupt
            self._swap_trained(self._activation.active)
            raise

    def _swap_trained(self, active: Choice) -> None:
        """Restore the base parameters, then replace those that the active adapter trains in full by its copies.

        `choice_for_batch` allows such an adapter only alone and with weight 1.
        """
        for _, layer, adapters in adapted_layers(self.model):
            if adapters.replaced:
                self._activation.forbid_recomputation()
            adapters.restore(layer)
        for name in active.names:
            for _, layer, adapters in self._installed[name].layers(self.model):
                for attribute, copy in adapters[name].trained.items():
                    self._activation.forbid_recomputation()
                    adapters.replace(layer, attribute, copy)

    def _get(self, name: str | None) -> InstalledAdapter:
        """Return the adapter of this name; None is the only one of the model."""
        self._require_attached()
        if name is None:
            if len(self._installed) == 1:
                return next(iter(self._installed.values()))
            raise AdapterStateError(
                f"The model has {len(self._installed)} adapters; name one of them: {self._known()}."
            )
        if name not in self._installed:
            raise AdapterStateError(
                f"No adapter is named '{name}'. The model has: {self._known()}."
                + nearest(str(name), self.names)
            )
        return self._installed[name]

    def _require_attached(self) -> None:
        """Raise an AdapterStateError if the model has no handle, or another one, because this one was detached."""
        if own_handle(self.model) is not self:
            raise AdapterStateError(
                "This handle was detached from the model by detach(), by remove() of its last adapter or by "
                "merge(keep_base=False). Use the handle that the latest attach or load returned."
            )

    def _require_in_place(self, names: Iterable[str]) -> None:
        """Raise an AdapterStateError if the user has replaced a layer that one of these adapters is on."""
        for name in names:
            if sentence := self._installed[name].replaced_layers(self.model):
                raise AdapterStateError(
                    f"{sentence} Put the original layer back, or call detach() and attach or load the adapter on the "
                    "changed model."
                )

    def _report_replaced(self, names: Iterable[str]) -> None:
        """Warn about layers that the user replaced: the caller restores only the others."""
        for name in names:
            if sentence := self._installed[name].replaced_layers(self.model):
                _LOG.warning("%s The new layer stays as it is.", sentence)

    def _known(self) -> str:
        return ", ".join(self.names) or "none"

    def _refuse_inside_block(self, action: str) -> None:
        if self._activation.users_block is not None:
            raise AdapterStateError(
                f"You cannot {action} inside per_sample, per_token, using or disabled. Leave the block first."
            )

    def _refuse_block_or_merged(self, action: str) -> None:
        """Raise an AdapterStateError while an adapter is merged, or inside a block; `action` is for the message."""
        self._refuse_inside_block(action)
        self._refuse_merged(action)

    def _refuse_merged(self, action: str) -> None:
        if self._activation.merged is not None:
            raise AdapterStateError(
                f"{', '.join(self.merged)} is merged into the weights. Call unmerge() before you {action}."
            )


def own_handle(model: nn.Module) -> Adapters | None:
    """Return the handle of a model to which adapters were attached, else None."""
    return getattr(unwrapped(model), _HANDLE, None)


def handle_of(model: nn.Module) -> Adapters | None:
    """Return the handle of a model that has adapters, or that contains exactly one such model; else None.

    Each copy of an adapted model has its own handle. A model contains another one for example as AveragedModel,
    DistributedDataParallel or a LightningModule does.
    """
    if (handle := own_handle(model)) is not None:
        return handle
    inside = [module for _, module in base_modules(model) if _HANDLE in module.__dict__]
    return own_handle(inside[0]) if len(inside) == 1 else None
