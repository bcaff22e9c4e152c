"""The loss of a task, summed over a batch's targets: what training minimises and evaluation reports.

One implementation for both, so that the held-out loss is comparable with the training loss. It is a *sum* in
float32, together with the number of targets, because the mean over a step has to be taken over all targets of the
accumulated batch: a mean of the means of its parts would weigh a target by how many others share its part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters.installed import backbone_of
from lorakit.adapters.layer_adapters import computes_its_own
from lorakit.compute.last_block import LastBlock
from lorakit.compute.mode import evaluating
from lorakit.data.batches import IGNORED
from lorakit.ops import linear_cross_entropy

Batch = Mapping[str, Tensor]
HeadPath = Literal["fused", "own head", "whole logits"]


class Objective(Protocol):
    """What a training loop needs to know about a task."""

    note: str
    """One line for the user on how the loss is computed."""

    def count(self, batch: Batch) -> int:
        """Return the number of targets in `batch`."""
        ...

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the float32 scalar sum of the targets' losses."""
        ...


@dataclass(kw_only=True)
class LanguageModellingLoss:
    """Next-token cross-entropy of a decoder, with the vocabulary projected at target positions alone.

    A batch is padded (`labels` (B, S) holds a target token's own id and -100 elsewhere; the model predicts it one
    position earlier) or packed (`lorakit.data.packing`). Of three equal ways to compute the loss, from the least
    memory to the most general:

    - ``fused``: the backbone's hidden states at target positions times the head's weight, in chunks, so the logits
      never exist as a whole (:func:`lorakit.ops.linear_cross_entropy`);
    - ``own head``: the model's own forward, asked for the logits of the columns that hold a target in any row;
    - ``whole logits``: the model's own forward.
    """

    path: HeadPath = "whole logits"
    label_smoothing: float = 0.0
    note: str = ""
    last_block: LastBlock | None = None
    """Computed at the positions that predict targets alone, where the path is ``fused``; None computes it in full."""

    def count(self, batch: Batch) -> int:
        """Return the number of target tokens; one at position 0 has nothing to be predicted from."""
        if "target_at" in batch:
            return int(batch["target_weights"].sum())
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the target tokens' cross-entropies, a float32 scalar."""
        targets = targets_of(batch)
        # The head may have been adapted since the path was chosen.
        path = "whole logits" if self.path == "fused" and why_not_fused(model) else self.path
        if path == "fused":
            hidden = self.hidden_at_targets(model, batch, targets) * _logit_scale(model)
            head = model.get_output_embeddings()  # type: ignore[operator]
            device = hidden.device.type
            # A head that is trained is a float32 master under autocast: its products are not.
            dtype = head.weight.dtype
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return linear_cross_entropy(
                    hidden.to(dtype),
                    head.weight,
                    targets.ids,
                    bias=head.bias,
                    weights=targets.weights,
                    label_smoothing=self.label_smoothing,
                )
        inputs = inputs_of(model, batch)
        if path == "own head":
            rows, columns = targets.at // targets.width, targets.at % targets.width
            kept, places = columns.unique(return_inverse=True)
            logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits[rows, places]
        else:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[targets.at]
        return _cross_entropy_sum(logits, targets.ids, self.label_smoothing, targets.weights)

    def hidden_at_targets(
        self, model: nn.Module, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """Return the last hidden states (N, d) that predict the targets."""
        at = (targets or targets_of(batch)).at
        with reading(self.last_block, batch, at.unique):
            hidden = backbone_of(model)(
                **inputs_of(model, batch), use_cache=False
            ).last_hidden_state
        return hidden.flatten(0, 1)[at]


@dataclass(kw_only=True)
class SequenceToSequenceLoss:
    """Cross-entropy of an encoder-decoder's target tokens: `labels` (B, T) with -100 as padding."""

    label_smoothing: float = 0.0
    note: str = ""

    def count(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the target tokens' cross-entropies, a float32 scalar."""
        at = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
        # The model shifts the labels into decoder inputs itself; its own loss, a mean, is not used.
        logits = model(**batch, use_cache=False).logits[at]
        return _cross_entropy_sum(logits, batch["labels"][at], self.label_smoothing)


@dataclass(kw_only=True)
class LabelLoss:
    """What the losses of labelled examples share: one output of the model's own head for each."""

    note: str = ""
    reads: Literal["first", "last"] = "first"
    """The token of each example that the head reads, where `last_block` is given."""
    last_block: LastBlock | None = None
    """Computed at that token alone; None computes it in full."""

    def count(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (B, outputs) for a batch whose labels it is not shown."""
        with reading(self.last_block, batch, lambda: read_at(model, batch, self.reads)):
            return model(
                **{name: value for name, value in batch.items() if name != "labels"}
            ).logits

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the examples' losses, a float32 scalar."""
        return self.loss_of(self.predict(model, batch), batch["labels"])

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of `logits` (B, outputs)."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ClassificationLoss(LabelLoss):
    """Cross-entropy over the classes: `labels` (B,) of class numbers."""

    label_smoothing: float = 0.0

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy_sum(logits, labels, self.label_smoothing)


@dataclass(kw_only=True)
class RegressionLoss(LabelLoss):
    """Squared error of one predicted number: `labels` (B,) of floats."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction="sum")


def reading(
    last_block: LastBlock | None, batch: Batch, at: Callable[[], Tensor]
) -> AbstractContextManager[None]:
    """Let a forward pass compute no more of the last block than the positions `at()` of the flattened batch."""
    if last_block is None:
        return nullcontext()
    B, T = batch["input_ids"].shape
    return last_block.reading(at, (B, T))


def read_at(model: nn.Module, batch: Batch, reads: Literal["first", "last"]) -> Tensor:
    """Return the index of each example's first or last token into the flattened tokens of a padded batch.

    The last token is what the classifiers of decoders take for it: the last whose id is not that of padding.
    """
    ids = batch["input_ids"]
    rows, width = ids.shape
    first = torch.arange(rows, device=ids.device) * width
    if reads == "first":
        return first
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)  # type: ignore[operator, union-attr]
    if pad is None:
        return first + width - 1
    return first + ((ids != pad) * torch.arange(width, device=ids.device)).argmax(-1)


def language_modelling(
    model: nn.Module, probe: Batch, *, label_smoothing: float = 0.0
) -> LanguageModellingLoss:
    """Choose the cheapest way to `model`'s loss that agrees with its own logits on the batch `probe`.

    The structure rules out what zero-initialised adapters would hide from the comparison (an adapter on the head);
    the comparison rules out what the structure does not tell (a model that does more after its head than we know).
    """
    objective = LanguageModellingLoss(
        path="whole logits", note="loss from the model's whole logits"
    )
    reference = _mean_loss(objective, model, probe)
    reasons = []
    for path, reason in loss_paths(model).items():
        if path == "whole logits":
            break
        if not reason:
            try:
                value = _mean_loss(LanguageModellingLoss(path=path), model, probe)
            except Exception as error:  # a model may raise anything; another path serves it
                reason = f"it raised {type(error).__name__}: {error}"
            else:
                if abs(value - reference) <= tolerance(model) * (1 + abs(reference)):
                    objective.path, objective.note = path, _NOTES[path]
                    break
                reason = f"its loss {value:.6g} is not the model's {reference:.6g}"
        reasons.append(f"not {path}: {reason}")
    objective.note = "; ".join([objective.note, *reasons])
    objective.label_smoothing = label_smoothing
    return objective


_NOTES: dict[HeadPath, str] = {
    "fused": "vocabulary projected at target positions only, in chunks",
    "own head": "the model's own head, at positions that carry a target",
}


def loss_paths(model: nn.Module) -> Mapping[HeadPath, str]:
    """Return the paths to the loss, cheapest first, each with the reason that rules it out; empty if none does."""
    return {
        "fused": why_not_fused(model),
        "own head": _why_not_own_head(model),
        "whole logits": "",
    }


def why_not_fused(model: nn.Module) -> str:
    """Return why the head's weight alone does not tell `model`'s logits; empty where it does."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if backbone_of(model) is model or head is None:
        return "the model has no backbone apart from its head"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if model._forward_hooks or model._forward_pre_hooks or not computes_its_own(head):
        return "the head carries an adapter or another hook"
    if getattr(model.config, "final_logit_softcapping", None):
        return "the logits are capped"
    return ""


def _why_not_own_head(model: nn.Module) -> str:
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    return "" if accepts else "the model does not take logits_to_keep"


def _logit_scale(model: nn.Module) -> float:
    """Return the factor from head output to logits: Granite divides them, Cohere multiplies them."""
    config = model.config
    if divisor := getattr(config, "logits_scaling", None):
        return 1 / divisor
    return getattr(config, "logit_scale", None) or 1.0  # type: ignore[return-value]


_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return what the model takes of a batch."""
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dtype == torch.bool and _attention(model) == "eager":
        # Plain attention adds its mask to the scores; the fused kernels take it as it is.
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs["attention_mask"] = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        inputs["attention_mask"].masked_fill_(~mask, torch.finfo(dtype).min)
    return inputs


def _attention(model: nn.Module) -> str:
    return getattr(model.config, "_attn_implementation", None) or "eager"


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a batch, padded or packed, in one form."""

    at: Tensor
    """Index of the position that predicts each, into the flattened (rows * width) positions."""
    ids: Tensor
    """Their token ids."""
    weights: Tensor | None
    """In how many examples each is one; None where every target is of one example."""
    width: int
    """Tokens in a row."""


def targets_of(batch: Batch) -> Targets:
    """Return where the targets of a padded or packed batch are predicted, and which they are."""
    width = batch["input_ids"].shape[1]
    if "target_at" in batch:
        return Targets(batch["target_at"], batch["targets"], batch["target_weights"], width)
    labels = batch["labels"][:, 1:]  # a token is predicted one position before its own
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return Targets(rows * width + columns, labels[rows, columns], None, width)


def _cross_entropy_sum(
    logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    if weights is None:
        return F.cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=label_smoothing
        )
    losses = F.cross_entropy(
        logits.float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    return losses @ weights


def _mean_loss(objective: LanguageModellingLoss, model: nn.Module, batch: Batch) -> float:
    with evaluating(model):
        return objective.loss_sum(model, batch).item() / max(objective.count(batch), 1)


def tolerance(model: nn.Module) -> float:
    """Return the relative rounding to expect between two equal ways to compute `model`."""
    parameters = list(model.parameters())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
    autocast = any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in parameters})
    return 2e-2 if half or autocast else 1e-4
