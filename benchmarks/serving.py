"""Serving many adapters: lorakit, PEFT in its two ways, `generate` of the base, and llama.cpp.

Every system runs in a process of its own and answers the same requests: prompts of 32 to 256 tokens, greedy answers of
16 to 64 tokens, adapters by Zipf's law. Saturated trials keep 32 requests in flight. Open trials send requests at the
times of a Poisson process, at a share of the capacity of lorakit's engine with the base alone. The small measures, each
a ratio within one process, are in serving_steps.py.

python -m benchmarks.serving generate --settings '{"mode": "mixed"}' --cases '[[8, null]]' --result FILE    one process
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks import report, serving_steps
from benchmarks.runs import process_parser, runs_of, write_result
from benchmarks.serving_load import System, closed_loop, figures, open_loop
from benchmarks.serving_workload import (
    ANSWER,
    PROMPT,
    adapter_names,
    endless_base,
    poisson,
    prompts,
    requests,
    write_adapters,
)
from benchmarks.systems.serving import Setup, UnavailableError
from lorakit.models.cache import cache_folder
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.dtypes import dtype_name

BASE_MODEL = "smollm2-135m"
ADAPTERS = (0, 1, 8, 64, 256)
"""0 is the base alone."""
MANY = 64
"""Adapters of the open trials."""
SHARES = (0.5, 0.8)
IN_FLIGHT = 32


class Case(NamedTuple):
    """A trial of a system."""

    adapters: int
    share: float | None = None
    """Of the capacity; None is saturated."""


@dataclass(frozen=True)
class Size:
    """How long the trials are."""

    saturated: int = 64
    """Requests of a saturated trial."""
    open: float = 20.0
    """Seconds in which requests of an open trial are due."""
    patience: float = 30.0
    """Seconds from the start of a saturated trial, and after the last request of an open one, until it is ended."""


QUICK = Size(saturated=12, open=4.0, patience=8.0)


@dataclass(frozen=True)
class Entry:
    """A system with its trials."""

    module: str
    cases: tuple[Case, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    quick: tuple[Case, ...] = ()

    @property
    def key(self) -> str:
        """Name of its cached results."""
        return " ".join([self.module, *map(str, self.settings.values())])


REFERENCE = "lorakit_engine"
"""Its saturated trial of the base is the capacity that shares refer to."""

SATURATED_MANY = Case(MANY)
OPEN = tuple(Case(MANY, share) for share in SHARES)
ENTRIES = (
    Entry(
        REFERENCE,
        (*(Case(n) for n in ADAPTERS), Case(0, 0.8), *OPEN),
        quick=(Case(8), Case(8, 0.5)),
    ),
    Entry("lorakit_http", (Case(0), SATURATED_MANY, *OPEN), quick=(Case(8), Case(8, 0.5))),
    Entry("generate", (Case(0), Case(0, 0.8)), {"mode": "base"}, quick=(Case(0),)),
    Entry(
        "generate",
        (Case(1), Case(8), SATURATED_MANY, OPEN[0]),
        {"mode": "mixed"},
        quick=(Case(8),),
    ),
    Entry(
        "generate",
        (Case(8), SATURATED_MANY, OPEN[0]),
        {"mode": "switching"},
        quick=(Case(8),),
    ),
    Entry("llama_cpp", (Case(0), Case(1), Case(8), SATURATED_MANY, *OPEN), quick=(Case(8),)),
)


# --- one process -------------------------------------------------------------------------------------


def prepare_setup(dtype: str, names: Sequence[str]) -> Setup:
    """Write the base and the adapters into the cache, once."""
    # The passages come from Python's sources, so another Python has other prompts, but not another base.
    folder = cache_folder() / "serving-benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    base = endless_base(BASE_MODEL, folder / BASE_MODEL)
    write_adapters(folder / "adapters", names, AutoConfig.from_pretrained(base))
    return Setup(base, folder / "adapters", dtype, torch.get_num_threads())


def measure(
    system: System, setup: Setup, cases: Sequence[Case], size: Size, capacity: float
) -> list[dict[str, Any]]:
    """Run the trials of a system, those with few adapters first.

    Args:
        system: The system, started.
        setup: Its base and adapters.
        cases: The trials.
        size: How long they are.
        capacity: Requests per second that shares refer to.
    """
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    results = []
    for case in sorted(cases, key=lambda case: (case.adapters, case.share or 0)):
        names = adapter_names(case.adapters)
        try:
            system.prepare(names)
        except UnavailableError as error:
            results.append({**case._asdict(), "skipped": str(error)})
            continue
        passages = prompts(tokenizer, 2, seed=len(results) + 1_000_000)
        warm = requests(passages, names[:2], answer=(4, 4))
        closed_loop(system, warm, 2, patience=60)
        count = size.saturated if case.share is None else int(case.share * capacity * size.open)
        # Equal for all systems, and new in each trial, so that no system has a prompt in its cache.
        seed = 1000 * case.adapters + round(10 * (case.share or 0))
        jobs = requests(prompts(tokenizer, max(count, 1), seed=seed), names, seed=seed)
        if case.share is None:
            trial = closed_loop(system, jobs, IN_FLIGHT, patience=size.patience)
        else:
            times = poisson(case.share * capacity, len(jobs))
            trial = open_loop(system, jobs, times, patience=size.patience)
        results.append({**case._asdict(), **figures(trial)})
        system.drain()
    return results


def run() -> None:
    """Measure one system in this process."""
    parser = process_parser(__doc__)
    parser.add_argument("module", help="a module of benchmarks.systems.serving")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--size", type=json.loads, default={})
    parser.add_argument("--capacity", type=float, default=0.0, help="requests per second")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    cases = [Case(*case) for case in args.cases]
    names = adapter_names(max(case.adapters for case in cases))
    setup = prepare_setup(args.dtype, names)
    module = import_module(f"benchmarks.systems.serving.{args.module}")
    found: dict[str, Any]
    try:
        system = module.start(setup, **args.settings)
    except UnavailableError as error:
        found = {"name": module.NAME, "skipped": str(error), "trials": []}
    else:
        try:
            trials = measure(system, setup, cases, Size(**args.size), args.capacity)
            found = {"name": system.name, "trials": trials}
        finally:
            system.stop()
    write_result(args, found)
    os._exit(0)  # an abandoned batch of generate would otherwise go on


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure all systems, and write their tables."""
    report.say("\nserving: many adapters, lorakit and its peers")
    dtype = dtype_name(compute_dtype())
    prepare_setup(dtype, adapter_names(max(ADAPTERS)))  # before anything is timed
    size = asdict(QUICK if quick else Size())
    runs = runs_of("serving", "systems", quick)
    record: dict[str, Any] = {
        "machine": report.machine(),
        "node": platform.machine(),
        "base": BASE_MODEL,
        "dtype": dtype,
        "size": size,
        "systems": [],
    }

    def measured(key: str, entry: Entry, cases: Sequence[Case]) -> dict[str, Any]:
        return runs.run(
            key,
            "benchmarks.serving",
            entry.module,
            *("--settings", json.dumps(entry.settings)),
            *("--cases", json.dumps(cases)),
            *("--size", json.dumps(size)),
            *("--capacity", str(record.get("capacity", 0))),
            *("--dtype", dtype),
        )

    reference = measured("capacity", ENTRIES[0], [Case(0)])
    record["capacity"] = reference["trials"][0]["requests_per_second"]
    report.say(f"  capacity with the base alone: {record['capacity']:.2f} requests/s")
    for entry in ENTRIES:
        found = measured(entry.key, entry, entry.quick if quick else entry.cases)
        record["systems"].append(found)
        report.say(_progress(found))
    record["measures"] = serving_steps.measured(runs, dtype, quick)
    report.publish("serving", record, sections(record), quick)


def _progress(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"  {found['name']}: skipped, {found['skipped']}"
    rates = [f"{t['adapters']}: {t['tokens_per_second']:.0f}" for t in saturated(found)]
    return f"  {found['name']}: {', '.join(rates)} tokens/s, {found['process_seconds']:.0f} s"


def saturated(system: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the saturated trials that ran."""
    return [t for t in system["trials"] if t["share"] is None and "skipped" not in t]


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the tables."""
    yield report.Section(
        f"Throughput with {IN_FLIGHT} requests in flight: {record['base']}, {record['dtype']}",
        throughput(record["systems"]),
        "Output tokens per second, and answers per second in brackets. Prompts of "
        f"{PROMPT[0]} to {PROMPT[1]} tokens, answers of {ANSWER[0]} to {ANSWER[1]}. A trial of a slow system ends "
        f"after {record['size']['patience']:.0f} seconds. llama.cpp computes with weights of 4 bits.",
    )
    yield report.Section(
        f"Latency of requests that arrive at random: {record['base']}, {record['dtype']}",
        latency(record["systems"]),
        f"Load as a share of {record['capacity']:.2f} requests per second, the capacity of lorakit's engine with the "
        "base alone. p50, p95 and p99 in milliseconds, counted from when a request was due. Unanswered: when the trial "
        f"ended, {record['size']['patience']:.0f} seconds after the last request; they count with that time.",
    )
    yield from serving_steps.sections(record["measures"])
    skipped = [f"{s['name']}: {s['skipped']}." for s in record["systems"] if "skipped" in s]
    if skipped:
        table = report.table("Skipped system")
        for line in skipped:
            table.add_row(line)
        yield report.Section("Skipped", table)


def throughput(systems: Sequence[dict[str, Any]]) -> Any:
    """Return the table of the saturated trials."""
    chosen = {t["adapters"]: t.get("chosen", t["adapters"]) for s in systems for t in saturated(s)}
    counts = sorted(chosen)
    table = report.table("system", *(_adapters(n, chosen[n]) for n in counts))
    for system in systems:
        by_count = {t["adapters"]: t for t in saturated(system)}
        if by_count:
            table.add_row(system["name"], *(_rate(by_count.get(n)) for n in counts))
    return table


def _adapters(count: int, chosen: int) -> str:
    """Return the heading of the trials with so many loaded adapters, of which requests name `chosen`."""
    if count == 0:
        return "base alone"
    return f"{count} adapter{'s' * (count > 1)}" + (f", {chosen} used" if chosen < count else "")


def _rate(trial: dict[str, Any] | None) -> str:
    if trial is None:
        return ""
    text = f"{trial['tokens_per_second']:,.0f} ({trial['requests_per_second']:.1f})"
    return text + _errors(trial)


def _errors(trial: dict[str, Any]) -> str:
    errors = sum(trial["errors"].values())
    short = f", {trial['short']} short" if trial["short"] else ""
    return (f", {errors} errors" if errors else "") + short


def latency(systems: Sequence[dict[str, Any]]) -> Any:
    """Return the table of the open trials."""
    table = report.table(
        "system",
        "adapters",
        "load",
        "first token, ms",
        "between tokens, ms",
        "errors",
        "unanswered",
    )
    trials = [
        (t["adapters"], t["share"], s["name"], t)
        for s in systems
        for t in s["trials"]
        if t["share"] is not None and "skipped" not in t
    ]
    for adapters, share, name, trial in sorted(trials, key=lambda trial: trial[:2]):
        table.add_row(
            name,
            str(adapters) if adapters else "base",
            f"{share:.0%}",
            *(_milliseconds(trial[kind]) for kind in ("first_token", "between_tokens")),
            str(sum(trial["errors"].values())),
            f"{trial['lost']} of {trial['requests']}",
        )
    return table


def _milliseconds(found: dict[str, float]) -> str:
    return " / ".join(f"{1000 * value:,.0f}" for value in found.values())


if __name__ == "__main__":
    run()
