"""Training on from an adapter, perhaps one of another task: its head is carried over as far as it fits.

The paper starts MRPC, RTE and STS-B from the adapter of MNLI. The official code drops the head's last layer, whose
shape differs (3 classes against 2 or 1), and carries over the rest, RoBERTa's `classifier.dense` for one.
"""

from __future__ import annotations

from lorakit.adapters import Adapters, formats
from lorakit.adapters.loading import load_stored
from lorakit.models.heads import classification_head
from lorakit.models.layers import is_inside
from lorakit.models.loading import Base


def warm_start(base: Base, path: str, *, name: str) -> Adapters:
    """Put the adapter at `path` on a base to be trained on, and tell in its notices which parts of the head are new.

    Raises:
        LorakitError: The adapter cannot be read, or does not fit the base in more than its head.
    """
    stored = formats.read(path)
    heads = classification_head(base.model)
    anew = []
    for parameter, fresh in base.model.named_parameters():
        known = stored.trained.get(parameter, stored.base_copies.get(parameter))
        if known is None or known.shape == fresh.shape:
            continue
        if any(is_inside(parameter, head) for head in heads):
            stored.trained[parameter] = fresh.detach().clone()
            stored.base_copies.pop(parameter, None)
            anew.append(f"{parameter} {tuple(known.shape)} -> {tuple(fresh.shape)}")
    adapters = load_stored(base.model, stored, path, name=name, trainable=True)
    if anew:
        kept = [n for n in stored.trained if any(is_inside(n, head) for head in heads)]
        kept = [n for n in kept if not any(entry.startswith(f"{n} ") for entry in anew)]
        base.notices.append(
            f"warm start from {path}: its head is for another task, so {', '.join(anew)} starts anew; "
            + (f"{', '.join(kept)} and the adapter" if kept else "the adapter")
            + " carried over"
        )
    return adapters
