"""What an adapter did to the model: how far its predictions on ordinary text have moved from the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters import handle_of
from lorakit.compute.adapted import ADAPTER, open_adapted
from lorakit.compute.batching import collator, context_length
from lorakit.compute.model_input import virtual_tokens_of
from lorakit.data.batches import IGNORED
from lorakit.data.readers import lines_of, reader_for
from lorakit.errors import BaseModelError, ConfigurationError, DataError, require_at_least
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import Base
from lorakit.tasks import LanguageExample
from lorakit.tasks.language_modelling import prompt_ids

_ROWS = 128
"""Distributions compared at a time: each is as wide as the vocabulary, in float64."""


def divergence(base_logits: Tensor, adapted_logits: Tensor) -> tuple[Tensor, Tensor]:
    """How two models' predictions differ at each of n positions.

    Args:
        base_logits: (n, classes).
        adapted_logits: (n, classes).

    Returns:
        ``KL(base || adapted)`` in nats, (n,) float64, and whether the likeliest class is another one,
        (n,) bool.

    Raises:
        ConfigurationError: The shapes differ.
    """
    if base_logits.shape != adapted_logits.shape or base_logits.ndim != 2:
        raise ConfigurationError(
            f"The logits have shapes {tuple(base_logits.shape)} and {tuple(adapted_logits.shape)}; two of one "
            "shape were expected, (positions, classes)."
        )
    parts = []
    for base, adapted in zip(base_logits.split(_ROWS), adapted_logits.split(_ROWS), strict=True):
        p, q = F.log_softmax(base.double(), -1), F.log_softmax(adapted.double(), -1)
        # Terms with p = 0 count as 0, also where q is 0 as well (a masked class).
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        parts.append(terms.sum(-1).clamp(min=0))
    return torch.cat(parts), base_logits.argmax(-1) != adapted_logits.argmax(-1)


@dataclass(frozen=True, kw_only=True)
class TextDrift:
    """What changed on one text."""

    text: str
    kl: list[float]
    """``KL(base || adapted)`` before each token but the first, in nats."""
    changed: int
    """Positions at which another token is the likeliest."""
    most: dict[str, Any]
    """The position that changed most: its context, and the likeliest token of both models."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What an adapter changed in a model's predictions on some texts."""

    texts: list[TextDrift]
    loss_base: float
    """Mean negative log-likelihood of the texts' tokens under the base, in nats."""
    loss_adapted: float
    """The same with the adapter."""
    notices: list[str] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Number of predictions compared."""
        return sum(len(text.kl) for text in self.texts)

    @property
    def kl(self) -> float:
        """Mean ``KL(base || adapted)`` of a prediction, in nats."""
        return sum(sum(text.kl) for text in self.texts) / self.positions

    @property
    def changed(self) -> float:
        """Share of the predictions whose likeliest token is another one."""
        return sum(text.changed for text in self.texts) / self.positions

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "overall": {
                "texts": len(self.texts),
                "positions": self.positions,
                "kl": self.kl,
                "changed": self.changed,
                "loss_base": self.loss_base,
                "loss_adapted": self.loss_adapted,
            },
            "texts": [vars(text) for text in self.texts],
            "notices": self.notices,
        }


def adapter_drift(
    adapter: str | Path,
    text_file: str | Path,
    *,
    base: BaseConfig | None = None,
    allow_other_base: bool = False,
    limit: int | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Drift:
    """Compare a model's predictions on a text file with and without an adapter.

    Virtual tokens that the adapter takes stand before each text; what is compared are the predictions of its tokens.

    Args:
        adapter: A folder of lorakit or PEFT.
        text_file: UTF-8 text; each line that is not blank is one text. Text unrelated to the adapter's task
            shows what it changed beside its task.
        base: The base model; None takes the one that the adapter records.
        allow_other_base: Accept a base other than the one the adapter records.
        limit: Read the first texts only.
        max_length: Longer texts are cut into pieces of this many tokens, or of the model's context.
        batch_size: Texts computed together.
        progress: Called with the number of texts done.

    Raises:
        LorakitError: The adapter, its base or the text cannot be read, or the model does not write text.
    """
    for name, value in (("limit", 1 if limit is None else limit), ("batch_size", batch_size)):
        require_at_least(name, value, 1)
    require_at_least("max_length", max_length, 2)
    texts = read_texts(text_file, limit)
    opened = open_adapted(base, str(adapter), allow_other_base=allow_other_base)
    if opened.model.config.is_encoder_decoder or not opened.model.can_generate():
        raise BaseModelError(
            f"Drift is measured on models that write text, and this adapter makes {type(opened.model).__name__} of "
            f"'{opened.source.name}', which does not. lorakit evaluate scores what such an adapter is for."
        )
    pieces = list(_pieces(opened, texts, max_length))
    if not pieces:
        raise DataError(f"{text_file} has no text of two tokens or more, so nothing is predicted.")
    # By length, so that batches hold little padding.
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    found: dict[int, TextDrift] = {}
    losses = [0.0, 0.0]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, drift, both in _compare(opened, [pieces[j] for j in chosen]):
            found[chosen[i]] = drift
            losses = [total + loss for total, loss in zip(losses, both, strict=True)]
        if progress is not None:
            progress(len(found))
    positions = sum(len(drift.kl) for drift in found.values())
    return Drift(
        texts=[found[i] for i in range(len(pieces))],
        loss_base=losses[0] / positions,
        loss_adapted=losses[1] / positions,
    )


def read_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: There is no such file, it is no text, or it is a data file with columns.
    """
    path = Path(path)
    if reader_for(path) is not None:
        raise DataError(
            f"{path} is a data file with columns; drift reads plain text, a text a line. lorakit evaluate reads "
            "data files."
        )
    try:
        lines = lines_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text.") from None
    texts = [line for line in lines if line.strip()][:limit]
    if not texts:
        raise DataError(f"{path} has no text in it.")
    return texts


def _pieces(base: Base, texts: Sequence[str], max_length: int) -> Iterator[list[int]]:
    assert base.tokenizer is not None  # open_adapted refuses a base without
    context = context_length(base.model)
    length = max_length
    if context is not None:
        length = min(max_length, context - virtual_tokens_of(base.model).total)
    for text in texts:
        ids = prompt_ids(base.tokenizer, text)
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) > 1:
                yield piece


@torch.no_grad()
def _predictions(base: Base, examples: Sequence[LanguageExample]) -> list[Tensor]:
    """The logits (targets, classes) for the targets of each example, with what is active now."""
    batch = collator(base)(examples)
    labels = batch.pop("labels")
    logits = base.model(**batch, use_cache=False).logits
    return [
        each[:-1][targets[1:] != IGNORED].cpu()
        for each, targets in zip(logits, labels, strict=True)
    ]


def _compare(
    base: Base, pieces: Sequence[list[int]]
) -> Iterator[tuple[int, TextDrift, tuple[float, float]]]:
    """What changed on each of the pieces, and the sums of the two models' losses."""
    tokenizer, handle = base.tokenizer, handle_of(base.model)
    assert handle is not None
    assert tokenizer is not None
    # Text after an empty prompt: virtual tokens of the adapter stand before all of it.
    examples = [
        LanguageExample(
            input_ids=ids,
            loss_mask=[False] + [True] * (len(ids) - 1),
            prompt_length=0,
            prompt="",
            completion="",
        )
        for ids in pieces
    ]
    predictions = []
    for choice in (None, ADAPTER):
        handle.activate(choice)
        predictions.append(_predictions(base, examples))
    for i, (ids, one, other) in enumerate(zip(pieces, *predictions, strict=True)):
        if not one.isfinite().all() or not other.isfinite().all():
            raise BaseModelError("The model's output is not finite. Try base.dtype float32.")
        kl, changed = divergence(one, other)
        most = int(kl.argmax())
        targets = torch.tensor(ids[1:])
        losses = tuple(
            float(F.cross_entropy(each.float(), targets, reduction="sum")) for each in (one, other)
        )
        drift = TextDrift(
            text=tokenizer.decode(ids),  # type: ignore[arg-type]
            kl=kl.tolist(),
            changed=int(changed.sum()),
            most={
                "context": tokenizer.decode(ids[: most + 1]),
                "kl": float(kl[most]),
                "base": tokenizer.decode([int(one[most].argmax())]),
                "adapted": tokenizer.decode([int(other[most].argmax())]),
            },
        )
        yield i, drift, losses  # type: ignore[misc]
