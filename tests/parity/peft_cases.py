"""Configurations of PEFT's LoRA on small networks, and those of PEFT's own tests if they are there.

The environment variable PEFT_TESTS names `tests/test_custom_models.py` of a source distribution of PEFT
(``pip download --no-deps --no-binary :all: peft==VERSION``). Only its list of cases and its networks are run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

REFUSED = {
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
}
"""Options that lorakit does not implement."""


@dataclass(frozen=True)
class PeftCase:
    """A network and the options of PEFT's LoRA on it."""

    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any] = field(hash=False)
    x: Tensor = field(hash=False, compare=False)

    @property
    def refused(self) -> str | None:
        """The option that lorakit refuses; DoRA only on a grouped convolution."""
        options = sorted(REFUSED & self.options.keys())
        if options:
            return options[0]
        dora = self.options.get("use_dora")
        return "use_dora" if dora and self.has_groups else None

    @property
    def has_groups(self) -> bool:
        """Whether a convolution has groups."""
        return any(getattr(module, "groups", 1) > 1 for module in self.build().modules())

    def __str__(self) -> str:
        return self.name


# --- our own list ----------------------------------------------------------------------------------


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _linear() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(6, 9), "b": nn.Linear(9, 4)})


def _table() -> nn.Module:
    return nn.ModuleDict({"table": nn.Embedding(12, 6), "a": Conv1D(3, 6)})


def _conv(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict({"conv": kind(4, 8, 2, **options), "b": nn.Linear(2, 3)})


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.b = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.mha(x, x, x)[0])


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Chain(nn.Module):
    """The layers of a ModuleDict, one after the other."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        assert isinstance(layers, nn.ModuleDict)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).tanh()
        return x


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def run() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = build()
            return (_Chain(net) if isinstance(net, nn.ModuleDict) else net).double().eval()

    return run


_NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (_linear, _numbers(3, 6)),
    "table": (_table, torch.arange(6).view(2, 3)),
    "conv1d": (_conv(nn.Conv1d), _numbers(2, 4, 3)),
    "conv2d": (_conv(nn.Conv2d), _numbers(2, 4, 3, 3)),
    "conv3d": (_conv(nn.Conv3d), _numbers(2, 4, 3, 3, 3)),
    "groups of one": (_conv(nn.Conv2d, groups=4), _numbers(2, 4, 3, 3)),
    "groups of two": (_conv(nn.Conv2d, groups=2), _numbers(2, 4, 3, 3)),
    "attention": (_Attention, _numbers(3, 2, 8)),
    "parameter": (lambda: nn.ModuleDict({"a": _Product()}), _numbers(3, 6)),
}


def _own() -> list[PeftCase]:
    dora = {"use_dora": True}
    bias = {"lora_bias": True, "lora_alpha": 32}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("linear", {"target_modules": "a"}),
        ("linear", {"target_modules": ["a"]}),
        ("linear", {"target_modules": ["b"]}),
        ("linear", {"target_modules": ["a", "b"]}),
        ("linear", {"target_modules": ["a"], "modules_to_save": ["b"]}),
        ("linear", {"target_modules": ["a"], "lora_alpha": 4, "lora_dropout": 0.1}),
        ("linear", {"target_modules": ["a"], **dora}),
        ("linear", {"target_modules": ["a", "b"], **dora}),
        ("linear", {"target_modules": "b", "lora_alpha": 32, **dora}),
        ("linear", {"target_modules": ["a"], "init_lora_weights": "mica", "r": 2}),
        ("linear", {"target_modules": ["a", "b"], **bias}),
        ("linear", {"target_modules": ["a"], "kasa_config": peft.KasaConfig(), "r": 2}),
        ("linear", {"target_modules": ["a"], "velora_config": peft.VeloraConfig(num_groups=2)}),
        ("linear", {"target_modules": ["a"], "monteclora_config": peft.MontecloraConfig()}),
        (
            "linear",
            {
                "target_modules": ["a", "b"],
                "use_bdlora": BdLoraConfig(
                    target_modules_bd_b=["b"], nblocks=2, match_strict=False
                ),
            },
        ),
        ("linear", {"target_modules": ["a"], "target_parameters": ["b.weight"]}),
        ("parameter", {"target_parameters": ["a.weight"]}),
        ("table", {"target_modules": ["a"], "trainable_token_indices": {"table": [0, 5]}}),
        *(
            ("table", {"target_modules": t, **o})
            for t in (["a"], ["table"], ["table", "a"])
            for o in ({}, dora)
        ),
        *(
            (net, {"target_modules": t, **o})
            for net in ("conv1d", "conv2d", "conv3d")
            for t in (["conv"], ["conv", "b"])
            for o in ({}, dora, bias)
        ),
        *(
            (net, {"target_modules": ["conv"], **o})
            for net in ("groups of one", "groups of two")
            for o in ({}, dora)
        ),
        ("attention", {"target_modules": ["mha"]}),
        ("attention", {"target_modules": ["mha", "b"]}),
    ]
    cases = []
    for net, options in rows:
        build, x = _NETS[net]
        name = ", ".join([net, *(f"{k} {v!s:.24}" for k, v in options.items())])
        cases.append(PeftCase(name, _seeded(build), {"r": 4, **options}, x))
    return cases


# --- PEFT's list -----------------------------------------------------------------------------------


def _pefts(path: Path) -> list[PeftCase]:
    """Return the LoRA cases of PEFT's tests, without importing what else they need."""
    tree = ast.parse(path.read_text())
    kept: list[ast.stmt] = []
    for node in tree.body:
        is_import = isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and not node.level
        )
        is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEST_CASES"
        is_net = isinstance(node, ast.ClassDef) and [ast.unparse(b) for b in node.bases] in (
            [],
            ["nn.Module"],
        )
        if is_import or is_list or (is_net and not node.name.startswith("Test")):
            kept.append(node)
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(ast.Module(kept, []), str(path), "exec"), names)

    def build(network: str) -> Callable[[], nn.Module]:
        def run() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                net = names["MockTransformerWrapper"].from_pretrained(network)
            net.dtype = torch.float64  # to which the networks cast their input
            return net.double().eval()

        return run

    x = torch.arange(90).view(9, 10)
    return [
        PeftCase(name, build(network), options, x)
        for name, network, config, options in names["TEST_CASES"]
        if config is peft.LoraConfig
    ]


CASES = _pefts(Path(os.environ["PEFT_TESTS"])) if os.environ.get("PEFT_TESTS") else _own()
