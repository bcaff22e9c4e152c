"""Runs whose weights are sharded over several processes, for `test_sharded_processes.py`.

By hand::

    python tests/training/sharded_processes.py FOLDER [SCENARIO ...]

See `several_processes.py`, whose processes these scenarios use.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import several_processes
import tiny_runs
import torch
import torch.utils.checkpoint
from safetensors.torch import save_file
from several_processes import (
    Outcomes,
    at_step,
    run,
    run_config,
    steps_of,
    take_steps,
    with_data,
    write_inputs,
)

from lorakit.data import DataConfig
from lorakit.methods.full import FullFineTuning
from lorakit.models.base_config import BaseConfig
from lorakit.models.blocks import blocks_of
from lorakit.models.sharding import is_sharded, local_part, shard_like
from lorakit.training import checkpoint, loop, setup
from lorakit.training.config import HeldOutConfig, TrainConfig
from lorakit.training.distributed import joined
from lorakit.training.job import Job
from lorakit.training.loop import train
from lorakit.training.optimizer import build_optimizer
from lorakit.training.progress import first_lines
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

COUNTS = (1, 2, 4)

several_processes.LIMIT = 150.0

MAIN = ("packed", "full padded")
NOT_SHARDED = ("grouped", "padded")
"""Ways that are not repeated with sharded weights, which do not change the order of the data and its padding."""
WAYS: dict[str, dict[str, Any]] = {
    **{name: way for name, way in several_processes.WAYS.items() if name not in NOT_SHARDED},
    "top layer": {"method": "full", "full": FullFineTuning(top_layers=1)},
    "late layer": {"method": "full"},
}


def ways_on(count: int) -> list[str]:
    """Return the ways to compare on `count` processes: all of them on 2, the main ones on 4."""
    return list(MAIN if count == 4 else WAYS)


def main() -> None:
    several_processes.run_scenarios(SCENARIOS, write_models)


def write_models(root: Path) -> None:
    write_inputs(root)
    tiny_runs.save_base(root / "noisy decoder", attention_dropout=0.1)
    tiny_runs.save_base(root / "wide", hidden_size=128, intermediate_size=512)


def opened(root: Path, processes: Any, **settings: Any) -> Job:
    """Prepare a run in float64, sharded if it has several processes.

    Its computation is tried in float32, like that of one process.
    """
    shard, setup.shard_base = setup.shard_base, lambda *_: None
    job = prepare(run_config(root, "prepared", shard=processes.count > 1, **settings), processes)
    setup.shard_base = shard
    job.model.double()
    if job.config.shard:
        _ = job.base_record  # hashes the weights before sharding drops them
        shard(job.model, job.device)
    return job


def move(job: Job) -> None:
    """Add the same random numbers in every process (see `several_processes.move`)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in job.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(shard_like(0.02 * noise, parameter))


# --- scenarios ------------------------------------------------------------------------------------


def equality(root: Path) -> dict[int, Outcomes]:
    """Take steps in float64 on 1, 2 and 4 processes; write the first gradients and the last weights."""
    torch.utils.checkpoint.CheckpointFunction.forward = None  # reentrant

    def work(count: int, rank: int) -> None:
        with joined("cpu") as processes:
            if rank:
                torch.linalg.svd = None  # PiSSA's vectors come from the first process
            for way in ways_on(count):
                job = opened(root, processes, **with_data(root, WAYS[way]))
                assert any(map(is_sharded, job.model.parameters())) == (count > 1)
                move(job)
                job.optimizer = build_optimizer(job.parameters, job.config.optimizer, 1e-2)
                if way == "late layer":
                    detach_in_first_step(job)
                tensors = take_steps(job, steps_of(way))
                save_file(tensors, root / f"{way} {count} {rank}.safetensors")

    return {count: run(count, lambda rank, count=count: work(count, rank)) for count in COUNTS}


def detach_in_first_step(job: Job) -> None:
    """Give the parameters of one MLP no gradient in the first step."""
    mlp = job.model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x).detach()
    at_step(1, lambda: setattr(mlp, "forward", forward))


def memory(root: Path) -> Outcomes:
    """Print the bytes of tensors that a process holds, and what they must be: all but half of the blocks."""

    def work(rank: int) -> None:
        with joined("cpu") as processes:
            found = {}
            for method in ("lora", "full"):
                job = prepare(
                    run_config(root, "memory", method=method, shard=True, base="wide"), processes
                )
                gc.collect()
                parameters = list(job.model.parameters())
                found[method] = {
                    "held": least_memory_of_tensors(),
                    "whole": sum(4 * p.numel() for p in parameters if not is_sharded(p)),
                    "sharded": sum(4 * p.numel() for p in parameters if is_sharded(p)),
                    "seeded": [p.sum().item() for p in parameters if not is_sharded(p)],
                    "share": job.share(next(job.step_plan.steps())),
                    "line": next(line for line in first_lines(job) if "sharded over" in line),
                }
                if method == "full":
                    found[method]["whole gradients"] = whole_gradients(job)
                del job, parameters
            print(json.dumps(found))

    return run(2, work)


def least_memory_of_tensors(seconds: float = 0.5) -> int:
    """Return the fewest bytes that the tensors of this process have in the given time.

    A thread of Gloo keeps the last tensor that it has gathered until it runs on, some 50 ms on a busy machine.
    """
    end = time.monotonic() + seconds
    least = memory_of_tensors()
    while time.monotonic() < end:
        time.sleep(0.05)
        least = min(least, memory_of_tensors())
    return least


def memory_of_tensors() -> int:
    """Return the bytes of all tensors of this process; those with one storage count once."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor)  # others warn about an attribute
        for part in [local_part(tensor)]
    }
    return sum(storages.values())


def whole_gradients(job: Job) -> int:
    """Return how many blocks' whole gradients FSDP2 keeps at the end of a backward pass."""
    blocks = blocks_of(job.model)
    contexts = {id(c): c for c in (block._get_fsdp_state()._comm_ctx for block in blocks)}
    kept = []
    embedding = job.model.get_input_embeddings().weight
    embedding.register_hook(
        lambda _: kept.append(sum(len(c.reduce_scatter_states) for c in contexts.values()))
    )
    step = next(job.step_plan.steps())
    optimizer_step(job, step, 0)
    return max(kept)


def parts(root: Path) -> Outcomes:
    """Fill the part of each process with its own value, save, clear and load."""

    def work(rank: int) -> None:
        with joined("cpu") as processes:
            for method in ("lora", "full"):
                config = run_config(root, f"parts-{method}", method=method, shard=True)
                with loop.open_run(config, processes) as run_folder:
                    job, state = loop._start(run_folder, processes)
                    take_steps(job, 1)
                    tensors = {**job.weights, **checkpoint.optimizer_tensors(job.optimizer)}
                    for tensor in tensors.values():
                        with torch.no_grad():
                            local_part(tensor).fill_(rank + 1.0 if is_sharded(tensor) else 9.0)
                    state.step = 1
                    job.save_adapter(run_folder.adapter, state)
                    loop._save_checkpoint(run_folder, job, state)
                    for tensor in tensors.values():
                        with torch.no_grad():
                            local_part(tensor).zero_()
                    checkpoint.restore(
                        run_folder.checkpoints, job.weights, job.optimizer, inputs=job.inputs
                    )
                    loaded = {**job.weights, **checkpoint.optimizer_tensors(job.optimizer)}
                    for name, tensor in loaded.items():
                        expected = rank + 1.0 if is_sharded(tensor) else 9.0
                        assert (local_part(tensor) == expected).all(), name
                        assert is_sharded(tensor) == is_sharded(tensors[name]), name
                    sharded = [name for name, tensor in job.weights.items() if is_sharded(tensor)]
                    print(
                        json.dumps(
                            {"method": method, "trained": list(job.parameters), "sharded": sharded}
                        )
                    )

    return run(2, work)


def mixed(root: Path) -> dict[int, Outcomes]:
    """Take steps with a base in bfloat16 and float32 adapters, and in full with autocast."""

    def work(count: int, rank: int) -> None:
        with joined("cpu") as processes:
            for method in ("lora", "full", "bitfit"):
                base = BaseConfig(name=str(root / "encoder"), dtype="bfloat16", device="cpu")
                data = DataConfig(train=str(root / "labels.jsonl"))
                config = run_config(
                    root,
                    "mixed",
                    method=method,
                    data=data,
                    evaluation=HeldOutConfig(),
                    shard=count > 1,
                )
                job = prepare(dataclasses.replace(config, base=base), processes)
                job.optimizer = build_optimizer(job.parameters, job.config.optimizer, 1e-3)
                tensors = take_steps(job, 5)
                save_file(tensors, root / f"mixed {method} {count} {rank}.safetensors")

    return {count: run(count, lambda rank, count=count: work(count, rank)) for count in (1, 2)}


def whole_runs(root: Path) -> Any:
    """Train with everything that a run writes, on 1 process, and twice in a script of 2 that shard the weights."""
    evaluation = HeldOutConfig(every=5, samples=2, max_new_tokens=3, batch_size=5)

    def work(count: int) -> None:
        for method in ("lora", "full"):
            name = f"whole-{method}-{count}"
            train(
                run_config(
                    root, name, method=method, evaluation=evaluation, epochs=1, shard=count > 1
                )
            )

    return {count: run(count, lambda _, count=count: work(count)) for count in (1, 2)}


def resumed(root: Path) -> Any:
    """Stop runs after step 6 of 10, and resume them on another number of processes, sharded or not."""
    data = DataConfig(train=str(root / "train.jsonl"))

    def config(name: str, **settings: Any) -> TrainConfig:
        return run_config(
            root, name, method="full", data=data, evaluation=HeldOutConfig(), epochs=1, **settings
        )

    def stopping(name: str, **settings: Any) -> Callable[[int], object]:
        def work(rank: int) -> None:
            at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
            train(config(name, **settings))

        return work

    def resuming(name: str, **settings: Any) -> Callable[[int], object]:
        return lambda _: train(config(name, resume=True, **settings))

    stopped = [run(2, stopping("sharded-whole", shard=True)), run(1, stopping("whole-sharded"))]
    shutil.copytree(root / "sharded-whole", root / "sharded-sharded")
    return {
        "stopped": [process for processes in stopped for process in processes],
        "sharded-whole": run(1, resuming("sharded-whole")),
        "sharded-sharded": run(4, resuming("sharded-sharded", shard=True)),
        "whole-sharded": run(2, resuming("whole-sharded", shard=True)),
    }


def ends(root: Path) -> Any:
    """Runs that end with an error."""

    def dying(rank: int) -> None:
        if rank == 1:
            at_step(2, lambda: os._exit(9))
        train(run_config(root, "dead", shard=True))

    def other_base(rank: int) -> None:
        (root / f"at-{rank}").mkdir()
        shutil.copytree(
            root / ("decoder" if rank else "noisy decoder"), root / f"at-{rank}" / "base"
        )
        os.chdir(root / f"at-{rank}")
        base = BaseConfig(name="base", dtype="float32", device="cpu")
        train(dataclasses.replace(run_config(root, "mixed-bases", shard=True), base=base))

    return {
        "one process": run(1, lambda _: train(run_config(root, "alone", shard=True))),
        "dead": run(2, dying),
        "other base": run(2, other_base),
        "folders": sorted(p.name for p in root.iterdir() if p.is_dir()),
    }


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "equality": equality,
    "memory": memory,
    "parts": parts,
    "mixed": mixed,
    "whole": whole_runs,
    "resumed": resumed,
    "ends": ends,
}


if __name__ == "__main__":
    main()
