"""What merging and unmerging leaves behind in the base weights: lorakit beside PEFT.

Merges and unmerges eight adapters in turn, many times, on a small Llama, and prints how far the base has
moved, and how far a merged weight is from ``round(float32(W) + delta)``.

    python benchmarks/merge_drift.py --cycles 1000
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit

ADAPTERS = 8


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


def moved(base: dict[str, torch.Tensor], model: torch.nn.Module) -> tuple[int, float]:
    """Number of base values that are no longer bit for bit the same, and the largest change."""
    count, largest = 0, 0.0
    for name, now in model.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if name in base:
            differs = base[name] != now
            count += int(differs.sum())
            largest = max(largest, (base[name].float() - now.float()).abs().max().item())
    return count, largest


def exact_merges(handle: lorakit.Adapters) -> bool:
    """Whether every merged weight is round(float32(W) + delta)."""
    modules = handle.modules(next(iter(handle.merged)))
    for path, module in modules.items():
        layer = handle.model.get_submodule(path)
        W = layer.adapters.base(layer, "weight").detach()
        delta = module.scaling * (module.lora_B.detach() @ module.lora_A.detach())
        if not torch.equal(layer.weight, (W.float() + delta).to(W.dtype)):
            return False
    return True


def run_lorakit(dtype: torch.dtype, cycles: int):
    model = small_llama(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    handle = with_adapters(model)
    exact, began = True, time.perf_counter()
    for i in range(cycles):
        handle.merge(f"a{i % ADAPTERS}")
        if i < ADAPTERS:
            exact &= exact_merges(handle)
        handle.unmerge()
    return *moved(base, model), exact, time.perf_counter() - began


def run_peft(dtype: torch.dtype, cycles: int):
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
    return *moved(base, peft), None, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    cycles = parser.parse_args().cycles
    warnings.simplefilter("ignore")
    table = Table(title=f"{cycles} merge and unmerge cycles over {ADAPTERS} adapters")
    headings = (
        "dtype",
        "library",
        "base values changed",
        "largest change",
        "merges exact",
        "ms a cycle",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for name, run in (("lorakit", run_lorakit), ("PEFT", run_peft)):
            count, largest, exact, seconds = run(dtype, cycles)
            table.add_row(
                str(dtype).removeprefix("torch."),
                name,
                f"{count:,}",
                f"{largest:.3g}",
                "-" if exact is None else str(exact),
                f"{1000 * seconds / cycles:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
