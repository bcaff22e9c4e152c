"""Adapters on the experts of a mixture: lorakit, PEFT, and adapters on attention alone.

Every process builds one random mixture of experts, adapts it, and times training steps and steps of a generation, each
on tokens of its own. Adapters on attention show what a step costs without those on experts.

python -m benchmarks.experts lorakit float32 --result FILE    one process
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import lorakit
from benchmarks import report
from benchmarks.measure import peak_memory, restart_peak
from benchmarks.runs import process_parser, runs_of, write_result

RANK, ALPHA = 8, 16
TOKENS, PROMPT = 512, 32
STEPS, QUICK_STEPS = 8, 2
DECODED, QUICK_DECODED = 48, 8
ROUNDS, QUICK_ROUNDS = 3, 1
DTYPES = ("float32", "bfloat16")
VOCABULARY = 1000


def mixture(dtype: str) -> nn.Module:
    """Return a random model of 4 blocks, each with 64 experts of which every token uses 8."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        moe_intermediate_size=384,
        num_experts=64,
        num_experts_per_tok=8,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def with_lorakit(model: nn.Module, targets: str) -> nn.Module:
    lorakit.attach(model, lorakit.LoRA(rank=RANK, alpha=ALPHA, targets=targets))
    return model


def with_peft(model: Any) -> Any:
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(model, config)


ADAPTED: dict[str, Callable[[Any], Any]] = {
    "attention alone": lambda model: with_lorakit(model, "attention"),
    "lorakit": lambda model: with_lorakit(model, "experts"),
    "PEFT": with_peft,
}


# --- one process -------------------------------------------------------------------------------------


def run() -> None:
    """Measure in this process."""
    parser = process_parser(__doc__)
    parser.add_argument("adapters", choices=ADAPTED)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decoded", type=int, default=DECODED)
    args = parser.parse_args()
    model = ADAPTED[args.adapters](mixture(args.dtype))
    training = timed_steps(model.train(), args.steps)
    restart_peak()
    figures = {"step": median(training), "memory": peak_of(model)}
    figures["token"] = median(timed_tokens(model.eval(), args.decoded))
    write_result(args, figures)


def timed_steps(model: Any, count: int) -> list[float]:
    """Return the seconds of forward and backward passes over random tokens, after a first one."""
    seconds = []
    for _ in range(count + 1):
        tokens = torch.randint(VOCABULARY, (1, TOKENS))
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        seconds.append(time.perf_counter() - began)
        model.zero_grad()
    return seconds[1:]


def peak_of(model: Any) -> int:
    """Return the peak memory of the process in one more step."""
    timed_steps(model, 0)
    return peak_memory()


@torch.no_grad()
def timed_tokens(model: Any, count: int) -> list[float]:
    """Return the seconds of each token after a prompt, after a first one."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    seconds = []
    for _ in range(count + 1):
        token = torch.randint(VOCABULARY, (1, 1))
        began = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure all three alternately in both dtypes, and write their table."""
    report.say("\nexperts: training and decoding with adapters on stacked experts")
    runs = runs_of("experts", "mixture", quick)
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {
        dtype: {name: [] for name in ADAPTED} for dtype in DTYPES
    }
    counts = ["--steps", str(QUICK_STEPS), "--decoded", str(QUICK_DECODED)] if quick else []
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        for dtype in DTYPES:
            for name in ADAPTED:
                key = f"{number} {dtype} {name}"
                found = runs.run(key, "benchmarks.experts", name, dtype, *counts)
                figures[dtype][name].append(found)
                report.say(
                    f"  {number + 1}  {dtype:<9} {name:<16} {1000 * found['step']:.0f} ms a step, "
                    f"{1000 * found['token']:.1f} ms a token, {found['memory'] / 1e9:.2f} GB"
                )
    section = report.Section(
        f"Adapters of rank {RANK} on the experts of a mixture: 4 blocks, 64 experts, 8 for each token",
        durations(figures),
        f"A step is a forward and backward pass over {TOKENS} tokens, a token one step of a generation with batch size "
        f"1. Medians of {ROUNDS} processes in alternating order; in brackets, the ratio to those on attention alone. "
        "Memory is the peak of the process in a training step.",
    )
    report.publish("experts", {"machine": report.machine(), "runs": figures}, [section], quick)


def durations(figures: dict[str, dict[str, list[dict[str, Any]]]]) -> Table:
    """Return a table of medians, and their ratios to adapters on attention alone."""
    table = report.table("dtype", "adapters", "step (ms)", "token (ms)", "memory (GB)")
    for dtype, by_name in figures.items():
        medians = {
            name: {key: median(one[key] for one in found) for key in ("step", "token", "memory")}
            for name, found in by_name.items()
        }
        least = medians["attention alone"]
        for name, found in medians.items():
            times = [
                f"{1000 * found[key]:,.{digits}f} (x {found[key] / least[key]:.2f})"
                for key, digits in (("step", 0), ("token", 1))
            ]
            table.add_row(dtype, name, *times, f"{found['memory'] / 1e9:.2f}")
    return table


if __name__ == "__main__":
    run()
