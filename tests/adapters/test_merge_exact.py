"""Merging is exact and reversible: it rounds once, and a thousand merges restore the base's bits."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from torch.nn.utils import prune

from lorakit import Adapters, FullFineTuning, LoRA, attach
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.save_pretrained import adapted_state_dict
from lorakit.errors import AdapterFileError, AdapterStateError
from lorakit.methods.method import Method, describe

CYCLES = 1000
SCALING = 1.5
TARGETS = (
    *(("attention.q",), ("attention.qv",), ("attention",), ("mlp",)),
    *(("all-linear",), ("embedding",), ("head",), ("all-linear", "embedding", "head")),
)
"""Eight adapters, from one layer of a block to every layer there is."""


@torch.no_grad()
def with_eight_adapters(model: nn.Module) -> Adapters:
    generator = torch.Generator().manual_seed(0)
    for i, targets in enumerate(TARGETS):
        method = LoRA(rank=2, alpha=2 * SCALING, targets=targets)
        handle = attach(model, method, name=f"adapter{i}")
        for parameter in handle.trainable_parameters(f"adapter{i}"):
            assert parameter.dtype == torch.float32
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return handle


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in model.state_dict().items() if ".adapters." not in key}


def merged_state(base: dict[str, Tensor], model: nn.Module, handle: Adapters, name: str) -> dict:
    """``round(float32(W) + scaling * (B A))``, from the adapter's tensors and the base's."""
    expected = dict(base)
    for path, module in handle.modules(name).items():
        delta = SCALING * (module.lora_B.detach() @ module.lora_A.detach())
        if isinstance(model.get_submodule(path), nn.Embedding):
            delta = delta.T
        W = base[f"{path}.weight"]
        expected[f"{path}.weight"] = (W.to(torch.float32) + delta).to(W.dtype)
    return expected


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bits as integers: NaN equals NaN, and -0 differs from 0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return {key: t.view(integer[t.element_size()]) for key, t in state.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    a, b = bits(a), bits(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_thousand_cycles_over_eight_adapters(dtype: torch.dtype):
    model = tiny_models.build("llama", tie_word_embeddings=False).to(dtype)
    handle = with_eight_adapters(model)
    before = {key: t.clone() for key, t in base_state(model).items()}
    expected = [merged_state(before, model, handle, name) for name in handle.names]
    assert len(expected) == 8
    changed = {
        key for state in expected for key in state if not torch.equal(state[key], before[key])
    }
    assert changed == {key for key in before if "norm" not in key}

    for cycle in range(CYCLES):
        which = cycle * 5 % 8
        handle.merge(handle.names[which])
        assert same_bits(base_state(model), expected[which]), f"merged, cycle {cycle}"
        handle.unmerge()
        assert same_bits(base_state(model), before), f"unmerged, cycle {cycle}"
    handle.detach()
    assert same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merging_rounds_once(dtype: torch.dtype):
    """Increments far below the weight's resolution are rounded as a sum, not one by one."""
    layer = nn.Sequential(nn.Linear(8, 8, bias=False)).to(dtype)
    nn.init.ones_(layer[0].weight)
    handle = attach(layer, LoRA(rank=8, alpha=8.0, targets="0"))
    module = handle.modules()["0"]
    step = torch.finfo(dtype).eps / 8
    with torch.no_grad():  # B A adds 8 small steps to every weight: a whole eps
        module.lora_A.fill_(1.0)
        module.lora_B.fill_(step)
    handle.merge()
    assert torch.equal(layer[0].weight, torch.full((8, 8), 1 + torch.finfo(dtype).eps, dtype=dtype))
    handle.unmerge()
    assert torch.equal(layer[0].weight, torch.ones(8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Linear(8, 8), {}),
        (nn.Linear(8, 8), {"dora": True}),
        (nn.Conv1d(4, 8, 3), {}),
        (nn.Embedding(8, 8), {}),
    ],
    ids=["linear", "dora", "conv", "embedding"],
)
def test_autocast_does_not_round_a_merge(layer: nn.Module, settings: dict):
    handle = attach(nn.Sequential(layer), LoRA(rank=2, targets="0", **settings))
    randomise(handle)
    exact = [tensors[1] for tensors in handle.merged_weights()]
    with torch.autocast("cpu", torch.bfloat16):
        actual = [tensors[1] for tensors in handle.merged_weights()]
        handle.merge()
    assert torch.equal(actual[0], exact[0])
    assert torch.equal(layer.weight, exact[0])


@pytest.mark.parametrize("action", ["merge", "permanent merge", "save_pretrained"])
@pytest.mark.parametrize(
    ("dtype", "settings", "tensor", "value", "message"),
    [
        (torch.float32, {}, "lora_A", torch.nan, r"q_proj.adapters.default.lora_A' holds 1 values"),
        (
            torch.float32,
            {"train_modules": "embed_tokens"},
            "trained.weight",
            torch.inf,
            r"embed_tokens.adapters.default.trained.weight' holds 1 values",
        ),
        (torch.float16, {}, "lora_B", 1e30, r"the merged '.*q_proj.weight' .*Or float16 overflows"),
    ],
    ids=["factor", "trained copy", "overflow"],
)
def test_nothing_is_merged_to_nan_or_infinity(
    action: str,
    dtype: torch.dtype,
    settings: dict,
    tensor: str,
    value: float,
    message: str,
    tmp_path: Path,
):
    model = tiny_models.build("llama").to(dtype)
    adapters = attach(model, LoRA(rank=2, targets="attention.q", **settings))
    module = next(m for m in adapters.modules().values() if tensor in m.state_dict())
    module.get_parameter(tensor).data[0, 0] = value
    before = {name: t.clone() for name, t in model.state_dict().items()}
    actions = {
        "merge": adapters.merge,
        "permanent merge": partial(adapters.merge, keep_base=False),
        "save_pretrained": partial(model.save_pretrained, tmp_path),
    }
    with pytest.raises(AdapterFileError, match=message):
        actions[action]()
    assert not [*tmp_path.glob("*.safetensors")]
    assert same_bits(model.state_dict(), before)


def test_infinite_values_of_the_base_are_merged(tmp_path: Path):
    """Some bases mask tokens of the vocabulary by minus infinity."""
    model = tiny_models.build("llama")
    model.lm_head.weight.data[3] = -torch.inf
    adapters = attach(model, LoRA(rank=2, targets="lm_head"))
    randomise(adapters)
    model.save_pretrained(tmp_path)
    adapters.merge()
    infinite = model.lm_head.weight.isinf()
    assert infinite[3].all()
    assert infinite.sum() == infinite[3].numel()


@pytest.mark.parametrize("other", [LoRA(targets="all-linear"), FullFineTuning()], ids=describe)
def test_what_a_merge_replaces_is_not_written_with_another_adapter(other: Method):
    """DoRA on slices of a fused layer is stored with the norms of the base's other rows."""
    model = tiny_models.build("gpt2")
    handle = attach(model, LoRA(rank=2, dora=True), name="dora")
    before = handle.stored("dora")
    assert all(layer.base_norms is not None for layer in before.layers.values())
    attach(model, other, name="other")
    randomise(handle, "other")
    handle.merge("other")
    merged = handle.stored("dora")
    handle.unmerge()  # the copies of full fine-tuning still replace the base's tensors
    for after in (merged, handle.stored("dora")):
        for path, layer in before.layers.items():
            assert torch.equal(after.layers[path].base_norms, layer.base_norms)


@pytest.mark.parametrize(
    ("normalise", "restore"),
    [
        (
            nn.utils.parametrizations.weight_norm,
            lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        ),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            lambda layer: prune.remove(layer, "weight"),
        ),
    ],
    ids=["parametrized", "older", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_cannot_be_merged_into(normalise, restore):
    x = torch.randn(3, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    normalise(model["b"])
    handle = attach(model, LoRA(rank=2, targets=("a", "b")))
    randomise(handle)
    before = {name: layer(x) for name, layer in model.items()}
    for write in (handle.merge, lambda: adapted_state_dict(model, model.state_dict())):
        with pytest.raises(
            AdapterStateError, match=r"'b.weight' is computed.*remove_.*prune\.remove"
        ):
            write()
        assert all(torch.equal(layer(x), before[name]) for name, layer in model.items())
    handle.detach()
    restore(model["b"])
    attach(model, LoRA(rank=2, targets=("a", "b"))).merge()


def test_a_permanent_merge_holds_one_base_weight_more(monkeypatch: pytest.MonkeyPatch):
    """Each layer's own weight is gone when the next layer is merged, so that a large model fits into memory."""
    model = tiny_models.build("llama")
    handle = with_eight_adapters(model)
    paths = list(handle.modules("adapter4"))
    own = [weakref.ref(model.get_submodule(path).weight) for path in paths]
    alive = []
    compute = LayerAdapters.merge_weight

    def counted(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        alive.append(sum(ref() is not None for ref in own))
        return compute(*args)

    monkeypatch.setattr(LayerAdapters, "merge_weight", counted)
    handle.merge("adapter4", keep_base=False)
    assert alive == list(range(len(paths), 0, -1))
