"""LoRA's settings: targets, ranks and initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.configuration import strict
from lorakit.errors import ConfigurationError, TargetError, nearest, require_at_least
from lorakit.formatting import listed
from lorakit.methods.lora.init import Init
from lorakit.methods.method import TrainsModules, as_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule
    from lorakit.models.patterns import PatternTable
    from lorakit.models.places import Place

Bias = Literal["none", "all", "lora_only"]
Scaling = Literal["standard", "rslora"]


@strict
@dataclass(frozen=True, kw_only=True)
class LoRA(TrainsModules):
    """Low-rank adaptation: ``h = W0 x + scaling * B A x`` (Hu et al. 2021, section 4.1).

    ``A`` is (rank, in_features), ``B`` is (out_features, rank); both are trained, ``W0`` is not.

    Raises:
        ConfigurationError: A value is invalid, or two settings exclude each other.
    """

    default_rate: ClassVar[float] = 5e-4
    """Peak learning rate: ten times that of full fine-tuning. The paper's Table 9 has 4e-4 or 5e-4 on RoBERTa-base."""
    main_settings: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets")
    """Settings that are shown even if they have their defaults."""

    rank: int = 8
    """Number of rows of A and columns of B."""
    alpha: float = 16.0
    """The constant of the scaling factor alpha / rank, `lora_alpha` in PEFT. It can stay the same when the rank
    changes."""
    targets: tuple[str, ...] | list[str] | str = ("attention.qv",)
    """Layers to adapt: roles (attention.qv, mlp, all-linear), module-name suffixes or regular expressions."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter branch's input during training. An embedding's input is never
    dropped."""
    bias: Bias = "none"
    """Biases trained in addition to A and B: none, all of the model, or those of the adapted layers (lora_only)."""
    init: Init = "kaiming"
    """Initial A (B is zero): kaiming as in loralib, gaussian as in the paper, pissa from W0's main directions."""
    scaling: Scaling = "standard"
    """standard is alpha / rank; rslora is alpha / sqrt(rank) (Kalajdzievski 2023)."""
    lora_bias: bool = False
    """Train a bias of B in addition, which the scaling multiplies too: ``h = W0 x + scaling * (B A x + b)``."""
    dora: bool = False
    """Train each output row's magnitude separately from its direction (DoRA, Liu et al. 2024)."""
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    """Ranks that differ from `rank`: module-name suffix or regular expression to rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    """Alphas that differ from `alpha`: module-name suffix or regular expression to alpha."""
    train_modules: tuple[str, ...] | list[str] | str = ()
    """Modules trained in full, in addition to the adapter (name suffixes), such as a new classification head."""
    tie_head: bool = False
    """Apply the adapter of a tied input embedding to the output head as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", as_names("targets", self.targets))
        if not self.targets:
            raise ConfigurationError(
                "targets is empty. Name at least one, for example 'attention.qv'."
            )
        check_numbers(self, "rank", "alpha", "dropout")
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                with self._table(name):  # rejects an invalid pattern
                    pass
        if self.dora and self.lora_bias:
            raise ConfigurationError(
                "dora and lora_bias exclude each other: DoRA's magnitudes scale only the weight. Remove one."
            )
        if self.dora and self.tie_head:
            raise ConfigurationError(
                "dora and tie_head exclude each other: the head cannot use the embedding's magnitudes. Remove one."
            )
        if self.dora and self.init == "pissa":
            raise ConfigurationError(
                "dora and init='pissa' exclude each other: both change the meaning of the base weight. Remove one."
            )

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return initialised A and B for each target layer, by path, in the model's order, those of experts last.

        Raises:
            TargetError: A target names no layer or one that cannot be adapted.
            ConfigurationError: A rank, option or pattern does not fit a layer.
        """
        import torch

        from lorakit.methods.lora.experts import on_experts
        from lorakit.methods.lora.kinds import kind_of, tied_head
        from lorakit.models.roles import resolve_targets
        from lorakit.models.tree import submodule

        by_path: dict[str, list[Place]] = {}  # a fused layer has one place for each adapted slice
        for place in resolve_targets(model, self.targets):
            by_path.setdefault(place.path, []).append(place)
        self._check_patterns(list(by_path))
        layers = []
        for path, places in by_path.items():
            layer = submodule(model, path)
            slices = tuple(place.slice for place in places if place.slice is not None)
            layers.append((path, layer, kind_of(layer, model, path), slices))
        # The narrowest layer first, so that the error names a rank that fits all layers.
        for path, layer, lora_class, slices in sorted(
            layers, key=lambda entry: entry[2].largest_rank(entry[1], entry[3])
        ):
            lora_class.check_rank(path, layer, self.rank_of(path), slices)
        modules: dict[str, AdapterModule] = {}
        for path, layer, lora_class, slices in layers:
            rank, alpha = self.rank_of(path), self.alpha_of(path)
            module = lora_class(
                layer,
                rank=rank,
                scaling=self.scaling_for(rank, alpha),
                alpha=alpha,
                dropout=self.dropout,
                slices=slices,
                lora_bias=self.lora_bias,
                dora=self.dora,
                dtype=dtype or torch.float32,
            )
            module.initialise(layer, self.init)
            modules[path] = module
        if self.tie_head:
            path, module = tied_head(model, modules)
            modules[path] = module
        return on_experts(modules)

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that are trained in full, in addition to A and B.

        Raises:
            TargetError: An entry of train_modules names no module, or one with adapted layers.
        """
        from lorakit.methods.trained import modules_named, parameters_below
        from lorakit.models.roles import resolve_targets
        from lorakit.models.tree import is_inside

        if self.bias == "none" and not self.train_modules:
            return []  # finding the targets again would take a quarter of the time of `attach`
        adapted = {place.path for place in resolve_targets(model, self.targets)}
        paths = modules_named(model, self.train_modules)
        for layer in sorted(adapted):
            if (path := next((p for p in paths if is_inside(layer, p)), None)) is None:
                continue
            # A suffix such as `dense` matches layers of the head too.
            last = layer.rpartition(".")[2]
            outside = [a for a in adapted if a.endswith(f".{last}") and not is_inside(a, *paths)]
            names = sorted({".".join(a.split(".")[-2:]) for a in outside})
            fix = "Choose one of the two."
            if outside:
                fix = (
                    f"Name layers outside of it, such as {listed(names, 4)}, or remove it from train_modules, if you "
                    "named it there."
                )
            raise TargetError(
                f"targets adapts '{layer}', and '{path}' is trained in full (train_modules, or a new head). {fix}"
            )
        names = [*self._bias_names(model, adapted), *parameters_below(model, paths)]
        return list(dict.fromkeys(names))

    def _bias_names(self, model: nn.Module, adapted: set[str]) -> list[str]:
        """Return the biases that `bias` selects; `adapted` are the paths of the adapted layers."""
        from lorakit.methods.trained import parameter_names

        if self.bias == "none":
            return []
        names = parameter_names(model)
        if self.bias == "all":  # the rule of loralib and PEFT
            names = [name for name in names if "bias" in name]
        else:
            biases = {f"{path}.{bias}" for path in adapted for bias in ("bias", "in_proj_bias")}
            names = [name for name in names if name in biases]
        if not names:
            owner = "the model has" if self.bias == "all" else "the adapted layers have"
            raise ConfigurationError(
                f"bias='{self.bias}' trains biases, and {owner} none. Use bias='none'."
            )
        return names

    def _check_patterns(self, paths: list[str]) -> None:
        """Reject a rank or alpha pattern that matches no adapted layer: most likely a typo."""
        for name in ("rank_pattern", "alpha_pattern"):
            with self._table(name) as table:
                unused = table.unused(paths)
            if unused:
                raise ConfigurationError(
                    f"{name} has an entry '{unused[0]}' that matches none of the {len(paths)} adapted layers "
                    f"(the first is '{paths[0]}')."
                    + nearest(unused[0], {p.rsplit(".", 1)[-1] for p in paths})
                )

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at `path`: the first matching `rank_pattern`, else `rank`."""
        with self._table("rank_pattern") as table:
            return table.get(path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at `path`: the first matching `alpha_pattern`, else `alpha`."""
        with self._table("alpha_pattern") as table:
            return table.get(path, self.alpha)

    @contextmanager
    def _table(self, name: str) -> Iterator[PatternTable[Any]]:
        """Yield the table of rank_pattern or alpha_pattern, for one operation with a time limit of its own."""
        from lorakit.models.patterns import Matcher, PatternTable, pattern_errors

        with pattern_errors(name, ConfigurationError):
            if name not in self._tables:
                self._tables[name] = PatternTable(getattr(self, name), Matcher())
            self._tables[name].matcher.restart()
            yield self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, PatternTable[Any]]:
        """The tables of rank_pattern and alpha_pattern, built at their first use."""
        return {}

    def scaling_for(self, rank: int, alpha: float) -> float:
        """Return the factor on ``B A``: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA."""
        return alpha / math.sqrt(rank) if self.scaling == "rslora" else alpha / rank


def check_numbers(settings: Any, rank: str, alpha: str, dropout: str) -> None:
    """Check the ranks, the alphas and the dropout in settings of LoRA, which have these names.

    Raises:
        ConfigurationError: A rank is below 1, an alpha is 0, or the dropout is below 0 or not below 1.
    """
    for name, value in _with_pattern(settings, rank, "rank_pattern"):
        require_at_least(name, value, 1)
    for name, value in _with_pattern(settings, alpha, "alpha_pattern"):
        if value == 0:
            raise ConfigurationError(
                f"{name} is 0, so the adapter would have no effect. A trained adapter has another number; for a new "
                "one, alpha = 2 * rank is a common start."
            )
    require_at_least(dropout, getattr(settings, dropout), 0, below=1)


def _with_pattern(settings: Any, name: str, pattern: str) -> Iterator[tuple[str, Any]]:
    """Yield a setting and the entries of its pattern option, each named as in the user's configuration."""
    yield name, getattr(settings, name)
    yield from ((f"{pattern}[{key!r}]", value) for key, value in getattr(settings, pattern).items())
