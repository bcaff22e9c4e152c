"""Drift of a model's predictions: their KL divergence on a text with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.handle import own_handle
from lorakit.compute.adapted import ADAPTER, open_adapted
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.batching import collator, context_length
from lorakit.compute.model_input import virtual_tokens_of
from lorakit.data.batches import IGNORED
from lorakit.data.readers import reader_for, text_lines
from lorakit.errors import BaseModelError, ConfigurationError, DataError, require_at_least
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import Base
from lorakit.tasks import LanguageExample
from lorakit.tasks.language_modelling import encode_text, start_ids

_ROWS = 128
"""Distributions compared at a time; each is a float64 row as wide as the vocabulary."""


def divergence(base_logits: Tensor, adapted_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence of two models' predictions at each of n positions.

    Args:
        base_logits: (n, classes).
        adapted_logits: (n, classes).

    Returns:
        ``KL(base || adapted)`` in nats, (n,) float64, and whether the most likely class changed, (n,) bool.

    Raises:
        ConfigurationError: The shapes differ.
    """
    if base_logits.shape != adapted_logits.shape or base_logits.ndim != 2:
        raise ConfigurationError(
            f"The logits have shapes {tuple(base_logits.shape)} and {tuple(adapted_logits.shape)}; two of equal shape "
            "(positions, classes) were expected."
        )
    parts = []
    for base, adapted in zip(base_logits.split(_ROWS), adapted_logits.split(_ROWS), strict=True):
        p, q = F.log_softmax(base.double(), -1), F.log_softmax(adapted.double(), -1)
        # Terms with p = 0 are 0, even if q = 0 (a masked class).
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        parts.append(terms.sum(-1).clamp(min=0))
    return torch.cat(parts), base_logits.argmax(-1) != adapted_logits.argmax(-1)


@dataclass(frozen=True, kw_only=True)
class PieceDrift:
    """Drift on a text, or on a piece of one that is longer than `max_length`."""

    text: str
    kl: list[float]
    """``KL(base || adapted)`` of the predictions of all tokens except the first, in nats."""
    changed: int
    """Number of positions at which the most likely token changed."""
    most: dict[str, Any]
    """The position with the largest divergence: its context, and each model's most likely token."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift of a model's predictions on several texts."""

    texts: int
    """Number of texts compared."""
    pieces: list[PieceDrift]
    loss_base: float
    """Mean negative log-likelihood of the texts' tokens under the base, in nats."""
    loss_adapted: float
    """Mean negative log-likelihood of the texts' tokens with the adapter, in nats."""
    notices: list[str] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Number of predictions compared."""
        return sum(len(piece.kl) for piece in self.pieces)

    @property
    def kl(self) -> float:
        """Mean ``KL(base || adapted)`` over all predictions, in nats."""
        return sum(sum(piece.kl) for piece in self.pieces) / self.positions

    @property
    def changed(self) -> float:
        """Share of the predictions whose most likely token changed."""
        return sum(piece.changed for piece in self.pieces) / self.positions

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "overall": {
                "texts": self.texts,
                "positions": self.positions,
                "kl": self.kl,
                "changed": self.changed,
                "loss_base": self.loss_base,
                "loss_adapted": self.loss_adapted,
            },
            "pieces": [vars(piece) for piece in self.pieces],
            "notices": self.notices,
        }


def adapter_drift(
    adapter: str | Path,
    text: str | Path,
    *,
    base: BaseConfig | str | None = None,
    allow_other_base: bool = False,
    limit: int | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Drift:
    """Compare a model's predictions on a text file with and without an adapter.

    The adapter's virtual tokens, if any, precede each text. Only predictions of the text's own tokens are compared.

    Args:
        adapter: A lorakit or PEFT folder.
        text: A UTF-8 file; each non-blank line is one text. Use text unrelated to the adapter's task to see its side
            effects.
        base: The base model, or its name; None uses the base that the adapter records.
        allow_other_base: Accept a base other than the recorded one.
        limit: Maximum number of texts, from the first; None reads all.
        max_length: Maximum tokens per piece; longer texts are split. The model's context also limits it.
        batch_size: Pieces per forward pass.
        progress: Called with the number of pieces done.

    Raises:
        LorakitError: The adapter, its base or the text cannot be read, or the model does not generate text.
    """
    require_at_least("limit", limit, 1)
    require_at_least("batch_size", batch_size, 1)
    require_at_least("max_length", max_length, 2)
    texts = read_texts(text, limit)
    opened = open_adapted(base, AdapterFile.read(adapter), allow_other_base=allow_other_base)
    if opened.model.config.is_encoder_decoder or not opened.model.can_generate():
        raise BaseModelError(
            f"Drift needs a decoder-only model that generates text, but with this adapter '{opened.source.name}' is a "
            f"{type(opened.model).__name__}. lorakit evaluate scores such adapters on their task."
        )
    by_text = [pieces for pieces in _pieces(opened, texts, max_length) if pieces]
    pieces = [piece for pieces in by_text for piece in pieces]
    if not pieces:
        raise DataError(
            f"{text} has no text of two or more tokens, so there are no predictions to compare. Add longer texts."
        )
    # Sorting by length reduces padding.
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    compared: dict[int, tuple[PieceDrift, list[float]]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        results = _compare(opened, [pieces[i] for i in batch])
        compared.update(zip(batch, results, strict=True))
        if progress is not None:
            progress(len(compared))
    drifts = [compared[i][0] for i in range(len(pieces))]
    positions = sum(len(drift.kl) for drift in drifts)
    loss_base, loss_adapted = (
        sum(losses) / positions
        for losses in zip(*(both for _, both in compared.values()), strict=True)
    )
    return Drift(texts=len(by_text), pieces=drifts, loss_base=loss_base, loss_adapted=loss_adapted)


def read_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """Return the non-blank lines of a text file.

    Raises:
        DataError: The file does not exist, is not text, or is a data file with columns.
    """
    path = Path(path)
    if reader_for(path) is not None:
        raise DataError(
            f"{path} is a data file with columns; drift reads plain text with one text per line. lorakit evaluate "
            "reads data files."
        )
    texts = [line for line in text_lines(path) if line.strip()][:limit]
    if not texts:
        raise DataError(f"{path} has no text; at least one non-blank line was expected.")
    return texts


def _pieces(base: Base, texts: Sequence[str], max_length: int) -> Iterator[list[list[int]]]:
    """Yield the ids of each text in pieces of at most `max_length` tokens, without those of a single token.

    Every piece starts as a text does (with bos), so that the model predicts it from an input of a known form.
    """
    context = context_length(base.model)
    length = max_length
    if context is not None:
        length = min(max_length, context - virtual_tokens_of(base.model).total)
    start = start_ids(base.text_tokenizer)
    room = max(length - len(start), 1)
    for text in texts:
        ids = encode_text(base.text_tokenizer, text)
        pieces = (start + ids[at : at + room] for at in range(0, len(ids), room))
        yield [piece for piece in pieces if len(piece) > 1]


@torch.no_grad()
def _predictions(base: Base, examples: Sequence[LanguageExample]) -> list[Tensor]:
    """Return the logits (targets, classes) of each example's targets, with the active adapter."""
    batch = collator(base)(examples)
    labels = batch.pop("labels")
    logits = base.model(**batch, use_cache=False).logits
    return [
        each[:-1][targets[1:] != IGNORED].cpu()
        for each, targets in zip(logits, labels, strict=True)
    ]


def _compare(base: Base, pieces: Sequence[list[int]]) -> Iterator[tuple[PieceDrift, list[float]]]:
    """Yield the drift of each piece, and the summed losses of the base and the adapted model."""
    tokenizer, handle = base.text_tokenizer, own_handle(base.model)
    assert handle is not None
    # With an empty prompt, the adapter's virtual tokens precede the whole text.
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
    for ids, base_logits, adapted_logits in zip(pieces, *predictions, strict=True):
        both = (base_logits, adapted_logits)
        if not all(logits.isfinite().all() for logits in both):
            raise BaseModelError("The model's output is not finite. Set base.dtype to float32.")
        kl, changed = divergence(base_logits, adapted_logits)
        most = int(kl.argmax())
        targets = torch.tensor(ids[1:])
        losses = [
            float(F.cross_entropy(logits.float(), targets, reduction="sum")) for logits in both
        ]
        drift = PieceDrift(
            text=tokenizer.decode(ids),  # type: ignore[arg-type]
            kl=kl.tolist(),
            changed=int(changed.sum()),
            most={
                "context": tokenizer.decode(ids[: most + 1]),
                "kl": float(kl[most]),
                "base": tokenizer.decode([int(base_logits[most].argmax())]),
                "adapted": tokenizer.decode([int(adapted_logits[most].argmax())]),
            },
        )
        yield drift, losses
