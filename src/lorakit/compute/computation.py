"""How a model is computed: packed or padded batches, the way to the loss, the last block, faster layers.

`choose_computation` decides from the model's structure alone, and the planner uses its answer. Training and evaluation
confirm the choice: `confirm_computation` computes a few examples and falls back wherever results would change.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from lorakit.compute.batching import collator
from lorakit.compute.last_block import last_block
from lorakit.compute.model_input import model_examples
from lorakit.compute.objective import (
    ClassificationLoss,
    HeadPath,
    LanguageModellingLoss,
    Objective,
    RegressionLoss,
    SequenceToSequenceLoss,
    confirm_loss_path,
    loss_paths,
)
from lorakit.compute.trials import (
    Faster,
    shortened,
    try_faster,
    try_last_block,
    why_not_packed,
)
from lorakit.data import DataTask
from lorakit.models.heads import backbone_of
from lorakit.models.loading import Base
from lorakit.models.places import name_in_block
from lorakit.models.tree import walk
from lorakit.tasks import Example, LanguageExample

POSITIONS_BY_ROW = ("bloom", "falcon", "gpt_neo", "mpt")
"""Architectures whose attention counts positions from the start of a row, and not by position ids."""


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a model is computed."""

    objective: Objective
    """The loss, with its path to the logits and its last block."""
    packed: bool = False
    """Whether the examples of a batch are packed, shared prefixes computed once."""
    faster: Faster = "none"
    """Which of lorakit's own layers replace the model's."""
    notes: tuple[str, ...] = ()
    """What the user should know about batches and layers."""

    @property
    def note(self) -> str:
        """One line for the user."""
        return "; ".join(note for note in (self.objective.note, *self.notes) if note)


def choose_computation(
    model: PreTrainedModel,
    task: DataTask,
    *,
    training: bool = False,
    packing: bool = False,
    compiled: bool = False,
    label_smoothing: float = 0.0,
) -> Computation:
    """Decide from the structure of a model, with its adapter, how it is computed; nothing is computed.

    Only `training` installs faster layers. `packing` packs batches if the architecture allows it. With `compiled`, the
    last block is computed in full.
    """
    faster: Faster = "none"
    if training and model.device.type == "cpu":
        faster = "layers"
    elif training and compiled:
        faster = "attention"
    why_padded = _why_padded(model, task, packing=packing)
    return Computation(
        objective=_structural_objective(
            model, task, compiled=compiled, label_smoothing=label_smoothing
        ),
        packed=why_padded is None,
        faster=faster,
        notes=(why_padded or "",),
    )


def confirm_computation(
    choice: Computation, base: Base, examples: Sequence[Example]
) -> Computation:
    """Try a choice on a few examples, and return what leaves the model's results unchanged.

    Faster layers are installed in place. `examples` has at least one.
    """
    notes, faster, packed = list(choice.notes), choice.faster, choice.packed
    if faster != "none":
        few, batch = examples[:2], collator(base)
        why_stock = try_faster(base.model, batch(few), batch([*map(shortened, few)]), faster)
        if why_stock:
            faster = "none"
            notes.append(f"stock attention: {why_stock}")
    if packed:
        longest = max(examples, key=len)
        assert isinstance(longest, LanguageExample)
        # With virtual tokens, as in a batch.
        trials = model_examples(base, [longest, shortened(longest)])
        why_padded = why_not_packed(base.model, *trials)
        packed = not why_padded
        padded = f"batches padded, not packed: {why_padded}"
        notes.insert(0, "shared prefixes computed once" if packed else padded)
    return replace(
        choice,
        objective=_confirmed_objective(choice, base, examples),
        packed=packed,
        faster=faster,
        notes=tuple(notes),
    )


def objective_for(base: Base, task: DataTask, examples: Sequence[Example]) -> Objective:
    """Return the loss that evaluation reports for `task`, confirmed on a few of `examples`."""
    return _confirmed_objective(choose_computation(base.model, task), base, examples)


def _confirmed_objective(choice: Computation, base: Base, examples: Sequence[Example]) -> Objective:
    """Return the chosen loss with the cheapest path and last block that leave the results on `base` unchanged."""
    chosen, model = choice.objective, base.model
    if isinstance(chosen, SequenceToSequenceLoss):
        return chosen
    # Examples of different lengths, so that the first padding token is not mistaken for the last of a text.
    pair, batch = [pick(examples[:50], key=len) for pick in (max, min)], collator(base)
    if isinstance(chosen, LanguageModellingLoss):
        confirmed = confirm_loss_path(
            model, batch([*map(shortened, pair)]), label_smoothing=chosen.label_smoothing
        )
    else:
        confirmed = replace(chosen, last_block=None)
    return confirmed if chosen.last_block is None else try_last_block(confirmed, model, batch(pair))


def _structural_objective(
    model: PreTrainedModel, task: DataTask, *, compiled: bool, label_smoothing: float
) -> Objective:
    """Return the loss of `task` by the cheapest path that the structure allows."""
    block = None if compiled else last_block(model)
    if block is not None and not block.can_gather:
        block = None
    if task.kind == "regression":
        return RegressionLoss(last_block=block)
    if task.kind == "classification":
        return ClassificationLoss(label_smoothing=label_smoothing, last_block=block)
    if model.config.is_encoder_decoder:
        return SequenceToSequenceLoss(label_smoothing=label_smoothing)
    path: HeadPath = next(path for path, reason in loss_paths(model).items() if not reason)
    return LanguageModellingLoss(
        path=path,
        label_smoothing=label_smoothing,
        last_block=block if path == "fused" else None,
    )


def _why_padded(model: PreTrainedModel, task: DataTask, *, packing: bool) -> str | None:
    """Return None if batches can be packed, else why they are padded, for the user.

    The reason is empty for tasks and models that never pack: there is nothing to tell the user.
    """
    if not task.generates or model.config.is_encoder_decoder:
        return ""
    if not packing:
        return "batches padded"
    if model.config.model_type in POSITIONS_BY_ROW:
        return f"batches padded, not packed: {model.config.model_type} counts positions by row"
    if path := _convolution(model):
        return f"batches padded, not packed: '{path}' reads the tokens beside each token"
    parameters = inspect.signature(backbone_of(model).forward).parameters
    if not {"position_ids", "attention_mask"} <= parameters.keys():
        return "batches padded, not packed: the model takes no position ids"
    return None


def _convolution(model: PreTrainedModel) -> str | None:
    """Return the path of a convolution over tokens in the model's blocks (LFM2, Mamba); None without one.

    No mask keeps it from the end of the example before. A trial of a few tokens can miss that: in bfloat16 it is
    smaller than what rounding changes elsewhere.
    """
    text = model.config.get_text_config()
    return next(
        (
            at.path
            for at in walk(model)
            if isinstance(at.module, nn.Conv1d) and at.config is text and name_in_block(at.path)
        ),
        None,
    )
