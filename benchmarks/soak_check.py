"""Check kept answers against the base with the adapter added to its weights, in float32.

The reference shares nothing with lorakit's adapters, its engine or its cache: the weights are W + scale x B A, the
model and its cache are those of transformers, and the cache holds what a few prompts of one content share.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.soak_load import Kept, Timeline
from lorakit.evaluation.prompt_cache import ARGUMENT

BOUNDS = {"float32": 2e-3, "bfloat16": 0.5}
"""Largest difference of a log-probability from the reference, by the dtype that is served. In bfloat16 the reference
has the same rounded weights, but its activations are not rounded."""
BATCH = 16
"""Answers in a forward pass of the reference."""

Content = tuple[tuple[str, float], ...]
"""Contents and weights; empty is the base."""


@dataclass(frozen=True)
class Wrong:
    """A wrong answer."""

    kept: Kept
    reason: str


@dataclass
class Checked:
    """The result of a check."""

    answers: int = 0
    tokens: int = 0
    greedy: int = 0
    """Checked tokens of greedy answers."""
    worst: float = 0.0
    """Largest difference of a log-probability in an answer that is not wrong."""
    unreadable: int = 0
    """Answers whose tokens could not all be told from their texts. Only those before are checked."""
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of wrong answers by reason, without the details in brackets."""
        return dict(Counter(w.reason.partition(" (")[0] for w in self.wrong))


class Vocabulary:
    """The token of each text. Parts of a character have no text of their own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ids: dict[str, int] = {}
        twice = set()
        for token in range(len(tokenizer)):
            text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            if text in self._ids:
                twice.add(text)
            self._ids.setdefault(text, token)
        for text in twice:
            del self._ids[text]

    def ids(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens up to the first text that has none, or several."""
        found = []
        for text in texts:
            if "\ufffd" in text or text not in self._ids:
                break
            found.append(self._ids[text])
        return found


class Reference:
    """A model in float32 whose weights take on the adapters.

    Args:
        model: The base in float32.
        folders: PEFT folders with LoRA adapters, by content.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self.model = model.requires_grad_(False).eval()
        self._folders = folders

    @contextmanager
    def adapted(self, content: Content) -> Iterator[None]:
        """Add adapters to the weights."""
        originals: dict[str, Tensor] = {}
        for name, weight in content:
            for path, change in _changes(self._folders[name]):
                parameter = self.model.get_parameter(path)
                originals.setdefault(path, parameter.data.clone())
                parameter.data += weight * change
        try:
            yield
        finally:
            for path, data in originals.items():
                self.model.get_parameter(path).data.copy_(data)

    @torch.inference_mode()
    def logprobs(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """Return the log-probabilities of each answer's positions and of the next token, as (answer + 1, vocabulary).

        Args:
            rows: Prompt and answer of each row.
        """
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(rows):
            tokens = torch.tensor([*prompt, *answer])
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
        # The beginning that all prompts share is computed once; their last tokens are needed in any case.
        shared = len(os.path.commonprefix([list(prompt[:-1]) for prompt, _ in rows]))  # noqa: RUF071, of any lists
        options: dict[str, Any] = {"attention_mask": mask}
        if shared:
            cache = DynamicCache(config=self.model.config)
            self.model.base_model(input_ids=ids[:1, :shared], use_cache=True, **{ARGUMENT: cache})
            cache.batch_repeat_interleave(len(rows))
            options |= {"use_cache": True, ARGUMENT: cache}
        hidden = self.model.base_model(input_ids=ids[:, shared:], **options).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None
        return [
            head(hidden[i, len(prompt) - 1 - shared : len(prompt) + len(answer) - shared])
            .float()
            .log_softmax(-1)
            for i, (prompt, answer) in enumerate(rows)
        ]


def _changes(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that an adapter changes, and the changes."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            path = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            yield path, scale * (b.float() @ a.float())


def receipt_of(fingerprint: str) -> tuple[str, list[tuple[str, str, float]]]:
    """Return the base's digest, and the name, digest and weight of each adapter, from a fingerprint.

    Raises:
        ValueError: It is not a receipt.
    """
    first, *others = fingerprint.split(";")
    if not first.startswith("base="):
        raise ValueError(f"{fingerprint!r} does not begin with base=")
    adapters = []
    for part in others:
        name, _, rest = part.rpartition("=")
        digest, _, weight = rest.partition("*")
        adapters.append((name, digest, float(weight or 1)))
    return first[5:], adapters


def content_of(
    kept: Kept, digests: Mapping[str, str], timeline: Timeline, base: str = ""
) -> Content:
    """Return the contents that computed an answer, by its receipt.

    Args:
        kept: The answer.
        digests: Content by the first 16 digits of its digest.
        timeline: What the names stood for.
        base: Digest of the base; empty accepts any.

    Raises:
        ValueError: The receipt is missing, names other adapters than the request, or a content that no name stood for
            at the time of the request.
    """
    found_base, adapters = receipt_of(kept.fingerprint)
    if not base.startswith(found_base) and base:
        raise ValueError(f"receipt of another base ({found_base}, not {base})")
    header = kept.receipt.get("x-lorakit-adapter", "")
    asked = sorted(kept.question.adapters)
    if sorted((name, weight) for name, _, weight in adapters) != asked:
        raise ValueError(f"receipt of other adapters ({kept.fingerprint}, not {asked})")
    content = []
    for name, digest, weight in adapters:
        if header and digest not in header:
            raise ValueError(f"header and fingerprint differ ({header}, {kept.fingerprint})")
        if digest not in digests:
            raise ValueError(f"receipt of an unknown content ({kept.fingerprint})")
        found = digests[digest]
        if not timeline.may_be(name, found, kept.sent, kept.headers):
            raise ValueError(f"stale or foreign content ({name} was not {found})")
        content.append((found, weight))
    return tuple(sorted(content))


def check(
    answers: Sequence[Kept],
    reference: Reference,
    vocabulary: Vocabulary,
    digests: Mapping[str, str],
    timeline: Timeline,
    *,
    bound: float,
    base: str = "",
    end_tokens: frozenset[int] = frozenset(),
) -> Checked:
    """Check every answer, grouped by the contents that computed it."""
    result = Checked()
    groups: dict[Content, list[Kept]] = defaultdict(list)
    for kept in answers:
        try:
            groups[content_of(kept, digests, timeline, base)].append(kept)
        except ValueError as error:
            result.answers += 1
            result.wrong.append(Wrong(kept, str(error)))
    for content, group in sorted(groups.items()):
        # Answers of similar beginnings and lengths share a forward pass.
        group.sort(
            key=lambda kept: (
                kept.question.prompt[:8],
                len(kept.question.prompt) + len(kept.tokens),
            )
        )
        with reference.adapted(content):
            for start in range(0, len(group), BATCH):
                part = group[start : start + BATCH]
                ids = [vocabulary.ids(kept.tokens) for kept in part]
                rows = [(kept.question.prompt, own) for kept, own in zip(part, ids, strict=True)]
                for kept, own, scores in zip(part, ids, reference.logprobs(rows), strict=True):
                    _check_one(kept, own, scores, result, bound, end_tokens)
    return result


def _check_one(
    kept: Kept,
    ids: list[int],
    scores: Tensor,
    result: Checked,
    bound: float,
    end_tokens: frozenset[int],
) -> None:
    result.answers += 1
    result.tokens += len(ids)
    is_whole = len(ids) == len(kept.tokens)
    result.unreadable += not is_whole
    is_greedy = kept.question.temperature == 0
    own = scores[: len(ids)].gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]
    worst = 0.0
    if len(kept.logprobs) != len(kept.tokens):
        result.wrong.append(Wrong(kept, "tokens and log-probabilities differ in number"))
        return
    if ids:
        difference = (own - torch.tensor(kept.logprobs[: len(ids)])).abs()
        worst = float(difference.max())
        if not worst <= bound:  # also NaN
            at = int(difference.nan_to_num(torch.inf).argmax())
            reason = f"log-probability off (by {worst:.3g} at token {at} of {len(ids)})"
            result.wrong.append(Wrong(kept, reason))
            return
    if is_greedy and ids:
        result.greedy += len(ids)
        # Both of two scores may be off by the bound.
        behind = float((scores[: len(ids)].max(-1).values - own).max())
        if not behind <= 2 * bound:
            result.wrong.append(Wrong(kept, f"not the most likely token ({behind:.3g} behind)"))
            return
    if is_whole and (reason := _wrong_end(kept, ids, scores, bound, end_tokens)):
        result.wrong.append(Wrong(kept, reason))
        return
    result.worst = max(result.worst, worst)


def _wrong_end(
    kept: Kept, ids: list[int], scores: Tensor, bound: float, end_tokens: frozenset[int]
) -> str | None:
    """Return why an answer must not have ended where it did."""
    if kept.finish == "length":
        if len(ids) != kept.question.max_tokens:
            return f"cut short ({len(ids)} of {kept.question.max_tokens} tokens)"
        return None
    if kept.finish != "stop":
        return f"no reason for the end ({kept.finish})"
    if ids and ids[-1] in end_tokens:
        return None
    if kept.question.temperature == 0:
        likely = max((float(scores[len(ids), token]) for token in end_tokens), default=-torch.inf)
        if not float(scores[len(ids)].max()) - likely <= 2 * bound:
            return "ended before the end token"
    return None
