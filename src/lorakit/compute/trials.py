"""Faster ways to compute a model, each tried on the model itself before it is taken.

What a model's structure does not tell (a mask it ignores, an attention of its own) shows in its results, so a
shortcut is one that leaves the results of a small batch what they were, to the rounding of the dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.installed import backbone_of
from lorakit.compute.last_block import LastBlock, last_block
from lorakit.compute.mode import evaluating
from lorakit.compute.objective import (
    Batch,
    LabelLoss,
    LanguageModellingLoss,
    inputs_of,
    targets_of,
    tolerance,
)
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.models.faster import make_faster, make_stock, use_own_attention
from lorakit.tasks import LanguageExample

T = TypeVar("T", bound=LabelLoss | LanguageModellingLoss)


Faster = Literal["layers", "attention", "none"]
"""lorakit's own attention, norms, activations and dropout; its attention only; or the stock layers."""


def why_not_packed(model: nn.Module, example: LanguageExample) -> str:
    """Return why examples that share a prefix cannot be computed as one tree on `model`; empty where they can.

    Two completions of one prompt, computed together, must leave the hidden states at all targets what they are
    when each is computed alone.
    """
    stem = backbone_of(model)
    ids, cut = example.input_ids, example.prompt_length
    twin = replace(example, input_ids=[*ids[:cut], *reversed(ids[cut:])])
    pair = sorted((example, twin), key=lambda e: e.input_ids)
    try:
        together = _hidden_at_targets(stem, pack(pair, pad_id=0))
        alone = [_hidden_at_targets(stem, collate([e], pad_id=0)) for e in pair]
    except Exception as error:  # a model's forward may raise anything; padded batches serve it
        return f"it raised {type(error).__name__}: {error}"
    expected = torch.cat(alone)
    if together.shape != expected.shape:
        return "the probe's two completions begin alike"
    distance = _distance(together, expected)
    if not distance <= _limit(model):
        return f"its hidden states differ by {distance:.2g} from those of separate examples"
    return ""


def try_faster(model: PreTrainedModel, batch: Batch, faster: Faster = "layers") -> str:
    """Install lorakit's own attention and layers, or return why the stock ones stay.

    Args:
        model: Changed in place, and left as it was where a reason is returned.
        batch: A padded batch, on which the logits must stay the same.
        faster: Which parts. Attention alone is a compiled kernel, whose backward pass is tried as well.
    """
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    before = _logits(model, batch)
    try:
        make_faster(model) if faster == "layers" else use_own_attention(model)
        distance = _distance(_logits(model, batch), before)
        reason = "" if distance <= _limit(model) else f"its logits would differ by {distance:.2g}"
        if faster == "attention":
            _try_backward(model, batch)
    except Exception as error:  # a model's forward may raise anything; its own attention serves it
        reason = f"it raised {type(error).__name__}: {error}"
    if reason:
        make_stock(model)
    return reason


def try_last_block(objective: T, model: nn.Module, batch: Batch) -> T:
    """Return `objective` with the model's last block computed where it is read, if that changes nothing.

    Args:
        objective: How the loss is computed; its `last_block` is None.
        model: The base, with its adapter.
        batch: A padded batch of examples of different lengths, on which what is read must stay what it is.
    """
    found = last_block(model)
    if found is None or not found.divides:
        return objective
    if isinstance(objective, LanguageModellingLoss) and objective.path != "fused":
        return objective
    trial = replace(found, worth=1.0)  # it is to divide, whatever it gains
    fitting: list[T] = []
    try:
        before = _read(objective, model, batch)
        for changed, note in _readings(objective, trial):
            if _distance(_read(changed, model, batch), before) <= tolerance(model):
                notes = filter(None, (objective.note, note))
                fitting.append(replace(changed, last_block=found, note="; ".join(notes)))
    except Exception:  # a model's forward may raise anything; its whole block serves it
        return objective
    # Where two different tokens would do, the batch tells nothing of which is read.
    return fitting[0] if len(fitting) == 1 and trial.divisions else objective


def _readings(objective: T, block: LastBlock) -> Iterator[tuple[T, str]]:
    """The ways in which the last block may be read, and what to tell the user of each."""
    if isinstance(objective, LanguageModellingLoss):
        yield replace(objective, last_block=block), "last block too"
        return
    for reads in ("first", "last"):
        changed = replace(objective, last_block=block, reads=reads)
        yield changed, f"last block computed at each example's {reads} token only"


def _read(objective: LabelLoss | LanguageModellingLoss, model: nn.Module, batch: Batch) -> Tensor:
    """What is read of the last block: the hidden states at targets, or the logits that the head makes of them."""
    with evaluating(model):
        if isinstance(objective, LabelLoss):
            return objective.predict(model, batch)
        return objective.hidden_at_targets(model, batch)


def _hidden_at_targets(stem: nn.Module, batch: Batch) -> Tensor:
    device = next(stem.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with evaluating(stem):
        hidden = stem(**inputs_of(stem, batch), use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[targets_of(batch).at]


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with evaluating(model):
        return _forward(model, batch).logits


def _forward(model: PreTrainedModel, batch: Batch) -> Any:
    # An encoder-decoder makes its decoder's inputs of the labels; others would compute a loss of them.
    hidden = () if model.config.is_encoder_decoder else ("labels",)
    given: dict[str, Any] = {name: x for name, x in batch.items() if name not in hidden}
    if "use_cache" in inspect.signature(model.forward).parameters:
        # As in training, of whose tensors a compiled kernel knows the strides.
        given["use_cache"] = False
    return model(**given)


def _try_backward(model: PreTrainedModel, batch: Batch) -> None:
    """Compute gradients and drop them: a compiled kernel of the backward pass shows only then whether it works."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        total = _forward(model, batch).logits.sum(dtype=torch.float32)
        torch.autograd.grad(total, trained, allow_unused=True)


def _distance(x: Tensor, expected: Tensor) -> float:
    """The relative distance of all rows together; one row alone may be far off by rounding."""
    x, expected = x.float(), expected.float()
    return float((x - expected).norm() / expected.norm())


def _limit(model: nn.Module) -> float:
    """The distance up to which two ways count as equal.

    A deep model in half precision adds up its roundings (0.02 over SmolLM2's 30 layers); a mask or a scale that is
    not respected shows as a multiple of this.
    """
    return 5 * tolerance(model)
