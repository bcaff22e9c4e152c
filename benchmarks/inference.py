"""Inference latency with an adapter: base, lorakit merged and unmerged, PEFT unmerged.

Every process loads the models in a different order and interleaves their steps: the prefill of one prompt, and
decode steps of a batch, as in `model.generate`. Ratios compare single steps (benchmarks.latency), over the steps
of all processes.

python -m benchmarks.inference --dtype bfloat16 --result FILE    one process
"""

from __future__ import annotations

import copy
import random
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import lorakit
from benchmarks import report
from benchmarks.latency import Times, in_turn, operations, ratio
from benchmarks.runs import process_parser, runs_of, write_result
from benchmarks.systems.peft_trainer import TARGETS
from benchmarks.workloads import SEED
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.dtypes import dtype_name
from lorakit.models.loading import load_base

BASE_MODEL = "smollm2-135m"
RANK, ALPHA = 8, 16
PROMPT = 512
"""Prompt tokens in a prefill."""
BATCH, CONTEXT = 8, 128
"""Batch size of decode steps, and the tokens before the first decoded one."""
ROUNDS = 3
STEPS = {"prefill": 8, "decode": 40}
QUICK_STEPS = {"prefill": 4, "decode": 20}
FEWEST = 8
"""Steps that the interval of a median needs: that of four covers 88 %."""

DTYPES = ("bfloat16", "float32")
BASE = "base"
TARGET_NAMES = {"attention.qv": "q and v", "all-linear": "all linear layers"}
LIMITS = {
    "lorakit merged, all linear layers": {"prefill": 1.03, "decode": 1.03},
    "lorakit unmerged, q and v": {"prefill": 1.05, "decode": 1.10},
    "lorakit unmerged, all linear layers": {"prefill": 1.15, "decode": 1.20},
}
"""Target: the largest acceptable ratio to the base."""


# --- one process -------------------------------------------------------------------------------------


def variants(base: PreTrainedModel) -> dict[str, Callable[[], nn.Module]]:
    """Return a function that builds each model, by its name in the tables."""
    builders: dict[str, Callable[[], nn.Module]] = {BASE: lambda: copy.deepcopy(base)}
    builders["lorakit merged, all linear layers"] = lambda: _lorakit(
        base, "all-linear", merged=True
    )
    for targets, name in TARGET_NAMES.items():
        builders[f"lorakit unmerged, {name}"] = lambda t=targets: _lorakit(base, t)
    for targets, name in TARGET_NAMES.items():
        builders[f"PEFT unmerged, {name}"] = lambda t=targets: _peft(base, t)
        if base.dtype != torch.float32:
            dtype = dtype_name(base.dtype)
            builders[f"PEFT unmerged, {name}, adapter in {dtype}"] = lambda t=targets: _peft(
                base, t, autocast_adapter_dtype=False
            )
    return builders


def _lorakit(base: PreTrainedModel, targets: str, *, merged: bool = False) -> nn.Module:
    model = copy.deepcopy(base)
    method = lorakit.LoRA(rank=RANK, alpha=ALPHA, targets=targets)
    handle = lorakit.attach(model, method, seed=SEED)
    fill_lora_b(model)
    if merged:
        handle.merge()
    return model.eval()


def _peft(base: PreTrainedModel, targets: str, **options: Any) -> nn.Module:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[targets]
    )
    model = get_peft_model(copy.deepcopy(base), config, **options)
    fill_lora_b(model)
    return model.eval()


def fill_lora_b(model: nn.Module, names: Sequence[str] = ("default",)) -> None:
    """Fill each adapter's lora_B, which starts at zero, with random values of its own, like those after training."""
    for i, name in enumerate(names):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED + i)
        for path, parameter in model.named_parameters():
            if "lora_B" in path and name in path.split("."):
                parameter.data.normal_(std=0.02, generator=generator)


def prefill_call(model: nn.Module, prompt: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs the prompt through the model up to the logits of the next token."""
    return partial(model, input_ids=prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode_call(
    model: Callable[..., Any], config: Any, prompts: torch.Tensor
) -> Callable[[], object]:
    """Return a function that decodes one token per row, with a cache that grows with each call."""
    cache = DynamicCache(config=config)
    model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return partial(model, input_ids=prompts[:, -1:], past_key_values=cache, use_cache=True)


def frozen_base(dtype: str) -> PreTrainedModel:
    """Return the base, frozen as by an adapter: PyTorch computes products with trainable weights in another shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(BASE_MODEL, dtype=dtype).model.to(device)  # type: ignore[arg-type]
    return base.requires_grad_(False)


def measure(dtype: str, steps: dict[str, int], seed: int, trace: bool) -> dict[str, Any]:
    """Build the models in random order, and time their interleaved steps."""
    base = frozen_base(dtype)
    builders = list(variants(base).items())
    random.Random(seed).shuffle(builders)
    models = {name: build() for name, build in builders}
    generator = torch.Generator().manual_seed(seed)

    def tokens(rows: int, length: int) -> torch.Tensor:
        shape = (rows, length)
        return torch.randint(base.config.vocab_size, shape, generator=generator).to(base.device)

    prompt, prompts = tokens(1, PROMPT), tokens(BATCH, CONTEXT)
    calls = {
        "prefill": {name: prefill_call(model, prompt) for name, model in models.items()},
        "decode": {
            name: decode_call(model, base.config, prompts) for name, model in models.items()
        },
    }
    figures: dict[str, Any] = {
        kind: in_turn(calls[kind], steps[kind], seed=seed) for kind in ("prefill", "decode")
    }
    if trace:
        figures["operations"] = {
            kind: compare_to_base({name: operations(call) for name, call in calls[kind].items()})
            for kind in calls
        }
    return figures


def compare_to_base(traces: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Return the count of each operation of each model, and whether its sequence equals that of the base."""
    return {
        name: {"same": trace == traces[BASE], "counts": dict(sorted(Counter(trace).items()))}
        for name, trace in traces.items()
    }


def step_parser(doc: str | None) -> ArgumentParser:
    """Return the parser of a process that times steps."""
    parser = process_parser(doc)
    parser.add_argument("--dtype", default="auto")
    for kind, count in STEPS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run() -> None:
    """Measure in this process."""
    parser = step_parser(__doc__)
    parser.add_argument("--trace", action="store_true", help="also count the operations")
    args = parser.parse_args()
    steps = {"prefill": args.prefill, "decode": args.decode}
    figures = measure(args.dtype, steps, args.seed, args.trace)
    write_result(args, figures)


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure latencies, and write their tables."""
    report.say("\ninference: base, merged and unmerged, interleaved")
    record = measured("inference", "benchmarks.inference", quick, first=["--trace"])
    report.publish("inference", record, sections(record), quick)


def measured(part: str, module: str, quick: bool, first: Sequence[str] = ()) -> dict[str, Any]:
    """Run `module` in processes of its own, round after round.

    Args:
        part: The part of the benchmarks.
        module: Takes the arguments of `run`.
        quick: One round with few steps.
        first: Further arguments of the first round.

    Returns:
        The machine, the base, and by dtype the figures of each process.
    """
    record: dict[str, Any] = {"machine": report.machine(), "base": BASE_MODEL}
    best = dtype_name(compute_dtype())
    # One process in float32 for comparison; the main results use the dtype of `auto`.
    rounds = {best: 1} if quick else {"float32": 1, best: ROUNDS}
    for dtype in sorted(rounds):
        runs = runs_of(part, dtype, quick)
        record[dtype] = []
        steps = STEPS if rounds[dtype] > 1 else QUICK_STEPS
        for number in range(rounds[dtype]):
            command = [module, "--dtype", dtype, "--seed", str(number)]
            command += [word for kind in steps for word in (f"--{kind}", str(steps[kind]))]
            figures = runs.run(str(number), *command, *([] if number else first))
            record[dtype].append(figures)
            report.say(f"  {dtype}, process {number + 1}: {figures['process_seconds']:.0f} s")
    return record


def step_sections(record: dict[str, Any], titles: dict[str, str]) -> Iterator[report.Section]:
    """Yield a table for each dtype and kind of step.

    Args:
        record: The figures of :func:`measured`.
        titles: The title of each kind of step.
    """
    for dtype in (name for name in record if name in DTYPES):
        for kind, title in titles.items():
            yield report.Section(
                f"{title}: {record['base']}, {dtype}",
                latencies([run[kind] for run in record[dtype]], kind),
            )


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the tables."""
    titles = {
        "prefill": f"Prefill of {PROMPT} tokens",
        "decode": f"Decode step, {BATCH} rows after {CONTEXT} tokens",
    }
    yield from step_sections(record, titles)
    dtype = next(name for name in record if name in DTYPES)
    counts = operation_counts(record[dtype][0]["operations"])
    yield report.Section("Operations counted by the profiler", counts)


def latencies(processes: list[Times], kind: str) -> Any:
    """Return a table of the times of one kind of step, with ratios to the base."""
    table = report.table(
        "model", "ms", "x base (95 % interval)", "range across processes", "target, at most"
    )
    pooled = {name: [t for times in processes for t in times[name]] for name in processes[0]}
    for name in sorted(pooled, key=_sort_key):
        ratios = [
            median(a / b for a, b in zip(times[name], times[BASE], strict=True))
            for times in processes
        ]
        limit, found = LIMITS.get(name), ratio(pooled[name], pooled[BASE])
        table.add_row(
            name,
            f"{1000 * median(pooled[name]):.1f}",
            "1"
            if name == BASE
            else str(found if len(pooled[name]) >= FEWEST else f"{found.middle:.3f}"),
            "" if name == BASE or len(ratios) == 1 else f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{limit[kind]:.2f}" if limit else "",
        )
    return table


def _sort_key(name: str) -> tuple[bool, bool, str]:
    """Return the sort key of a model in a table: the base first, then lorakit."""
    return name != BASE, not name.startswith("lorakit"), name


def operation_counts(traces: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """Return a table of each model's operations, and whether their sequence equals that of the base."""
    table = report.table("model", "prefill", "decode step", "same as the base")
    for name in sorted(traces["prefill"], key=_sort_key):
        both = [traces[kind][name] for kind in ("prefill", "decode")]
        counts = (f"{sum(trace['counts'].values()):,}" for trace in both)
        same = all(trace["same"] for trace in both)
        table.add_row(name, *counts, "yes" if same else "no")
    return table


if __name__ == "__main__":
    run()
