"""Loops on two processes with FSDP2, DDP and DeepSpeed, for `test_process_loops.py`.

By hand::

    python tests/integration/process_loops.py FOLDER

Every loop takes the same steps, and saves its adapter to a folder of its name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "training")]

import pytest
import several_processes
import torch
import torch.distributed as dist
from tiny_base import TEXTS, load_base
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorakit

STEPS, RATE = 5, 0.3
SHARDED = ("fsdp2", "zero3")


def main() -> None:
    root = Path(sys.argv[1])
    ways = ["ddp", "fsdp2"]
    if importlib.util.find_spec("deepspeed"):
        ways += ["zero2", "zero3"]
    several_processes.LIMIT = 120
    outcomes = {"alone": several_processes.run(1, lambda _: loop("alone", root))}
    for way in ways:
        outcomes[way] = several_processes.run(2, lambda _, way=way: loop(way, root))
    (root / "outcomes.json").write_text(json.dumps(outcomes))


def loop(way: str, root: Path) -> None:
    """Train with plain gradient descent, in which rounding errors do not grow as in AdamW."""
    if way.startswith("zero"):
        connect_deepspeed()
    elif way != "alone":
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    model, tokenizer = load_base(None)
    adapters = lorakit.attach(model, lorakit.LoRA(rank=4, targets="all-linear"), name="x", seed=0)
    halves = [tokenizer(TEXTS[at : at + 2], padding=True, return_tensors="pt") for at in (0, 2)]
    own = halves if way == "alone" else [halves[rank]]
    prepared, step = prepare(way, model, adapters)
    prepared.train()
    for _ in range(STEPS):
        losses = [prepared(**batch, labels=batch["input_ids"]).loss for batch in own]
        step(sum(losses) / len(losses))
    if way in SHARDED:
        assert all(is_sharded(p) for p in adapters.trainable_parameters())
        with pytest.raises(lorakit.errors.AdapterStateError, match="sharded over processes"):
            adapters.merge()
    adapters.save(root / way, is_main_process=rank == 0)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def prepare(way: str, model: Any, adapters: Any) -> tuple[nn.Module, Any]:
    """Return the model to call, and a function that updates the weights."""
    if way == "fsdp2":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    parameters = adapters.trainable_parameters()
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    if way.startswith("zero"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        zero = {"stage": int(way[-1]), "stage3_param_persistence_threshold": 0}
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

        def engine_step(loss: Tensor) -> None:
            engine.backward(loss)
            engine.step()

        return engine, engine_step

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return DistributedDataParallel(model) if way == "ddp" else model, step


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter holds only the part of this process."""
    return hasattr(parameter, "full_tensor") or parameter.numel() == 0


def connect_deepspeed() -> None:
    import deepspeed  # pyright: ignore[reportMissingImports]

    # Its shared memory for processes of one machine needs a compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


if __name__ == "__main__":
    main()
