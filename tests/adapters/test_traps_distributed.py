"""FSDP2 and DDP accept an adapted model, tested in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist
from random_adapters import randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach, load
from lorakit.errors import AdapterStateError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA

IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo backend")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(dtype: torch.dtype) -> tuple[PreTrainedModel, Adapters]:
    model = tiny_models.build("llama").to(dtype)
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="all-linear"), seed=1)
    randomise(adapters, scale=0.05)
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float32}
    return model, adapters


def train(forward: nn.Module, parameters: list[nn.Parameter], steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = forward(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp2_trains_float32_adapters_in_a_frozen_base(
    dtype: torch.dtype, process_group: None
) -> None:
    plain, plain_adapters = adapted(dtype)
    expected_losses = train(plain, plain_adapters.trainable_parameters())

    model, adapters = adapted(dtype)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trainable = adapters.trainable_parameters()
    assert all(isinstance(parameter, DTensor) for parameter in trainable)
    assert len(trainable) == len([p for p in model.parameters() if p.requires_grad])
    losses = train(model, trainable)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert losses[-1] < losses[0]
    actual = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter, atol=tolerance, rtol=1e-2)
        assert actual[name].dtype == torch.float32
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(whole(parameter), base[name])
    adapted_logits = model(IDS).logits
    adapters.activate(None)
    torch.testing.assert_close(model(IDS).logits, tiny_models.build("llama").to(dtype)(IDS).logits)
    assert (adapted_logits - model(IDS).logits).abs().max() > 1e-2


def test_fsdp2_with_mixed_precision(process_group: None) -> None:
    """Parameters in float32, computation in bfloat16: the usual policy."""
    model, _ = adapted(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    losses = train(model, [p for p in model.parameters() if p.requires_grad])
    assert losses[-1] < losses[0]


def test_ddp_matches_plain_training(process_group: None) -> None:
    plain, plain_adapters = adapted(torch.float32)
    expected = train(plain, plain_adapters.trainable_parameters())
    model, adapters = adapted(torch.float32)
    base = copy.deepcopy(model)
    losses = train(DistributedDataParallel(model), adapters.trainable_parameters())
    assert losses == expected
    for (name, actual), other, start in zip(
        model.named_parameters(), plain.parameters(), base.parameters(), strict=True
    ):
        assert torch.equal(actual, other)
        assert torch.equal(actual, start) == (not actual.requires_grad), name


def test_ddp_does_not_broadcast_the_kept_base(process_group: None) -> None:
    """By default it sends all buffers before each forward pass, and a replaced parameter is kept as one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    own = {id(buffer) for buffer in model.buffers()}
    adapters = attach(model, FullFineTuning(), name="first")
    attach(model, LoRA(rank=2, targets="0", train_modules="1"), name="second")
    for name in ("first", "second"):
        adapters.activate(name)
        assert {id(buffer) for buffer in model.buffers()} > own
        assert {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers} == own
        adapters.remove(name)
    assert vars(model).keys() == vars(nn.Sequential()).keys()


def test_sharded_adapter_is_saved_whole(process_group: None, tmp_path: Path) -> None:
    model, adapters = adapted(torch.float32)
    expected = model(IDS).logits
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    adapters.save(tmp_path / "adapter")
    plain = tiny_models.build("llama")
    load(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(IDS).logits, expected)


@pytest.mark.parametrize("stage", ["sharded", "before backward"])
@pytest.mark.parametrize("options", [{}, {"bias": "all"}], ids=["lora", "with trained copies"])
def test_merge_into_a_sharded_model_is_refused(
    stage: str, options: dict, process_group: None, tmp_path: Path
) -> None:
    """FSDP2 computes with its own shards, so the merged weights would be ignored."""
    model = tiny_models.build("gpt2")
    adapters = attach(model, LoRA(rank=2, targets="all-linear", **options))
    randomise(adapters)
    for block in model.transformer.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    expected = model(IDS).logits
    if stage == "sharded":
        expected.sum().backward()
    save = partial(model.save_pretrained, tmp_path / "saved")  # it would save the merged weights
    for merge in (adapters.merge, adapters.require_mergeable, save):
        with pytest.raises(AdapterStateError, match=r"sharded over processes.*lorakit merge"):
            merge()
    assert not (tmp_path / "saved").exists()
    assert not adapters.merged
    assert adapters.active == {"default": 1.0}
    assert torch.equal(model(IDS).logits, expected)


def test_merge_inside_a_sharded_wrapper_is_refused(process_group: None) -> None:
    """The model itself is no FSDP module, but its parameters are sharded."""
    model, adapters = adapted(torch.float32)
    fully_shard(nn.Sequential(model), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(AdapterStateError, match=r"'model\.embed_tokens\.weight' is sharded"):
        adapters.merge()
    assert not adapters.merged
