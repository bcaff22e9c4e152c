"""Layer types that the tiny models lack, in small networks, compared with PEFT in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import peft_models
import pytest
import torch
from logits import assert_differ, assert_same, randomise
from torch import Tensor, nn

from lorakit import LoRA, attach, load
from lorakit.errors import AdapterStateError

TIGHT = 1e-10


@dataclass(frozen=True)
class Net:
    """A network with an adapted layer (`adapted`) and another one, and the shape of its input."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ids: bool = False

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.ModuleDict({"adapted": self.layer(), "other": nn.Linear(3, 3)})
            net = net.double().eval()
            with torch.no_grad():
                # Biases too: MultiheadAttention initialises them with 0.
                for parameter in net.parameters():
                    parameter.normal_(std=0.5)
            return net

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.ids:
            return torch.randint(0, 20, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


NETS: dict[str, Net] = {
    "linear without bias": Net(lambda: nn.Linear(8, 6, bias=False), (2, 8)),
    "embedding with padding": Net(lambda: nn.Embedding(20, 6, padding_idx=3), (2, 7), ids=True),
    "conv1d": Net(lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d strided": Net(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 9, 8)),
    "conv2d without bias": Net(lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8)),
    "conv2d padded to the same": Net(lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 8)),
    "conv2d pointwise": Net(lambda: nn.Conv2d(4, 6, 1), (2, 4, 9, 8)),
    "conv3d": Net(lambda: nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 4, 5, 6)),
    "conv2d grouped": Net(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 9, 8)),
    "transformer layer": Net(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (2, 5, 8)
    ),
    "causal transformer layer": Net(
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (2, 5, 8)
    ),
}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"dora": True},
    "bias of B": {"lora_bias": True},
    "bias of B and of the layer": {"lora_bias": True, "bias": "lora_only"},
    "bias of the layer": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "pissa": {"init": "pissa"},
    "trained beside": {"train_modules": "other"},
}
"""Settings of lorakit's LoRA."""

WITHOUT_BIAS = ("linear without bias", "embedding with padding", "conv2d without bias")
NOT_COMBINED = {
    **{(net, "bias of the layer"): "there is no bias" for net in WITHOUT_BIAS},
    **{
        (net, option): "PEFT ignores part of it, or cannot; see test_lora_bias"
        for net in ("embedding with padding", "transformer layer", "causal transformer layer")
        for option in ("bias of B", "bias of B and of the layer")
    },
    **{(net, "bias of B and of the layer"): "there is no bias" for net in WITHOUT_BIAS},
    (
        "conv2d grouped",
        "pissa",
    ): "lorakit rejects it: the best low-rank part is not a kernel of the layer",
    ("conv2d grouped", "dora"): "PEFT cannot: see test_beyond_peft",
    ("transformer layer", "dora"): "PEFT cannot: see test_beyond_peft",
    ("causal transformer layer", "dora"): "PEFT cannot: see test_beyond_peft",
}
PAIRS = [(n, o) for n in NETS for o in OPTIONS if (n, o) not in NOT_COMBINED]
every_pair = pytest.mark.parametrize(("net", "option"), PAIRS, ids=lambda value: value)


def merges(net: str, option: str, *, ungrouped: bool = True) -> bool:
    """Whether the adapter can be merged; PEFT's A of a grouped convolution is `ungrouped`."""
    lacks_bias = net in WITHOUT_BIAS and option == "bias of B"
    return not lacks_bias and not (ungrouped and net == "conv2d grouped")


def run(net: nn.Module, x: Tensor) -> Tensor:
    if isinstance(net, peft.PeftModel):
        # PyTorch's fused encoder layer reads the base's weights and ignores PEFT's wrappers.
        with fused_attention(False):
            return run(net.base_model.model, x)
    layer = net["adapted"]
    if isinstance(layer, nn.TransformerDecoderLayer):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return layer(x, x.flip(1), tgt_mask=mask)
    return layer(x)


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def targets(net: nn.Module) -> tuple[str, ...]:
    """Return the layer itself, or every attention and linear layer inside it."""
    if isinstance(net["adapted"], nn.TransformerDecoderLayer):
        return ("self_attn", "multihead_attn", "linear1")
    if isinstance(net["adapted"], nn.TransformerEncoderLayer):
        return ("self_attn", "linear1", "linear2")
    return ("adapted",)


def configuration(net: nn.Module, settings: dict) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=2,
        lora_alpha=3.0,
        target_modules=list(targets(net)),
        use_rslora=settings.get("scaling") == "rslora",
        use_dora=settings.get("dora", False),
        lora_bias=settings.get("lora_bias", False),
        bias=settings.get("bias", "none"),
        modules_to_save=[settings["train_modules"]] if "train_modules" in settings else None,
    )


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@every_pair
def test_lorakit_reads_what_peft_wrote(net: str, option: str, tmp_path):
    ours, theirs, x = NETS[net].build(), NETS[net].build(), NETS[net].x()
    base = run(ours, x)
    adapted = peft_models.adapt(theirs, configuration(theirs, OPTIONS[option]))
    expected = run(adapted, x)
    assert_differ(expected, base)
    handle = load(ours, peft_models.save(adapted, tmp_path / "adapter"))
    assert_same(run(ours, x), expected, TIGHT)
    if not merges(net, option):
        with pytest.raises(AdapterStateError, match="cannot be merged"):
            handle.merge()
    else:
        handle.merge()
        assert_same(run(ours, x), expected, TIGHT)
    handle.detach()
    assert torch.equal(run(ours, x), base)


@pytest.mark.slow
@every_pair
def test_peft_reads_what_lorakit_wrote(net: str, option: str, tmp_path):
    ours, theirs, again, x = *(NETS[net].build() for _ in range(3)), NETS[net].x()
    base = run(ours, x)
    method = LoRA(rank=2, alpha=3.0, targets=targets(ours), **OPTIONS[option])
    handle = attach(ours, method, dtype=torch.float64, seed=1)
    randomise(handle.trainable_parameters(), seed=2)
    expected = run(ours, x)
    assert_differ(expected, base)

    folder = handle.save(tmp_path / "adapter")
    assert_same(run(peft_models.load(theirs, folder), x), expected, TIGHT)
    load(again, folder)
    assert torch.equal(run(again, x), expected)
    if merges(net, option, ungrouped=False):
        handle.merge()
        assert_same(run(ours, x), expected, TIGHT)


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "qv", "attention"])
def test_slices_of_multihead_attention(role: str, tmp_path):
    """PEFT always adapts both projections completely; the other rows are zero in the file."""
    net = NETS["causal transformer layer"]
    ours, theirs, x = net.build(), net.build(), net.x()
    base = run(ours, x)
    entry = role if role == "attention" else f"attention.{role}"
    handle = attach(ours, LoRA(rank=2, alpha=3.0, targets=entry), dtype=torch.float64)
    randomise(handle.trainable_parameters(), seed=2)
    expected = run(ours, x)
    assert_differ(expected, base)
    folder = handle.save(tmp_path / "adapter")
    assert_same(run(peft_models.load(theirs, folder), x), expected, TIGHT)
