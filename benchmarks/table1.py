"""The paper's Table 1: latency of one forward pass of GPT-2 medium, with and without adapters.

Merged LoRA runs the same operations as the fine-tuned model. The adapters of Houlsby et al. 2019 (AdapterH) and
Lin et al. 2020 (AdapterL) add layers that run in sequence. The weights are random, because latency does not depend
on them. Without a GPU, batches are 16 times smaller than in the paper.

python -m benchmarks.table1 --result FILE    one process
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks import report
from benchmarks.latency import Times, in_turn, ratio
from benchmarks.runs import process_parser, runs_of, write_result
from benchmarks.workloads import SEED
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.dtypes import dtype_name
from lorakit.paper.latency import adapted
from lorakit.paper.published import published

ROUNDS = 3
BASE, MERGED = "fine-tuned model", "LoRA, merged"
ADAPTERS = {"AdapterL": "lin", "AdapterH": "houlsby"}
"""The paper's name -> kind of `lorakit.BottleneckAdapter`."""
METHODS = (BASE, MERGED, *ADAPTERS)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A column of the table."""

    batch: int
    """Batch size in the paper."""
    length: int
    sizes: dict[str, int]
    """Bottleneck width of each adapter, inferred from the paper's number of parameters."""
    steps: int
    quick_steps: int

    @property
    def name(self) -> str:
        """Batch size and length of this benchmark."""
        return f"b{self.rows} s{self.length}"

    @property
    def rows(self) -> int:
        """Batch size of this benchmark."""
        return self.batch if torch.cuda.is_available() else max(1, self.batch // 16)

    @property
    def methods(self) -> dict[str, Method | None]:
        """The method of each row."""
        adapters = {
            name: BottleneckAdapter(kind=kind, size=self.sizes[name])
            for name, kind in ADAPTERS.items()
        }
        return {BASE: None, MERGED: LoRA(rank=4, alpha=32, targets="attention.qv"), **adapters}


SETTINGS = (  # in the order of the paper's columns
    Setting(
        batch=32,
        length=512,
        sizes={"AdapterL": 8, "AdapterH": 5},
        steps=3,
        quick_steps=2,
    ),
    Setting(
        batch=16,
        length=256,
        sizes={"AdapterL": 224, "AdapterH": 112},
        steps=8,
        quick_steps=5,
    ),
    Setting(
        batch=1,
        length=128,
        sizes={"AdapterL": 224, "AdapterH": 112},
        steps=14,
        quick_steps=8,
    ),
)


# --- one process -------------------------------------------------------------------------------------


def gpt2_medium() -> GPT2LMHeadModel:
    """Return GPT-2 medium with random weights, in the fastest dtype of this machine."""
    torch.manual_seed(SEED)
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    model = GPT2LMHeadModel(config).to(compute_dtype("auto")).eval().requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def measure(setting: Setting, models: dict[str, PreTrainedModel], steps: int, seed: int) -> Times:
    """Time interleaved forward passes of the models."""
    device = next(models[BASE].parameters()).device
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.rows, setting.length)
    tokens = torch.randint(GPT2Config().vocab_size, shape, generator=generator).to(device)

    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(adapted(model, setting.methods[name]))
        calls = {
            name: partial(model, input_ids=tokens, use_cache=False)
            for name, model in models.items()
        }
        return in_turn(calls, steps, warmup=1, seed=seed)


def run() -> None:
    """Measure in this process."""
    parser = process_parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = gpt2_medium()
    models: dict[str, PreTrainedModel] = {
        name: base if name == BASE else copy.deepcopy(base) for name in METHODS
    }
    figures = {}
    for setting in SETTINGS:
        steps = setting.quick_steps if args.quick else setting.steps
        figures[setting.name] = measure(setting, models, steps, args.seed)
    write_result(args, figures)


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure the three settings, and write the table."""
    report.say("\ntable1: GPT-2 medium, one forward pass")
    times: dict[str, list[Times]] = {setting.name: [] for setting in SETTINGS}
    for number in range(1 if quick else ROUNDS):
        process = runs_of("table1", "gpt2-medium", quick).run(
            str(number), "benchmarks.table1", "--seed", str(number), *(["--quick"] if quick else [])
        )
        for setting in SETTINGS:
            times[setting.name].append(process[setting.name])
        report.say(f"  process {number + 1}: {process['process_seconds']:.0f} s")
    section = report.Section(
        f"Table 1 of the paper: GPT-2 medium, random weights, {dtype_name(compute_dtype())}",
        latencies(times),
        "Milliseconds per forward pass, with the head and without a cache. In parentheses: slow-down against the "
        "fine-tuned model, with its 95 % interval. Paper: batches of 32, 16 and 1 on a Quadro RTX 8000.",
    )
    report.publish("table1", {"machine": report.machine(), "times": times}, [section], quick)


def latencies(times: dict[str, list[Times]]) -> Table:
    """Return a table with the time, the slow-down and the paper's slow-down of each method in each setting."""
    paper, headings = published("table1"), []
    sizes = paper.row("AdapterL").setting.split(", ")
    for setting, parameters in zip(SETTINGS, sizes, strict=True):
        headings += [f"{setting.name}, adapters of {parameters}", "paper"]
    table = report.table("method", *headings)
    for name in METHODS:
        cells = []
        for setting, column in zip(SETTINGS, paper.columns, strict=True):
            pooled = {
                model: [t for process in times[setting.name] for t in process[model]]
                for model in (name, BASE)
            }
            cell = f"{1000 * median(pooled[name]):,.1f}"
            if name != BASE:
                slower = ratio(pooled[name], pooled[BASE])
                percent = [
                    f"{100 * (r - 1):+.1f}" for r in (slower.middle, slower.low, slower.high)
                ]
                cell += f" ({percent[0]} %; {percent[1]} to {percent[2]})"
            printed = ""
            if name in ADAPTERS:
                base, adapter = (paper.row(row).cells[column].value for row in ("FT, LoRA", name))
                printed = f"{100 * (adapter / base - 1):+.1f} %"
            cells += [cell, printed]
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    run()
