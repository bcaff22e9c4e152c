"""Projections in 4 and 8 bits: run time of a layer, and accuracy after merging an adapter into them.

python -m benchmarks.quantised layers     one block of SmolLM2, forward and backward; with torchao if installed
python -m benchmarks.quantised merging    an adapter trained over a quantised base, merged by lorakit and by PEFT
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.latency import shuffled

BASE = "smollm2-135m"
SHAPES = {(576, 576): 2, (576, 192): 2, (576, 1536): 2, (1536, 576): 1}
"""(in, out) of the projections of a block -> number of such projections."""

# --- layers ------------------------------------------------------------------------------------------


def candidates() -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Return functions that quantise a layer, by name."""
    import bitsandbytes as bnb

    from lorakit.models.quantised_layers import Int8Linear, NF4Linear

    def bnb_nf4(layer: nn.Linear, nested: bool = False) -> nn.Module:
        quantised = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
        options = {"quant_type": "nf4", "compress_statistics": nested}
        weight = layer.weight.data.clone()
        quantised.weight = bnb.nn.Params4bit(weight, module=quantised, **options)
        return quantised.to("cpu")

    def bnb_int8(layer: nn.Linear) -> nn.Module:
        quantised = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
        )
        quantised.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False)
        return quantised.to("cpu")

    def ao_int8(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        container = nn.Sequential(copy.deepcopy(layer))
        quantize_(container, Int8WeightOnlyConfig(set_inductor_config=False))
        return container[0]

    def ao_nf4(layer: nn.Linear) -> nn.Module:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        quantised = copy.deepcopy(layer)
        # The default block of 256 scales does not divide the small matrices.
        packed = to_nf4(layer.weight.data, scaler_block_size=27)
        quantised.weight = nn.Parameter(packed, requires_grad=False)
        return quantised

    quantisers: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "bfloat16": copy.deepcopy,
        "lorakit nf4": NF4Linear,
        "lorakit int8": Int8Linear,
        "bitsandbytes nf4": bnb_nf4,
        "bitsandbytes nf4, nested scales": lambda layer: bnb_nf4(layer, nested=True),
        "bitsandbytes int8": bnb_int8,
    }
    if find_spec("torchao"):
        quantisers |= {"torchao int8": ao_int8, "torchao nf4": ao_nf4}
    return quantisers


def dequantised_weight(layer: nn.Module) -> Tensor:
    """Return the dequantised weight of a layer, in float32."""
    from lorakit.models.quantised import quantised_weight

    weight = quantised_weight(layer)
    if weight is not None:
        return weight.matrix()
    for name in ("get_original_weight", "dequantize"):  # torchao
        if hasattr(layer.weight, name) and type(layer.weight) is not nn.Parameter:
            return getattr(layer.weight, name)().float()
    return layer.weight.detach().float()  # type: ignore[union-attr, operator]


def timed(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[float, float, float]:
    """Return the seconds of a forward and a backward pass in training, and of a forward pass in evaluation."""
    inputs = x.detach().requires_grad_()
    layer.train()
    began = time.perf_counter()
    output = layer(inputs)
    forward = time.perf_counter()
    output.backward(upstream)
    backward = time.perf_counter()
    layer.eval()
    with torch.no_grad():
        evaluation = time.perf_counter()
        layer(x)
        return forward - began, backward - forward, time.perf_counter() - evaluation


@torch.no_grad()
def error(layer: nn.Module, x: Tensor) -> float:
    """Return the relative error of a layer's output against the product with its dequantised weight."""
    exact = x.double() @ dequantised_weight(layer).double().T
    return ((layer(x).double() - exact).norm() / exact.norm()).item()


def measure_layers(rows: int, rounds: int) -> Table:
    """Time the projections of one block alternately, and compute the errors of their outputs."""
    torch.manual_seed(0)
    quantisers = candidates()
    seconds = {name: [0.0, 0.0, 0.0] for name in quantisers}
    errors = {name: [0.0, 0.0] for name in quantisers}
    for (n_in, n_out), count in SHAPES.items():
        whole = nn.Linear(n_in, n_out, bias=False).bfloat16().requires_grad_(False)
        nn.init.normal_(whole.weight, std=0.1)
        layers = {name: quantise(whole) for name, quantise in quantisers.items()}
        x, upstream = torch.randn(rows, n_in).bfloat16(), torch.randn(rows, n_out).bfloat16()
        for name, layer in layers.items():
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # a repacked weight has no gradient
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            both = error(layer.train(), x), error(layer.eval(), x)
            errors[name] = [max(pair) for pair in zip(errors[name], both, strict=True)]
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in layers}
        for _, name in shuffled(layers, rounds):
            times[name].append(timed(layers[name], x, upstream))
        for name, rows_of_times in times.items():
            medians = [count * median(step) for step in zip(*rows_of_times, strict=True)]
            seconds[name] = [sum(pair) for pair in zip(seconds[name], medians, strict=True)]
    table = Table("", "forward", "backward", "evaluation", "error, training", "error, evaluation")
    for name in quantisers:
        table.add_row(
            name, *(f"{1e3 * s:.1f} ms" for s in seconds[name]), *(f"{e:.1e}" for e in errors[name])
        )
    return table


# --- merging -----------------------------------------------------------------------------------------


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list) -> float:
    """Return the cross-entropy per target token, computed one example at a time."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        targets = torch.tensor(example.loss_mask)[1:].nonzero()[:, 0]
        predicted = model(input_ids=ids).logits[0, targets].float()
        total += F.cross_entropy(predicted, ids[0, targets + 1], reduction="sum").item()
        count += len(targets)
    return total / count


def measure_merging(kind: str, steps: int, limit: int) -> list[Table]:
    """Train on a quantised base, then merge three ways: dequantised, requantised (PEFT), and unquantised base."""
    import peft

    import lorakit
    from lorakit.data import load_examples
    from lorakit.models.base_config import BaseConfig
    from lorakit.models.quantised import quantised_weights

    def base(dtype: str) -> nn.Module:
        return lorakit.load_base(BASE, dtype=dtype).model  # type: ignore[arg-type]

    tokenizer = lorakit.load_base(BASE).tokenizer
    assert tokenizer is not None
    data = lorakit.DataConfig(train="docstrings", limit=limit, task="completion")
    examples = list(load_examples(data, "validation", tokenizer).examples)
    losses = {"the base, bfloat16": mean_loss(base("bfloat16"), examples)}
    with tempfile.TemporaryDirectory() as folder:
        lorakit.train(
            lorakit.TrainConfig(
                base=BaseConfig(name=BASE, dtype=kind),  # type: ignore[arg-type]
                data=lorakit.DataConfig(train="docstrings"),
                lora=lorakit.LoRA(rank=8, alpha=16, targets="all-linear"),
                output=f"{folder}/run",
                max_steps=steps,
                batch_size=8,
            )
        )
        adapter = Path(folder, "run", "adapter")
        model = base(kind)
        losses[f"the base, {kind}"] = mean_loss(model, examples)
        W = {path: weight.matrix() for path, weight in quantised_weights(model)}
        adapters = lorakit.load(model, adapter, name="a")
        deltas = {path: m.delta_matrix().detach() for path, m in adapters.modules("a").items()}
        losses[f"{kind} with the adapter, unmerged"] = mean_loss(model, examples)
        adapters.merge()
        losses["merged by lorakit: dequantised weights"] = mean_loss(model, examples)
        theirs = peft.PeftModel.from_pretrained(base(kind), str(adapter))
        theirs.merge_adapter()
        losses["merged by PEFT: requantised weights"] = mean_loss(theirs, examples)
        rows = survival(W, deltas, theirs)
        theirs.unmerge_adapter()
        after = {path: weight.matrix() for path, weight in quantised_weights(theirs)}
        changed = sum(int((after[_in_peft(path)] != before).sum()) for path, before in W.items())
        share = changed / sum(before.numel() for before in W.values())
        rows.append(("base weights changed after PEFT's unmerge", f"{share:.1%}"))
        model = base("bfloat16")
        adapters = lorakit.load(model, adapter, name="a")
        losses["bfloat16 with the adapter, unmerged"] = mean_loss(model, examples)
        adapters.merge()
        losses["merged into bfloat16"] = mean_loss(model, examples)
    by_loss, by_delta = Table("", "held-out loss"), Table("requantised weights", "")
    for name, loss in losses.items():
        by_loss.add_row(name, f"{loss:.4f}")
    for row in rows:
        by_delta.add_row(*row)
    return [by_loss, by_delta]


def survival(
    W: dict[str, Tensor], deltas: dict[str, Tensor], merged: nn.Module
) -> list[tuple[str, str]]:
    """Return rows on how much of the deltas PEFT's merged weights keep: projection on the delta, and error."""
    from lorakit.models.quantised import quantised_weights

    after = {path: weight.matrix() for path, weight in quantised_weights(merged)}
    projections, errors, sizes = [], [], []
    for path, delta in deltas.items():
        change = after[_in_peft(path)] - W[path]
        projections.append(float((change * delta).sum() / delta.square().sum()))
        errors.append(float((change - delta).norm() / delta.norm()))
        sizes.append(float(delta.norm() / W[path].norm()))
    return [
        ("size of the delta relative to its weight", f"{median(sizes):.2%}"),
        ("fraction of the delta in the merged weight", f"{median(projections):.0%}"),
        ("error of the merged weight relative to the delta", f"{median(errors):.2f}"),
    ]


def _in_peft(path: str) -> str:
    return f"base_model.model.{path}.base_layer"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["layers", "merging"])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[512, 1024], help="rows of the input"
    )
    parser.add_argument("--rounds", type=int, default=25, help="timings per layer")
    parser.add_argument(
        "--dtype", choices=["nf4", "int8"], default="nf4", help="dtype of the base to merge into"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--examples", type=int, default=150, help="examples for the held-out loss")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # bitsandbytes logs every cast of an input to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*erge lora module to .*-bit linear may get")
    from benchmarks.report import console

    if args.part == "layers":
        for rows in args.rows:
            console.print(f"{rows} rows, {torch.get_num_threads()} threads")
            console.print(measure_layers(rows, args.rounds))
    else:
        for table in measure_merging(args.dtype, args.steps, args.examples):
            console.print(table)


if __name__ == "__main__":
    main()
