"""Changes in the base weights after merging and unmerging: lorakit and PEFT.

Merges and unmerges eight adapters one after the other, many times, on a small Llama. Reports how much the base
weights changed, and whether every merged weight equals ``round(float32(W) + delta)``.

python -m benchmarks.merge_drift lorakit --dtype bfloat16 --cycles 1000 --result FILE    one process
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from benchmarks import report
from benchmarks.runs import process_parser, runs_of, write_result
from lorakit.models.parameter_swaps import base_parameter

ADAPTERS = 8
CYCLES, QUICK_CYCLES = 1000, 100
ROUNDS = 3
DTYPES = ("float32", "bfloat16")


# --- one process -------------------------------------------------------------------------------------


def small_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def with_adapters(model: LlamaForCausalLM) -> lorakit.Adapters:
    method = lorakit.LoRA(rank=8, alpha=16, targets="all-linear")
    for i in range(ADAPTERS):
        handle = lorakit.attach(model, method, name=f"a{i}", seed=i)
        generator = torch.Generator().manual_seed(i)
        for parameter in handle.trainable_parameters(f"a{i}"):
            parameter.data.normal_(std=0.05, generator=generator)
    return handle


def changed_values(base: dict[str, torch.Tensor], model: torch.nn.Module) -> tuple[int, float]:
    """Return the number of base values that are no longer bit-identical, and the largest change."""
    count, largest = 0, 0.0
    for name, now in model.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if name in base:
            differs = base[name] != now
            count += int(differs.sum())
            largest = max(largest, (base[name].float() - now.float()).abs().max().item())
    return count, largest


def exact_merges(handle: lorakit.Adapters) -> bool:
    """Return whether every merged weight is round(float32(W) + delta)."""
    modules = handle.modules(next(iter(handle.merged)))
    for path, module in modules.items():
        layer = handle.model.get_submodule(path)
        W = base_parameter(layer, "weight").detach()
        delta = module.scaling * (module.lora_B.detach() @ module.lora_A.detach())
        if not torch.equal(layer.weight, (W.float() + delta).to(W.dtype)):
            return False
    return True


def of_lorakit(dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    """Merge and unmerge with lorakit."""
    model = small_llama(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    handle = with_adapters(model)
    exact, began = True, time.perf_counter()
    for i in range(cycles):
        handle.merge(f"a{i % ADAPTERS}")
        if i < ADAPTERS:
            exact &= exact_merges(handle)
        handle.unmerge()
    seconds = time.perf_counter() - began
    changed, largest = changed_values(base, model)
    return {"changed": changed, "largest": largest, "exact": exact, "seconds": seconds / cycles}


def of_peft(dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    """Merge and unmerge the same adapters with PEFT."""
    model = small_llama(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        handle = with_adapters(copy.deepcopy(model))
        for name in handle.names:
            handle.save(f"{folder}/{name}", name)
        peft = PeftModel.from_pretrained(model, f"{folder}/a0", adapter_name="a0")
        for name in handle.names[1:]:
            peft.load_adapter(f"{folder}/{name}", adapter_name=name)
    began = time.perf_counter()
    for i in range(cycles):
        peft.merge_adapter([f"a{i % ADAPTERS}"])
        peft.unmerge_adapter()
    seconds = time.perf_counter() - began
    changed, largest = changed_values(base, peft)
    return {"changed": changed, "largest": largest, "exact": None, "seconds": seconds / cycles}


LIBRARIES = {"lorakit": of_lorakit, "PEFT": of_peft}


def run() -> None:
    """Measure in this process."""
    parser = process_parser(__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--cycles", type=int, default=CYCLES)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    figures = LIBRARIES[args.library](getattr(torch, args.dtype), args.cycles)
    write_result(args, figures)


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure both libraries in both dtypes, and write their table."""
    report.say("\nmerge: base weights after merging and unmerging")
    cycles = QUICK_CYCLES if quick else CYCLES
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(1 if quick else ROUNDS):
        for dtype in DTYPES:
            for name in LIBRARIES:
                figure = runs_of("merge", dtype, quick).run(
                    f"{number} {name}",
                    *("benchmarks.merge_drift", name, "--dtype", dtype, "--cycles", str(cycles)),
                )
                figures.setdefault(dtype, {}).setdefault(name, []).append(figure)
                report.say(
                    f"  {number + 1}  {dtype:<9} {name:<8} {1000 * figure['seconds']:.2f} ms per cycle"
                )
    section = report.Section(
        f"{cycles:,} merge and unmerge cycles over {ADAPTERS} adapters", drift(figures)
    )
    report.publish("merge", {"machine": report.machine(), "runs": figures}, [section], quick)


def drift(figures: dict[str, dict[str, list[dict[str, Any]]]]) -> Table:
    """Return a table of the changes, which are the same in every run, and the median time per cycle."""
    table = report.table(
        "dtype, library", "base values changed", "largest change", "merges exact", "ms per cycle"
    )
    for dtype, libraries in figures.items():
        for name, runs in libraries.items():
            table.add_row(
                f"{dtype}, {name}",
                f"{runs[0]['changed']:,}",
                f"{runs[0]['largest']:.3g}",
                {True: "yes", False: "no", None: "-"}[runs[0]["exact"]],
                f"{1000 * median(run['seconds'] for run in runs):.2f}",
            )
    return table


if __name__ == "__main__":
    run()
