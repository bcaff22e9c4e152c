"""Cases that cover every architecture with every target, and every pair of option values."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from dataclasses import dataclass

import tiny_models
import torch
from layouts import LAYOUTS, Target, expected_targets, head_module
from torch import nn
from transformers import PreTrainedModel

from lorakit import LoRA

TARGETS = ("q", "qv", "attention", "mlp", "all-linear", "embedding", "head")
TARGETS += ("names", "regex", "mixed")
OPTIONS: dict[str, tuple] = {
    "rank": (2, "pattern"),
    "alpha": (3.0, "pattern"),
    "scaling": ("standard", "rslora"),
    "dora": (False, True),
    "bias": ("none", "all", "lora_only"),
    "init": ("kaiming", "gaussian", "pissa"),
    "train": ("nothing", "head", "norm"),
    "dropout": (0.0, 0.5),
    "task": ("natural", "classification"),
}
"""Options that vary besides architecture and target. The task decides on the model's head."""

NOT_COMBINED = {
    "dora with init pissa": "both redefine the base weight, so lorakit rejects the pair",
    "bias without a bias": "bias='all' or 'lora_only' is an error if no (adapted) layer has a bias",
    "head trained and adapted": "a module is either trained in full or adapted, never both",
    "mlp and all-linear of mixtral": "its experts have tests of their own (test_experts): mlp does not include them, "
    "and they take no dropout",
    "classification head of granite": "transformers has none",
}
"""Pairs that no case contains, with the reason; `test_rejected_pairs` of test_attach_detach checks the errors."""


@dataclass(frozen=True)
class Case:
    """One tiny model and one LoRA on it."""

    arch: str
    targets: str
    rank: int | str
    alpha: float | str
    scaling: str
    dora: bool
    bias: str
    init: str
    train: str
    dropout: float
    task: str

    @property
    def head(self) -> str:
        natural = tiny_models.natural_head(self.arch)
        return natural if self.task == "natural" else "sequence-classification"

    @property
    def entries(self) -> tuple[str, ...]:
        """Targets as in lorakit's configuration."""
        query, other = LAYOUTS[self.arch].names
        return {
            "q": ("attention.q",),
            "qv": ("attention.qv",),
            "names": (query, other),
            "regex": (rf".*\.1\.(.*\.)?{query}",),
            "mixed": ("attention.v", "embedding"),
        }.get(self.targets, (self.targets,))

    @property
    def expected(self) -> dict[str, Target]:
        """Adapted layers by path."""
        return expected_targets(self.arch, self.head, self.entries)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Rank of one layer, named by its path as a regular expression."""
        if self.rank != "pattern":
            return {}
        return {re.escape(min(self.expected)): 3}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Alpha of all layers with one name, named by that suffix."""
        if self.alpha != "pattern":
            return {}
        return {max(self.expected).rpartition(".")[2]: 5.0}

    @property
    def train_modules(self) -> tuple[str, ...]:
        return {
            "nothing": (),
            "head": (head_module(self.arch, self.head),),
            "norm": (LAYOUTS[self.arch].norm,),
        }[self.train]

    def method(self) -> LoRA:
        return LoRA(
            rank=2,
            alpha=3.0,
            targets=self.entries,
            dropout=self.dropout,
            bias=self.bias,
            init=self.init,
            scaling=self.scaling,
            dora=self.dora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            train_modules=self.train_modules,
        )

    def model(self) -> PreTrainedModel:
        """Return a new copy of the tiny model."""
        return fresh_model(self.arch, self.head)

    def batch(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return two rows, the first padded on the left."""
        return tiny_models.example_batch(self.arch, model)

    def __str__(self) -> str:
        """Return a test id with the options that differ from their first value."""
        changed = [
            name if value is True else f"{name}={value}"
            for name, values in OPTIONS.items()
            if (value := getattr(self, name)) != values[0]
        ]
        return "-".join([self.arch, self.targets, *changed])


@functools.cache
def _pristine(arch: str, head: str) -> PreTrainedModel:
    return tiny_models.build(arch, head)


def fresh_model(arch: str, head: str) -> PreTrainedModel:
    """Return a copy of a tiny model that a test may change."""
    return copy.deepcopy(_pristine(arch, head))


def is_allowed(case: Case) -> bool:
    """Return whether a case avoids NOT_COMBINED."""
    if case.arch == "granite" and case.task == "classification":
        return False
    if case.arch == "mixtral" and case.targets in ("mlp", "all-linear"):
        return False
    if case.dora and case.init == "pissa":
        return False
    if case.targets == "head" and case.train == "head":
        return False
    if case.bias == "none":
        return True
    names = [name for name, _ in _pristine(case.arch, case.head).named_parameters()]
    if case.bias == "all":
        return any(name.endswith(".bias") for name in names)
    return any(f"{path}.bias" in names for path in case.expected)


def pairs(case: Case) -> frozenset[tuple]:
    """Return every pair of settings of a case."""
    settings = [(name, getattr(case, name)) for name in ("arch", "targets", *OPTIONS)]
    return frozenset(itertools.combinations(settings, 2))


def all_pairs() -> set[tuple]:
    """Return every possible pair of settings."""
    values = {"arch": tuple(LAYOUTS), "targets": TARGETS, **OPTIONS}
    return {
        ((one, a), (other, b))
        for one, other in itertools.combinations(values, 2)
        for a, b in itertools.product(values[one], values[other])
    }


@functools.cache
def cases() -> tuple[Case, ...]:
    """Return a covering array of strength two: a case per architecture and target, then the missing pairs.

    Greedy, as in AETG (Cohen et al. 1997): add the random candidate that covers the most missing
    pairs. The seed is fixed, so the cases are always the same.
    """
    draw = random.Random(0)
    missing = all_pairs()
    chosen: list[Case] = []

    def add(arch: str, targets: str, fixed: dict, candidates: int) -> None:
        best, gain = None, 0
        for _ in range(candidates):
            options = {name: draw.choice(values) for name, values in OPTIONS.items()} | fixed
            case = Case(arch, targets, **options)
            if is_allowed(case) and (covered := len(pairs(case) & missing)) > gain:
                best, gain = case, covered
        if best is not None:
            chosen.append(best)
            missing.difference_update(pairs(best))

    for arch, targets in itertools.product(LAYOUTS, TARGETS):
        add(arch, targets, {}, candidates=30)
    for pair in sorted(missing, key=repr):
        if pair not in missing:
            continue
        fixed = dict(pair)
        for targets in [fixed.pop("targets", None)] if "targets" in fixed else TARGETS:
            for arch in [fixed["arch"]] if "arch" in fixed else LAYOUTS:
                rest = {name: value for name, value in fixed.items() if name in OPTIONS}
                if pair in missing:
                    add(arch, targets, rest, candidates=10)
    return tuple(chosen)


def _layer_kinds(case: Case) -> set[str]:
    """Return the kinds of layers that a case adapts: type, bias, slices, and a head's tie."""
    model = _pristine(case.arch, case.head)
    head = model.get_output_embeddings()
    kinds = set()
    for path, target in case.expected.items():
        layer = model.get_submodule(path)
        kind = "Embedding" if isinstance(layer, nn.Embedding) else type(layer).__name__
        kind += " with bias" * (getattr(layer, "bias", None) is not None)
        if target.slices:
            rows = target.slices[0]
            kind += " by slices" if rows[-1] - rows[0] < len(rows) else " by interleaved slices"
            kind += " of unequal size" * (len(set(map(len, target.slices))) > 1)
        if layer is head:
            kind += " as tied head" if model.config.tie_word_embeddings else " as head"
        kinds.add(kind)
    return kinds


def _combinations(case: Case) -> set[frozenset]:
    """Return what `few_cases` covers of a case."""
    options = [(name, getattr(case, name)) for name in OPTIONS]
    kinds = [("kind", kind) for kind in _layer_kinds(case)]
    return {
        frozenset([("arch", case.arch)]),
        *map(frozenset, itertools.combinations(options, 2)),
        *map(frozenset, itertools.product(kinds, [*options, ("targets", case.targets)])),
    }


@functools.cache
def few_cases() -> tuple[Case, ...]:
    """Return the fewest of `cases` that a greedy choice needs for the same combinations.

    Each architecture occurs, each pair of option values, and each kind of layer with every option
    value and every target. Architectures of one layout share their kinds of layers, so a check of
    `attach` or `merge` needs no more. The files of PEFT are read and written for all `cases`.
    """
    covers = {case: _combinations(case) for case in cases()}
    missing = set().union(*covers.values())
    chosen: list[Case] = []
    while missing:
        chosen.append(max(covers, key=lambda case: len(covers[case] & missing)))
        missing -= covers[chosen[-1]]
    return tuple(chosen)
