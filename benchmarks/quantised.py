"""Projections in 4 and 8 bits: what a layer costs, and what becomes of an adapter that is merged into them.

python -m benchmarks.quantised layers     one block of SmolLM2, forward and backward; torchao too if it is installed
python -m benchmarks.quantised merging    an adapter trained over a quantised base, merged by lorakit and by PEFT
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import random
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

BASE = "smollm2-135m"
SHAPES = {(576, 576): 2, (576, 192): 2, (576, 1536): 2, (1536, 576): 1}
"""Inputs and outputs of a block's projections, and how many there are of each."""

# --- layers ------------------------------------------------------------------------------------------


def candidates() -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """What makes a layer with a quantised weight of an ordinary one, by name."""
    import bitsandbytes as bnb

    from lorakit.models.quantised_layers import Int8Linear, NF4Linear

    def bnb_nf4(layer: nn.Linear, nested: bool = False) -> nn.Module:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
        options = {"quant_type": "nf4", "compress_statistics": nested}
        made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), module=made, **options)
        return made.to("cpu")

    def bnb_int8(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False)
        return made.to("cpu")

    def ao_int8(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        made = nn.Sequential(copy.deepcopy(layer))
        quantize_(made, Int8WeightOnlyConfig(set_inductor_config=False))
        return made[0]

    def ao_nf4(layer: nn.Linear) -> nn.Module:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        made = copy.deepcopy(layer)
        # Its default of 256 scales in a block does not divide the small matrices.
        packed = to_nf4(layer.weight.data, scaler_block_size=27)
        made.weight = nn.Parameter(packed, requires_grad=False)
        return made

    found: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "bfloat16": copy.deepcopy,
        "lorakit nf4": NF4Linear,
        "lorakit int8": Int8Linear,
        "bitsandbytes nf4": bnb_nf4,
        "bitsandbytes nf4, nested scales": lambda layer: bnb_nf4(layer, nested=True),
        "bitsandbytes int8": bnb_int8,
    }
    if find_spec("torchao"):
        found |= {"torchao int8": ao_int8, "torchao nf4": ao_nf4}
    return found


def held(layer: nn.Module) -> Tensor:
    """The numbers that a layer's weight stands for, in float32."""
    from lorakit.models.quantised import quantised_weight

    weight = quantised_weight(layer)
    if weight is not None:
        return weight.matrix()
    for name in ("get_original_weight", "dequantize"):  # torchao's
        if hasattr(layer.weight, name) and type(layer.weight) is not nn.Parameter:
            return getattr(layer.weight, name)().float()
    return layer.weight.detach().float()  # type: ignore[union-attr, operator]


def timed(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[float, float, float]:
    """Seconds of a forward and a backward pass in training, and of a forward pass in evaluation."""
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
    """Distance of a layer's output from the product with the numbers it holds, beside that product."""
    exact = x.double() @ held(layer).double().T
    return ((layer(x).double() - exact).norm() / exact.norm()).item()


def measure_layers(rows: int, rounds: int) -> Table:
    """Time one block's projections in turn, and hold their outputs against the numbers they hold."""
    torch.manual_seed(0)
    made = candidates()
    seconds = {name: [0.0, 0.0, 0.0] for name in made}
    errors = {name: [0.0, 0.0] for name in made}
    for (n_in, n_out), count in SHAPES.items():
        whole = nn.Linear(n_in, n_out, bias=False).bfloat16().requires_grad_(False)
        nn.init.normal_(whole.weight, std=0.1)
        layers = {name: make(whole) for name, make in made.items()}
        x, upstream = torch.randn(rows, n_in).bfloat16(), torch.randn(rows, n_out).bfloat16()
        for name, layer in layers.items():
            if hasattr(
                layer, "support_avx512bf16_for_cpu"
            ):  # repacked, it has no gradient any more
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            found = error(layer.train(), x), error(layer.eval(), x)
            errors[name] = [max(pair) for pair in zip(errors[name], found, strict=True)]
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in layers}
        for _ in range(rounds):
            for name in random.sample(list(layers), len(layers)):
                times[name].append(timed(layers[name], x, upstream))
        for name, found in times.items():
            of_step = [count * median(step) for step in zip(*found, strict=True)]
            seconds[name] = [sum(pair) for pair in zip(seconds[name], of_step, strict=True)]
    table = Table("", "forward", "backward", "evaluation", "error, training", "error, evaluation")
    for name in made:
        table.add_row(
            name, *(f"{1e3 * s:.1f} ms" for s in seconds[name]), *(f"{e:.1e}" for e in errors[name])
        )
    return table


# --- merging -----------------------------------------------------------------------------------------


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list) -> float:
    """Cross-entropy per target token, one example at a time."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        targets = torch.tensor(example.loss_mask)[1:].nonzero()[:, 0]
        predicted = model(input_ids=ids).logits[0, targets].float()
        total += F.cross_entropy(predicted, ids[0, targets + 1], reduction="sum").item()
        count += len(targets)
    return total / count


def measure_merging(kind: str, steps: int, limit: int) -> list[Table]:
    """Train over a quantised base, then merge: into what it holds, quantised anew (PEFT), into the whole base."""
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
        losses[f"{kind} with the adapter beside it"] = mean_loss(model, examples)
        adapters.merge()
        losses["merged by lorakit: whole weights"] = mean_loss(model, examples)
        theirs = peft.PeftModel.from_pretrained(base(kind), str(adapter))
        theirs.merge_adapter()
        losses["merged by PEFT: quantised anew"] = mean_loss(theirs, examples)
        rows = survival(W, deltas, theirs)
        theirs.unmerge_adapter()
        now = {path: weight.matrix() for path, weight in quantised_weights(theirs)}
        changed = sum(int((now[_in_peft(path)] != before).sum()) for path, before in W.items())
        share = changed / sum(before.numel() for before in W.values())
        rows.append(("base weights that PEFT's unmerge leaves changed", f"{share:.1%}"))
        model = base("bfloat16")
        adapters = lorakit.load(model, adapter, name="a")
        losses["bfloat16 with the adapter beside it"] = mean_loss(model, examples)
        adapters.merge()
        losses["merged into bfloat16"] = mean_loss(model, examples)
    by_loss, by_delta = Table("", "held-out loss"), Table("quantised anew", "")
    for name, loss in losses.items():
        by_loss.add_row(name, f"{loss:.4f}")
    for row in rows:
        by_delta.add_row(*row)
    return [by_loss, by_delta]


def survival(
    W: dict[str, Tensor], deltas: dict[str, Tensor], merged: nn.Module
) -> list[tuple[str, str]]:
    """What of the deltas is in PEFT's merged weights: their share along the delta, and what came beside."""
    from lorakit.models.quantised import quantised_weights

    now = {path: weight.matrix() for path, weight in quantised_weights(merged)}
    along, beside, sizes = [], [], []
    for path, delta in deltas.items():
        change = now[_in_peft(path)] - W[path]
        along.append(float((change * delta).sum() / delta.square().sum()))
        beside.append(float((change - delta).norm() / delta.norm()))
        sizes.append(float(delta.norm() / W[path].norm()))
    return [
        ("size of the delta, beside its weight", f"{median(sizes):.2%}"),
        ("of the delta, what the merged weight has along it", f"{median(along):.0%}"),
        ("error of the merged weight, in sizes of the delta", f"{median(beside):.2f}"),
    ]


def _in_peft(path: str) -> str:
    return f"base_model.model.{path}.base_layer"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["layers", "merging"])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024], help="of the input")
    parser.add_argument("--rounds", type=int, default=25, help="of each layer's timing")
    parser.add_argument("--dtype", choices=["nf4", "int8"], default="nf4", help="to merge into")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--examples", type=int, default=150, help="to measure the loss on")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # bitsandbytes logs every rounding of an input to float16.
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
