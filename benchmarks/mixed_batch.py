"""A batch of 8 rows with 8 adapters: lorakit's `per_sample` beside one adapter, and PEFT's `adapter_names`.

Every process loads the models in a different order and interleaves their steps, as in benchmarks.inference. Before
timing, the logits of each mixed batch are compared with those of each adapter alone.

python -m benchmarks.mixed_batch --dtype bfloat16 --result FILE    one process
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import lorakit
from benchmarks import report
from benchmarks.inference import (
    ALPHA,
    BASE,
    CONTEXT,
    RANK,
    decode_call,
    fill_lora_b,
    frozen_base,
    measured,
    step_parser,
    step_sections,
)
from benchmarks.latency import in_turn
from benchmarks.runs import write_result
from benchmarks.systems.peft_trainer import TARGETS
from benchmarks.workloads import SEED
from lorakit.models.dtypes import dtype_name

ROWS, LENGTH = 8, 64
NAMES = [f"adapter{i}" for i in range(ROWS)]
"""One adapter for each row."""

Run = Callable[..., Any]
"""Calls a model with the arguments of a forward pass."""


# --- one process -------------------------------------------------------------------------------------


def variants(base: PreTrainedModel) -> dict[str, Callable[[], Run]]:
    """Return a function that builds each model, by its name in the tables."""
    builders: dict[str, Callable[[], Run]] = {
        BASE: lambda: copy.deepcopy(base).eval(),
        "lorakit, one adapter": lambda: _lorakit(base, mixed=False),
        "lorakit, 8 adapters": lambda: _lorakit(base, mixed=True),
    }
    settings: dict[str, dict[str, Any]] = {"": {}}
    if base.dtype != torch.float32:
        settings[f", adapters in {dtype_name(base.dtype)}"] = {"autocast_adapter_dtype": False}
    for suffix, options in settings.items():
        builders[f"PEFT, one adapter{suffix}"] = lambda o=options: _peft(base, mixed=False, **o)
        builders[f"PEFT, 8 adapters{suffix}"] = lambda o=options: _peft(base, mixed=True, **o)
    return builders


def _attached(base: PreTrainedModel) -> tuple[PreTrainedModel, lorakit.Adapters]:
    """Return a copy of the base with all adapters, and its handle."""
    model = copy.deepcopy(base).eval()
    method = lorakit.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear")
    for name in NAMES:
        handle = lorakit.attach(model, method, name=name, seed=SEED)
    fill_lora_b(model, NAMES)
    return model, handle


def _lorakit(base: PreTrainedModel, *, mixed: bool) -> Run:
    model, handle = _attached(base)
    if not mixed:
        handle.activate(NAMES[0])
        return model

    def run(**inputs: Any) -> Any:
        with handle.per_sample(NAMES):
            return model(**inputs)

    return run


def _peft(base: PreTrainedModel, *, mixed: bool, **options: Any) -> Run:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS["all-linear"]
    )
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=NAMES[0], **options)
    assert isinstance(model, PeftModel)
    for name in NAMES[1:]:
        model.add_adapter(name, config, **options)
    fill_lora_b(model, NAMES)
    model.eval()
    return partial(model, adapter_names=NAMES) if mixed else model


@torch.no_grad()
def check_rows(base: PreTrainedModel, prompts: Tensor) -> float:
    """Return the largest difference between a mixed batch and each adapter alone, relative to the logits.

    Raises:
        AssertionError: It exceeds the rounding of the dtype, or the adapters do not differ.
    """
    model, handle = _attached(base)
    with handle.per_sample(NAMES):
        mixed = model(input_ids=prompts, logits_to_keep=1).logits.float()
    alone = []
    for i, name in enumerate(NAMES):
        handle.activate(name)
        alone.append(model(input_ids=prompts, logits_to_keep=1).logits[i].float())
    expected = torch.stack(alone)
    scale = expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 0.05 * scale
    difference = float((mixed - expected).abs().max() / scale)
    assert difference < (1e-4 if base.dtype == torch.float32 else 0.05), difference
    return difference


def measure(dtype: str, steps: dict[str, int], seed: int) -> dict[str, Any]:
    """Build the models in random order, and time their interleaved steps."""
    base = frozen_base(dtype)
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        shape = (ROWS, length)
        return torch.randint(base.config.vocab_size, shape, generator=generator).to(base.device)

    difference = check_rows(base, tokens(16))
    builders = list(variants(base).items())
    random.Random(seed).shuffle(builders)
    models = {name: build() for name, build in builders}
    prompts, context = tokens(LENGTH), tokens(CONTEXT)
    calls = {
        "prefill": {
            name: partial(run, input_ids=prompts, use_cache=True, logits_to_keep=1)
            for name, run in models.items()
        },
        "decode": {name: decode_call(run, base.config, context) for name, run in models.items()},
    }
    figures: dict[str, Any] = {kind: in_turn(calls[kind], steps[kind], seed=seed) for kind in calls}
    return {**figures, "difference": difference}


def run() -> None:
    """Measure in this process."""
    args = step_parser(__doc__).parse_args()
    figures = measure(args.dtype, {"prefill": args.prefill, "decode": args.decode}, args.seed)
    write_result(args, figures)


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure latencies, and write their tables."""
    report.say("\nmixed: a batch of 8 rows with 8 adapters, interleaved")
    record = measured("mixed", "benchmarks.mixed_batch", quick)
    report.publish("mixed", record, sections(record), quick)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the tables."""
    titles = {
        "prefill": f"Prefill of {ROWS} rows of {LENGTH} tokens",
        "decode": f"Decode step, {ROWS} rows after {CONTEXT} tokens",
    }
    yield from step_sections(record, titles)


if __name__ == "__main__":
    run()
