"""Trials of faster computations on the model itself.

A model's structure does not show everything: the model may ignore a mask or have its own attention. A trial therefore
computes a small batch both ways, and accepts the faster way if the results agree to the rounding of the dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.compute.batching import attention_windows
from lorakit.compute.last_block import LastBlock, last_block
from lorakit.compute.mode import evaluating
from lorakit.compute.objective import (
    Batch,
    LabelLoss,
    LanguageModellingLoss,
    distance,
    tolerance,
    with_decoder_inputs,
)
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.models.faster import make_faster, make_stock, use_own_attention
from lorakit.models.heads import backbone_of, output_embeddings
from lorakit.tasks import Example, LanguageExample

T = TypeVar("T", bound=LabelLoss | LanguageModellingLoss)
E = TypeVar("E", bound=Example)

SHORT_PROMPT, SHORT_COMPLETION = 16, 8
"""Tokens of a `shortened` example."""

Faster = Literal["layers", "attention", "none"]
"""Which layers of lorakit to use: attention, norms, activations and dropout; only the attention; or none."""


def shortened(example: E) -> E:
    """Return an example for a trial of what does not depend on length: the start of its prompt and of its completion.

    Whole logits then take little memory, and a completion that sees tokens of another one differs in a large part of
    its tokens. All tokens of the completion are targets. A labelled example stays whole: it has few logits.
    """
    if not isinstance(example, LanguageExample):
        return example
    cut = _start_of_completion(example)
    prompt = example.input_ids[:cut][:SHORT_PROMPT]
    completion = example.input_ids[cut:][:SHORT_COMPLETION]
    return replace(
        example,
        input_ids=[*prompt, *completion],
        loss_mask=[False] * len(prompt) + [True] * len(completion),
        prompt_length=len(prompt),
    )


def why_not_packed(model: PreTrainedModel, *examples: LanguageExample) -> str:
    """Return why packing changes the results of `model`; empty if it does not.

    For each example, a trial computes two completions of its prompt together, with the prompt as a shared prefix, and
    each alone. It compares the hidden states at all tokens of the completions. A window that is shorter than an
    example is read from the configuration: it moves hidden states by less than bfloat16 rounds them. The examples are
    the longest one and a `shortened` one, with the virtual tokens that the model expects.
    """
    longest = max(map(len, examples))
    window = min(attention_windows(model), default=longest)
    if window < longest:
        return (
            f"its attention reaches back {window:,} tokens, and the longest example has {longest:,}"
        )
    objective = LanguageModellingLoss()
    for pair in map(_two_completions, examples):
        try:
            batches = [pack(pair, pad_id=0), *(collate([one], pad_id=0) for one in pair)]
            together, *alone = [
                _used_outputs(objective, model, {k: x.to(model.device) for k, x in batch.items()})
                for batch in batches
            ]
        except Exception as error:  # models can raise any exception; padded batches still work
            return f"it raised {type(error).__name__}: {error}"
        apart = distance(together, torch.cat(alone))
        if not apart <= _limit(model):
            return f"its hidden states differ by {apart:.2g} from those of separate examples"
    return ""


def _two_completions(example: LanguageExample) -> list[LanguageExample]:
    """Return two examples that share the prompt of `example` and no other token, in the order of `pack`.

    Each completion has at least two tokens, all of them targets. Packing then merges no targets, and each completion
    has a token whose hidden state depends on the mask.
    """
    cut = _start_of_completion(example)
    prompt, completion = example.input_ids[:cut], example.input_ids[cut:] or example.input_ids
    first, rest = completion[0], completion[1:] or completion
    # Token 0 is often padding, whose vector can be zero and show nothing.
    other = next(token for token in (*completion, 1, 2) if token != first)
    return [
        replace(
            example,
            input_ids=[*prompt, start, *rest],
            loss_mask=[False] * cut + [True] * (1 + len(rest)),
        )
        for start in sorted((first, other))
    ]


def _start_of_completion(example: LanguageExample) -> int:
    """Return where the completion starts, after at least one token and, if possible, before the last one."""
    return max(1, min(example.prompt_length, len(example) - 1))


def try_faster(
    model: PreTrainedModel, batch: Batch, short: Batch, faster: Faster = "layers"
) -> str:
    """Install lorakit's own attention and layers in place, or return why the stock layers stay.

    The hidden states of a decoder must not change for the padded `batch`, nor the logits for `short`, the batch of its
    `shortened` examples; both are on the model's device. "attention" is a compiled kernel, so its backward pass is
    tried too.
    """
    try:
        with evaluating(model):
            before = _outputs(model, batch, short)
        make_faster(model) if faster == "layers" else use_own_attention(model)
        with evaluating(model):
            after = _outputs(model, batch, short)
        apart = [distance(x, expected) for x, expected in zip(after, before, strict=True)]
        limit, reason = _limit(model), ""
        if not all(one <= limit for one in apart):  # NaN is no agreement
            reason = f"the results would differ by {max(apart):.2g}"
        if faster == "attention":
            _try_backward(model, batch, short)
    except Exception as error:  # models can raise any exception; the stock layers still work
        reason = f"it raised {type(error).__name__}: {error}"
    if reason:
        make_stock(model)
    return reason


def try_last_block(objective: T, model: nn.Module, batch: Batch) -> T:
    """Return `objective` with the last block computed only for used tokens, if this does not change results.

    The padded `batch` has examples of different lengths. The `last_block` of `objective` is None.
    """
    block = last_block(model)
    if block is None or not block.can_gather:
        return objective
    if isinstance(objective, LanguageModellingLoss) and objective.path != "fused":
        return objective
    trial_block = replace(block, max_share=1.0)  # gather even if nearly all tokens are used
    matching: list[T] = []
    try:
        before = _used_outputs(objective, model, batch)
        for changed, note in _variants(objective, trial_block):
            if distance(_used_outputs(changed, model, batch), before) <= tolerance(model):
                notes = filter(None, (objective.note, note))
                matching.append(replace(changed, last_block=block, note="; ".join(notes)))
    except Exception:  # models can raise any exception; the full block still works
        return objective
    # If both tokens match, the batch does not show which one the head uses.
    return matching[0] if len(matching) == 1 and trial_block.gather_count else objective


def _variants(objective: T, block: LastBlock) -> Iterator[tuple[T, str]]:
    """Yield the objectives that use some tokens of the last block, each with a note for the user."""
    if isinstance(objective, LanguageModellingLoss):
        yield replace(objective, last_block=block), "last block too"
        return
    for reads in ("first", "last"):
        changed = replace(objective, last_block=block, reads=reads)
        yield changed, f"last block computed at each example's {reads} token only"


def _used_outputs(
    objective: LabelLoss | LanguageModellingLoss, model: nn.Module, batch: Batch
) -> Tensor:
    """Return the model's outputs that the loss uses: hidden states at targets, or the logits of labels."""
    with evaluating(model):
        if isinstance(objective, LabelLoss):
            return objective.predict(model, batch)
        return objective.hidden_at_targets(model, batch)


def _outputs(model: PreTrainedModel, batch: Batch, short: Batch) -> list[Tensor]:
    """Return the logits of a short batch, and of a decoder the hidden states of a batch, which take less memory."""
    outputs = [_forward(model, model, short).logits]
    backbone = backbone_of(model)
    has_vocabulary = output_embeddings(model) is not None
    if has_vocabulary and backbone is not model and not model.config.is_encoder_decoder:
        outputs.append(_forward(model, backbone, batch).last_hidden_state)
    return outputs


def _forward(model: PreTrainedModel, part: nn.Module, batch: Batch) -> Any:
    """Compute the model, or its part without head."""
    inputs: dict[str, Any] = dict(batch)
    if model.config.is_encoder_decoder:
        inputs = dict(with_decoder_inputs(model, batch))
    else:
        inputs.pop("labels", None)
    if "use_cache" in inspect.signature(part.forward).parameters:
        # As in training: a compiled kernel depends on the strides of its inputs.
        inputs["use_cache"] = False
    return part(**inputs)


def _try_backward(model: PreTrainedModel, batch: Batch, short: Batch) -> None:
    """Compute and discard gradients, since a compiled kernel may fail only in the backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        outputs = [one for one in _outputs(model, batch, short) if one.requires_grad]
        total = torch.stack([one.sum(dtype=torch.float32) for one in outputs]).sum()
        torch.autograd.grad(total, trained, allow_unused=True)


def _limit(model: nn.Module) -> float:
    """Return the distance up to which two computations count as equal.

    Rounding errors of a deep model in half precision add up (0.02 over SmolLM2's 30 layers). An ignored mask or scale
    changes results by a multiple of this limit.
    """
    return 5 * tolerance(model)
