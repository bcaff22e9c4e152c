"""Runs on several processes, for `test_processes.py`: each scenario writes its results into a folder of its name.

By hand::

    python tests/training/several_processes.py FOLDER [SCENARIO ...]

The processes of a run are forked from one process that has imported everything and computes nothing itself (see
`kill_resume.py`). They get the environment variables that torchrun sets, and connect with gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Outside torchrun the first process holds the store, and torch warns the others when it ends before them.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import kill_resume
import tiny_runs
import torch
from safetensors.torch import save_file
from torch import nn

from lorakit.data import DataConfig
from lorakit.errors import LorakitError
from lorakit.evaluation import computed
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.method import LoRA
from lorakit.training import checkpoint, distributed, loop, opening
from lorakit.training import step as steps
from lorakit.training.config import CheckpointConfig, HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.distributed import joined
from lorakit.training.loop import train
from lorakit.training.optimizer import build_optimizer
from lorakit.training.setup import prepare

LONG, SHORT = 10, 5
"""Steps of the main ways and of the others: two epochs and one. An epoch ends with a step of a single example."""
COUNTS = (1, 2, 4)
LIMIT = 60.0
"""Seconds after which the processes of a run are killed."""

NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
RATE = OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup=2)

WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "grouped": {"sampling": "grouped"},
    "full": {"method": "full"},
    "full padded": {"method": "full", "packing": False},
    "dora": {"lora": LoRA(dora=True, targets=("all-linear",))},
    "pissa": {"lora": LoRA(init="pissa")},
    "bitfit": {
        "method": "bitfit",
        "base": "encoder",
        "data": "labels",
        "evaluation": HeldOutConfig(),
    },
    "bottleneck": {"method": "bottleneck", "bottleneck": BottleneckAdapter(size=4)},
    "prefixes": {"method": "lora+prefix_embedding"},
    "padded": {"packing": False},
    "checkpointing": {"gradient_checkpointing": True},
    "classes": {"base": "encoder", "data": "labels", "evaluation": HeldOutConfig()},
    "sequences": {"base": "encoder-decoder"},
}
"""Settings of the runs whose gradients and weights are compared."""


def steps_of(way: str) -> int:
    return LONG if way in ("packed", "full padded") else SHORT


def ways_on(count: int) -> list[str]:
    """Return the ways to compare on `count` processes: all of them on 2, some on 4."""
    return list(WAYS) if count < 4 else ["packed", "full padded", "classes"]


def with_data(root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a way with its data, of which `SHORT` steps are an epoch."""
    if settings.get("data") == "labels":
        return {**settings, "data": DataConfig(train=str(root / "few-labels.jsonl"))}
    validation = str(root / "validation.jsonl")
    data = DataConfig(train=str(root / "few.jsonl"), validation=validation)
    return {**settings, "data": data}


def main() -> None:
    run_scenarios(SCENARIOS)


def run_scenarios(
    scenarios: Mapping[str, Callable[[Path], Any]], write: Callable[[Path], None] | None = None
) -> None:
    """Run the scenarios that the command line names, and write the outcomes of each into its folder.

    `write` writes what the scenarios read, by default `write_inputs`.
    """
    folder, *names = sys.argv[1:]
    root = Path(folder)
    assert kill_resume.fork(lambda: (write or write_inputs)(root)) == 0
    warm_up = run_config(root, "warm-up", max_steps=1)
    kill_resume.import_modules_of(lambda: train(warm_up), root / "modules.txt")
    for name, scenario in scenarios.items():
        if not names or name in names:
            began = time.monotonic()
            outcomes = scenario(root)
            (root / f"{name}.json").write_text(json.dumps(outcomes))
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


def write_inputs(root: Path) -> None:
    tiny_runs.save_base(root / "decoder")
    tiny_runs.save_base(root / "encoder-decoder", "t5", dropout_rate=0.0)
    tiny_runs.save_base(root / "encoder", "bert", "base", **NO_DROPOUT)
    # The last step of an epoch has a single example.
    tiny_runs.write_rows(root / "train.jsonl", completions(73, prompts=24))
    tiny_runs.write_rows(root / "few.jsonl", completions(33, prompts=11))
    tiny_runs.write_rows(root / "validation.jsonl", tiny_runs.pairs(13, seed=1))
    tiny_runs.write_rows(root / "labels.jsonl", tiny_runs.labelled(73))
    tiny_runs.write_rows(root / "few-labels.jsonl", tiny_runs.labelled(33))
    tiny_runs.write_rows(root / "other.jsonl", tiny_runs.pairs(72, seed=2))
    tiny_runs.write_rows(root / "bad.jsonl", [{"prompt": "river:", "completion": 3}])


def completions(count: int, *, prompts: int) -> list[dict[str, str]]:
    """Return rows with several completions for each prompt, of very different lengths."""
    rows = tiny_runs.pairs(prompts)
    return [
        {
            **rows[i % prompts],
            "completion": rows[i % prompts]["completion"] * (1 + i // prompts + 7 * (i % 5 == 0)),
        }
        for i in range(count)
    ]


def run_config(root: Path, name: str, base: str = "decoder", **overrides: Any) -> TrainConfig:
    settings: dict[str, Any] = {"optimizer": RATE, "output": str(root / name), **overrides}
    return tiny_runs.config(root, str(root / base), **settings)


# --- processes ------------------------------------------------------------------------------------


Outcomes = list[dict[str, Any]]
"""The exit status and the output of each process of a run."""


def run(count: int, work: Callable[[int], object]) -> Outcomes:
    """Call `work` with its rank in `count` processes, and wait for them."""
    return Started(count, work).outcomes()


def _free_port() -> int:
    """Return a free port below those that the system gives away itself, so that no other test gets it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


class Started:
    """Processes that call `work` with their rank."""

    def __init__(self, count: int, work: Callable[[int], object]) -> None:
        port = _free_port()
        self._deadline = time.monotonic() + LIMIT
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 - closed below
        self._children = [
            _fork(rank, count, port, work, output.fileno())
            for rank, output in enumerate(self._outputs)
        ]

    def outcomes(self, *, stopped: int = 0) -> Outcomes:
        """Wait for the processes; kill them after `LIMIT` seconds, or once only `stopped` of them are left."""
        statuses: dict[int, int] = {}
        while len(statuses) < len(self._children):
            for child in set(self._children) - statuses.keys():
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
                elif (
                    time.monotonic() > self._deadline
                    or len(statuses) == len(self._children) - stopped
                ):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        found = []
        for child, output in zip(self._children, self._outputs, strict=True):
            with output:
                output.seek(0)
                found.append({"status": statuses[child], "output": output.read()})
        return found


def _fork(rank: int, count: int, port: int, work: Callable[[int], object], output: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if count > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        work(rank)
        status = 0
    except LorakitError as error:  # as the command line ends
        print(f"{type(error).__name__}: {error}")
    except SystemExit as error:
        status = int(error.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def at_step(number: int, action: Callable[[], object]) -> None:
    """Call `action` at the end of a step of this process, before the weights change."""
    original, calls = steps.clip_gradients, iter(range(1, 10_000))

    def acting(*args: Any) -> float:
        if next(calls) == number:
            action()
        return original(*args)

    steps.clip_gradients = acting


# --- scenarios ------------------------------------------------------------------------------------


def equality(root: Path) -> Any:
    """Take `steps_of` steps in float64 on 1, 2 and 4 processes; write the first gradients and the last weights."""

    def work(count: int, rank: int) -> None:
        with joined("cpu") as processes:
            assert (processes.rank, processes.count) == (rank, count)
            if rank:
                torch.linalg.svd = None  # PiSSA's vectors come from the first process
            for name in ways_on(count):
                settings = {"max_steps": steps_of(name), **with_data(root, WAYS[name])}
                job = prepare(run_config(root, "equality", **settings), processes)
                is_decoder = WAYS[name].get("base", "decoder") == "decoder"
                assert job.computation.packed == ("padded" not in name and is_decoder), name
                job.model.double()
                move(job.parameters)
                job.optimizer = build_optimizer(job.parameters, job.config.optimizer, 1e-2)
                tensors = take_steps(job, steps_of(name))
                for parameter in job.parameters.values():
                    assert parameter.dtype == torch.float64
                save_file(tensors, root / f"{name} {count} {rank}.safetensors")

    return {count: run(count, lambda rank, count=count: work(count, rank)) for count in COUNTS}


def move(parameters: Mapping[str, torch.Tensor]) -> None:
    """Add the same random numbers in every process: B is 0 at first, and so are then the gradients of A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.02 * noise)


def take_steps(job: Any, count: int) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, the loss of each step, and the weights after the last."""
    found: dict[str, torch.Tensor] = {}

    def record() -> None:
        for name, parameter in job.parameters.items():
            if parameter.grad is not None:
                found[f"gradient {name}"] = whole(parameter.grad)

    original = steps.clip_gradients
    at_step(1, record)
    losses, shares = [], []
    for number, examples in zip(range(count), job.step_plan.steps(), strict=False):
        done = steps.optimizer_step(job, examples, number)
        losses.append([done.loss, done.norm, done.tokens])
        shares.append(sum(map(len, job.share(examples))))
    steps.clip_gradients = original
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    found["examples"] = torch.tensor(shares)
    for name, parameter in job.parameters.items():
        found[f"weight {name}"] = whole(parameter.detach())
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered from all processes if it is sharded."""
    return getattr(tensor, "full_tensor", tensor.clone)().contiguous()


def sums(root: Path) -> Any:
    """Add up gradients of two dtypes, of which some processes lack one and all lack another."""

    def work(rank: int) -> None:
        with joined("cpu") as processes:
            parameters = [
                nn.Parameter(torch.zeros(2, dtype=dtype))
                for dtype in (torch.float32, torch.float64, torch.float32)
            ]
            everywhere, once, _nowhere = parameters
            everywhere.grad = torch.tensor([1.0, rank])
            if rank == 1:
                once.grad = torch.tensor([3.0, 5.0], dtype=torch.float64)
            numbers = processes.sum_gradients(parameters, [0.5, 2**40 + rank])
            grads = [None if p.grad is None else p.grad.tolist() for p in parameters]
            print(json.dumps({"numbers": numbers, "gradients": grads}))

    return run(3, work)


def whole_runs(root: Path) -> Any:
    """Train with everything that a run writes, on 1 and on 4 processes: texts with samples, and labels."""

    def work(count: int) -> None:
        evaluation = HeldOutConfig(every=5, samples=2, max_new_tokens=3)
        train(run_config(root, f"whole-{count}", evaluation=evaluation, epochs=1))
        data = DataConfig(train=str(root / "labels.jsonl"), validation_fraction=0.2)
        evaluation = HeldOutConfig(every=2, metric="accuracy", patience=3)
        train(
            run_config(
                root, f"labels-{count}", base="encoder", data=data, evaluation=evaluation, epochs=2
            )
        )

    return {count: run(count, lambda _, count=count: work(count)) for count in (1, 4)}


def interrupted(root: Path) -> Any:
    """Send a signal to one process of several, and resume on 2; compare with whole runs."""
    options = {
        "evaluation": HeldOutConfig(every=5, samples=2, max_new_tokens=3, batch_size=1),
        "epochs": 1,
        "checkpoints": CheckpointConfig(every=100),
    }
    config = run_config(root, "interrupted", **options)
    in_step = run_config(root, "interrupted-step", **options)
    in_evaluation = run_config(root, "interrupted-evaluation", **options)

    def work(rank: int) -> None:
        if rank == 2:
            at_step(4, lambda: signal.raise_signal(signal.SIGTERM))
        train(config)

    def work_until_scored(rank: int) -> None:
        original = computed._part

        def part(*args: Any) -> Any:
            if rank == 1 and at == [5]:
                signal.raise_signal(signal.SIGTERM)
            return original(*args)

        at: list[int] = []
        at_step(5, lambda: at.append(5))
        computed._part = part
        train(in_evaluation)

    def work_signalled_while_computing(rank: int) -> None:
        original = steps._accumulate_gradients

        def accumulate(*args: Any) -> tuple[float, int]:
            if rank == 1 and args[3] == 3:
                signal.raise_signal(signal.SIGINT)
            return original(*args)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        steps._accumulate_gradients = accumulate
        train(in_step)

    def checkpoints(run: TrainConfig) -> list[str]:
        return sorted(path.name for path in (Path(run.output) / "checkpoints").iterdir())

    stopped, names = run(4, work), checkpoints(config)
    again = run(2, lambda _: train(dataclasses.replace(config, resume=True)))
    evaluation = {
        "stopped": run(2, work_until_scored),
        "checkpoints": checkpoints(in_evaluation),
        "validated": [
            r["step"] for r in tiny_runs.metrics(Path(in_evaluation.output), "validation")
        ],
        "resumed": run(2, lambda _: train(dataclasses.replace(in_evaluation, resume=True))),
    }

    return {
        "stopped": stopped,
        "checkpoints": names,
        "resumed": again,
        "step": {
            "stopped": run(2, work_signalled_while_computing),
            "checkpoints": checkpoints(in_step),
        },
        "evaluation": evaluation,
    }


def mistakes(root: Path) -> Any:
    """Runs that end with an error; none may leave a folder that looks finished."""
    for name in ("here", "there", "bad"):
        (root / name).mkdir()
        source = {"here": "train", "there": "other", "bad": "bad"}[name]
        (root / name / "train.jsonl").write_text((root / f"{source}.jsonl").read_text())
    data = DataConfig(train="train.jsonl")

    def from_folders(*folders: str) -> Callable[[int], object]:
        def work(rank: int) -> None:
            os.chdir(root / folders[rank])
            train(run_config(root, "mistake", data=data, evaluation=HeldOutConfig()))

        return work

    def trained(name: str, **settings: Any) -> Callable[[int], object]:
        return lambda _: train(run_config(root, name, **settings))

    def with_a_gpu_in_one(rank: int) -> None:
        distributed._backend = lambda *_: ("gloo", "nccl")[rank]
        train(run_config(root, "mistake"))

    def without_a_device_in_one(rank: int) -> None:
        def fail(*_: object) -> str:
            raise RuntimeError("this GPU is in use\nCompile with `TORCH_USE_CUDA_DSA`")

        if rank == 1:
            distributed._backend = fail
        train(run_config(root, "mistake"))

    def with_other_software(rank: int) -> None:
        installed = opening.versions()
        opening.versions = lambda: {**installed, "python": f"3.1{rank}", "torch": f"2.{rank}"}
        train(run_config(root, "mistake"))

    def with_a_run_folder_of_its_own(rank: int) -> None:
        nan_at_step(6)
        if rank == 1:
            checkpoint.checkpoints_in = lambda _: []
        optimizer = dataclasses.replace(RATE, on_divergence="rewind")
        settings = {"optimizer": optimizer, "checkpoints": CheckpointConfig(every=2)}
        train(run_config(root, "not-shared", max_steps=10, **settings))

    return {
        "other software": run(2, with_other_software),
        "other settings": run(
            2, lambda rank: train(run_config(root, "mistake", batch_size=4 + rank))
        ),
        "not shared": run(2, with_a_run_folder_of_its_own),
        "one GPU": run(2, with_a_gpu_in_one),
        "no device": run(2, without_a_device_in_one),
        "other data": run(2, from_folders("here", "there")),
        "bad data": run(2, from_folders("here", "bad")),
        "exploding": run(
            2,
            trained(
                "exploded",
                method="full",
                optimizer=OptimizerConfig(learning_rate=1e30, clip=0, warmup=0),
            ),
        ),
        "existing": run(2, trained("exploded")),
        "folders": sorted(path.name for path in root.iterdir() if path.is_dir()),
    }


def recovery(root: Path) -> Any:
    """The last process runs out of memory, and has a NaN once; resume with more steps on one process."""
    optimizer = dataclasses.replace(RATE, schedule="constant", on_divergence="rewind")

    def settings(count: int, **overrides: Any) -> TrainConfig:
        shared = {"optimizer": optimizer, "max_steps": 10, "checkpoints": CheckpointConfig(every=2)}
        return run_config(root, f"recovery-{count}", **{**shared, "packing": False, **overrides})

    def work(count: int, rank: int) -> None:
        if rank == count - 1:
            nan_at_step(6)
            if count > 1:
                limit_tokens(60)
        train(settings(count))

    done = {count: run(count, lambda rank, count=count: work(count, rank)) for count in (1, 2)}
    alone = settings(2, max_steps=11, resume=True)
    too_large = settings(2, output=str(root / "too-large"))

    def without_memory(rank: int) -> None:
        if rank == 1:
            limit_tokens(40)
        train(too_large)

    return {
        **done,
        "resumed": run(1, lambda _: train(alone)),
        "too large": run(2, without_memory),
    }


def nan_at_step(number: int) -> None:
    """Make this process's part of a loss NaN, the first time that the run takes this step."""
    step, accumulate = loop.optimizer_step, steps._accumulate_gradients
    times = iter([True])

    def stepping(*args: Any) -> Any:
        bad = args[2] + 1 == number and next(times, False)
        steps._accumulate_gradients = (
            (lambda *a: (float("nan"), accumulate(*a)[1])) if bad else accumulate
        )
        return step(*args)

    loop.optimizer_step = stepping


def limit_tokens(most: int) -> None:
    """Let the forward pass of larger batches run out of memory in this process, once the run has begun."""
    adopt = loop.adopt_batch_sizes

    def limited(job: Any, state: Any) -> None:
        job.model.get_input_embeddings().register_forward_pre_hook(require_few)
        adopt(job, state)

    def require_few(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    loop.adopt_batch_sizes = limited


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "sums": sums,
    "equality": equality,
    "whole": whole_runs,
    "interrupted": interrupted,
    "mistakes": mistakes,
    "recovery": recovery,
}

if __name__ == "__main__":
    main()
