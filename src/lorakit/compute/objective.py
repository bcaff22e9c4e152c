"""The loss of a task, summed over a batch's targets, for training and evaluation.

Both use the same implementation, so that the held-out loss is comparable with the training loss. Objectives return a
float32 *sum* and the number of targets, because a step takes the mean over all targets of its accumulated batches. A
mean of batch means would give targets in small batches a larger weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters.entry import foreign_hooks
from lorakit.adapters.hooks import output_is_unadapted
from lorakit.compute.last_block import LastBlock
from lorakit.compute.mode import evaluating
from lorakit.data.batches import IGNORED
from lorakit.models.heads import backbone_of, output_embeddings
from lorakit.models.packed import packed_by
from lorakit.ops.linear_cross_entropy import linear_cross_entropy
from lorakit.ops.rows import gather_rows

Batch = Mapping[str, Tensor]
HeadPath = Literal["fused", "own head", "whole logits"]


@dataclass(kw_only=True)
class LanguageModellingLoss:
    """Next-token cross-entropy of a decoder, which projects to the vocabulary at target positions only.

    A batch is padded (`labels` (B, S) has the token id at targets and -100 elsewhere; the model predicts a target one
    position earlier) or packed (`lorakit.data.packing`). Three paths compute the same loss. From the least memory to
    the most general, they are:

    - ``fused``: the backbone's hidden states at target positions times the head's weight, in chunks, so the full
      logits never exist in memory (`lorakit.ops.linear_cross_entropy`);
    - ``own head``: the model's forward with `logits_to_keep`, for the columns with a target in any row;
    - ``whole logits``: the model's forward with all logits.
    """

    path: HeadPath = "whole logits"
    label_smoothing: float = 0.0
    note: str = ""
    last_block: LastBlock | None = None
    """The block to compute only at positions that predict targets (path ``fused``); None computes it in full."""

    def count(self, batch: Batch) -> int:
        """Return the number of target tokens; a token at position 0 cannot be predicted, so it does not count."""
        if "target_at" in batch:
            return int(batch["target_weights"].sum())
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the target tokens' cross-entropies, a float32 scalar."""
        targets = targets_of(batch)
        if self._is_fused(model):
            hidden, head = self._input_and_head(model, batch, targets)
            with torch.autocast(hidden.device.type, enabled=False):
                return linear_cross_entropy(
                    hidden,
                    head.weight,
                    targets.ids,
                    bias=head.bias,
                    weights=targets.weights,
                    label_smoothing=self.label_smoothing,
                )
        logits = self._model_logits(model, batch, targets)
        return _cross_entropy_sum(logits, targets.ids, self.label_smoothing, targets.weights)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits (N, vocabulary) of all targets at once, which the path ``fused`` avoids in training."""
        targets = targets_of(batch)
        if not self._is_fused(model):
            return self._model_logits(model, batch, targets)
        hidden, head = self._input_and_head(model, batch, targets)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, head.weight.to(hidden.dtype), bias)

    def _model_logits(self, model: nn.Module, batch: Batch, targets: Targets) -> Tensor:
        """Return the logits (N, vocabulary) that the model's own forward computes."""
        inputs = inputs_of(model, batch)
        if self.path == "own head":
            rows, columns = targets.at // targets.width, targets.at % targets.width
            columns, places = columns.unique(return_inverse=True)
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
            return gather_rows(logits.flatten(0, 1), rows * len(columns) + places)
        logits = model(**inputs, use_cache=False).logits
        return gather_rows(logits.flatten(0, 1), targets.at)

    def hidden_at_targets(
        self, model: nn.Module, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """Return the last hidden states (N, d) that predict the targets."""
        targets = targets or targets_of(batch)
        with restricted_last_block(self.last_block, batch, lambda: targets.read_at):
            hidden = backbone_of(model)(
                **inputs_of(model, batch), use_cache=False
            ).last_hidden_state
        return gather_rows(hidden.flatten(0, 1), targets.at)

    def _is_fused(self, model: nn.Module) -> bool:
        """Whether the path is ``fused``, and still possible: the head may have been adapted after it was chosen."""
        return self.path == "fused" and not why_not_fused(model)

    def _input_and_head(
        self, model: nn.Module, batch: Batch, targets: Targets
    ) -> tuple[Tensor, nn.Linear]:
        """Return what the head projects to logits (N, d), in the dtype of its products, and the head."""
        hidden = self.hidden_at_targets(model, batch, targets) * _logit_scale(model)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        device, dtype = hidden.device.type, head.weight.dtype
        # A trained head is a float32 master; autocast computes its products in a lower precision.
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), head


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
        labels = batch["labels"]
        targets = (labels != IGNORED).nonzero(as_tuple=True)
        logits = model(**with_decoder_inputs(model, batch), use_cache=False).logits[targets]
        return _cross_entropy_sum(logits, labels[targets], self.label_smoothing)


def with_decoder_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with the labels as inputs of the decoder, one place later, if the model can shift them.

    Given labels, a model shifts them itself (FSMT takes the inputs of the encoder instead), and computes a loss that
    nobody reads.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return batch
    # FSMT writes into the labels.
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return {**inputs, "decoder_input_ids": shift(batch["labels"].clone())}


@dataclass(kw_only=True)
class LabelLoss:
    """Base of the losses of labelled examples: the model's head has one output per example."""

    note: str = ""
    reads: Literal["first", "last"] = "first"
    """The token of each example that the head uses, if `last_block` is set."""
    last_block: LastBlock | None = None
    """The block to compute only at that token; None computes it in full."""

    def count(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (B, outputs), without passing it the labels."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with restricted_last_block(
            self.last_block, batch, lambda: _head_positions(model, batch, self.reads)
        ):
            return model(**inputs).logits

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


Objective = LanguageModellingLoss | SequenceToSequenceLoss | ClassificationLoss | RegressionLoss


def restricted_last_block(
    last_block: LastBlock | None, batch: Batch, at: Callable[[], Tensor]
) -> AbstractContextManager[None]:
    """Compute the last block only at positions `at()` of the flattened batch, in forward passes in this context."""
    if last_block is None:
        return nullcontext()
    B, T = batch["input_ids"].shape
    return last_block.restricted_to(at, (B, T))


def _head_positions(model: nn.Module, batch: Batch, reads: Literal["first", "last"]) -> Tensor:
    """Return the index of each example's first or last token in the flattened tokens of a padded batch.

    The last token is the last one whose id is not the padding id, as in the decoder classifiers of transformers.
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


def confirm_loss_path(
    model: nn.Module, probe: Batch, *, label_smoothing: float = 0.0
) -> LanguageModellingLoss:
    """Return the objective with the cheapest path whose logits on `probe` equal those of the model's own forward.

    A path must pass two checks. `loss_paths` inspects the structure: it finds an adapter on the head, which a
    comparison would miss while the adapter is zero. The comparison of logits finds operations after the head, which
    the structure does not show. `probe` has a few short examples, because its logits are computed whole.
    """
    objective = LanguageModellingLoss(
        note="loss from the model's whole logits", label_smoothing=label_smoothing
    )
    with evaluating(model):
        expected = objective.logits(model, probe)
    reasons = []
    for path, reason in loss_paths(model).items():
        if path == "whole logits":
            break
        if not reason:
            try:
                with evaluating(model):
                    found = LanguageModellingLoss(path=path).logits(model, probe)
            except Exception as error:  # models can raise any exception; another path still works
                reason = f"it raised {type(error).__name__}: {error}"
            else:
                # One product of the same hidden states: rounding does not add up over the blocks.
                apart = distance(found, expected)
                if apart <= tolerance(model) / 2:
                    objective.path, objective.note = path, _NOTES[path]
                    break
                reason = f"its logits differ by {apart:.2g} from the model's"
        reasons.append(f"not {path}: {reason}")
    objective.note = "; ".join([objective.note, *reasons])
    return objective


_NOTES: dict[HeadPath, str] = {
    "fused": "vocabulary projected at target positions only, in chunks",
    "own head": "the model's own head, at positions with a target",
}


def loss_paths(model: nn.Module) -> Mapping[HeadPath, str]:
    """Return the paths to the loss, cheapest first, each with the reason that rules it out, or an empty string."""
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {
        "fused": why_not_fused(model),
        "own head": "" if accepts else "the model does not take logits_to_keep",
        "whole logits": "",
    }


def why_not_fused(model: nn.Module) -> str:
    """Return why hidden states times the head's weight are not the logits of `model`; empty if they are."""
    head = output_embeddings(model)
    if backbone_of(model) is model or head is None:
        return "the model has no separate backbone and head"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if kind := packed_by(head):
        return f"the head is quantised ({kind})"
    if foreign_hooks(model) or not output_is_unadapted(head):
        return "the head has an adapter or another hook"
    if any(getattr(_text_config(model), cap, None) for cap in _CAPS):
        return "the logits are capped"
    return ""


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings of Gemma, RecurrentGemma and xLSTM that cap the logits. A trial with small logits would not detect a cap."""


def _logit_scale(model: nn.Module) -> float:
    """Return the factor between the head's output and the logits: Granite sets a divisor, Cohere a factor."""
    config = _text_config(model)
    if divisor := getattr(config, "logits_scaling", None):
        return 1 / divisor
    return getattr(config, "logit_scale", None) or 1.0


def _text_config(model: nn.Module) -> Any:
    """Return the settings of the decoder, which a model of images and text (Gemma 4) keeps in a part of its own."""
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


# Entries of a batch that the model takes; the others are for the loss and for counting tokens.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the model's inputs from a batch, with the mask in the form that its attention accepts."""
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    mask = inputs.get("attention_mask")
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    if mask is not None and mask.dtype == torch.bool and attention == "eager":
        # Eager attention adds the mask to the scores; the fused kernels accept boolean masks.
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs["attention_mask"] = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        inputs["attention_mask"].masked_fill_(~mask, torch.finfo(dtype).min)
    return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The targets of a padded or packed batch."""

    at: Tensor
    """Index of the position that predicts each target, in the flattened (rows * width) positions."""
    read_at: Tensor
    """These indices, each once."""
    ids: Tensor
    """Token id of each target."""
    weights: Tensor | None
    """Number of examples that share each target; None if each target belongs to one example."""
    width: int
    """Tokens in a row."""


def targets_of(batch: Batch) -> Targets:
    """Return the targets of a padded or packed batch, and the positions that predict them."""
    width = batch["input_ids"].shape[1]
    if "target_at" in batch:
        return Targets(
            at=batch["target_at"],
            read_at=batch["read_at"],
            ids=batch["targets"],
            weights=batch["target_weights"],
            width=width,
        )
    labels = batch["labels"][:, 1:]  # the previous position predicts a token
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    at = rows * width + columns
    return Targets(at=at, read_at=at, ids=labels[rows, columns], weights=None, width=width)


def _cross_entropy_sum(
    logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    reduction = "sum" if weights is None else "none"
    loss = F.cross_entropy(
        logits.float(), targets, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss if weights is None else loss @ weights


def distance(x: Tensor, expected: Tensor) -> float:
    """Return the relative distance over all rows; rounding can move a single row far."""
    x, expected = x.float(), expected.float()
    return float((x - expected).norm() / expected.norm())


def tolerance(model: nn.Module) -> float:
    """Return the relative rounding error to expect between two equivalent computations of `model`."""
    parameters = list(model.parameters())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
    autocast = any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in parameters})
    return 2e-2 if half or autocast else 1e-4
