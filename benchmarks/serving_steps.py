"""Small measures of serving, each a ratio or a time within one process.

The systems of a ratio take turns, in a new random order each round, so that a slow phase of the machine affects all.

python -m benchmarks.serving_steps throughput --dtype bfloat16 --result FILE    one group in this process
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from benchmarks import report
from benchmarks.latency import ratio, shuffled
from benchmarks.runs import Runs, process_parser, write_result
from benchmarks.serving_load import (
    Answer,
    Request,
    System,
    closed_loop,
    figures,
    open_loop,
    wait_until,
)
from benchmarks.serving_workload import adapter_names, poisson, prompts, requests, write_adapters
from benchmarks.systems.serving import Setup, generate, lorakit_engine, lorakit_http

CONCURRENT = (8, 32, 64)
MANY = 64
SWAPPED = 256
"""Adapters of which a tenth fits the budget."""
ROWS, PROMPT, ANSWER = 8, 128, 33
"""Requests, prompt tokens and answer tokens of a timed batch."""
LOADED = (1, 100, 1000)
"""Adapters that are loaded when another one is."""
MEGABYTE_RANK = 4
"""Rank on q and v at which an adapter of SmolLM2-135M has 0.9 MB in float32."""

Row = dict[str, Any]
"""A measure: its name, its value, perhaps an interval, its unit, and perhaps a target."""


def row(measure: str, value: float, unit: str = "", target: str = "", **more: Any) -> Row:
    """Return a row of the table."""
    return {"measure": measure, "value": value, "unit": unit, "target": target, **more}


def ratio_row(
    measure: str, ours: Sequence[float], theirs: Sequence[float], target: str = ""
) -> Row:
    """Return the median ratio over the rounds, with its range if there are several."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    interval = {"low": min(found), "high": max(found)} if len(found) > 1 else {}
    times = [list(ours), list(theirs)]
    return row(measure, median(found), "x", target, **interval, times=times)


def run_in_turn(
    trials: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every trial once in each round, in random order."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trials}
    for _, name in shuffled(trials, rounds):
        found[name].append(trials[name]())
    return found


# --- groups of measures ------------------------------------------------------------------------------


def throughput(setup: Setup, quick: bool) -> list[Row]:
    """Compare the engine with the base alone, with loaded adapters and with mixed batches; and with its peers."""
    rounds, many, concurrent = (1, 8, (8,)) if quick else (2, MANY, CONCURRENT)
    names = adapter_names(many)
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    plain = lorakit_engine.start(setup)
    full = lorakit_engine.start(setup)
    full.prepare(names)
    static = generate.start(setup, mode="base", batch=max(concurrent))
    mixed = generate.start(setup, mode="mixed")
    mixed.prepare(names)
    for engine in (plain, full):
        engine.rest()

    def saturate(
        system: System, count: int, chosen: Sequence[str], group: int
    ) -> Callable[[], dict[str, Any]]:
        # New prompts in each round and group, so that none is in the cache; equal for the systems of a group.
        seeds = itertools.count(1000 * group)

        def trial() -> dict[str, Any]:
            seed = next(seeds)
            jobs = requests(prompts(tokenizer, count, seed=seed), chosen, seed=seed)
            if isinstance(system, lorakit_engine.LorakitEngine):
                system.wake()
            found = figures(closed_loop(system, jobs, count, patience=60))
            system.drain()
            if isinstance(system, lorakit_engine.LorakitEngine):
                system.rest()
            return found

        return trial

    rows = []
    for system in (plain, full, static):
        saturate(system, 2, (), 1)()  # warm up
    for count in concurrent:
        trials = {
            "engine": saturate(plain, count, (), 10 + count),
            "generate": saturate(static, count, (), 10 + count),
        }
        found = run_in_turn(trials, rounds)
        rows.append(
            ratio_row(
                f"base alone, {count} requests: engine / static batch of generate",
                *(_rates(found[name]) for name in ("engine", "generate")),
                target="at least 0.9",
            )
        )
    count = min(32, max(concurrent))
    saturate(full, 4, names, 2)()
    found = run_in_turn(
        {
            "base": saturate(plain, count, (), 3),
            "base, loaded": saturate(full, count, (), 3),
            "mixed": saturate(full, count, names, 3),
            "PEFT": saturate(mixed, count, names, 3),
        },
        rounds,
    )
    base = _rates(found["base"])
    rows += [
        ratio_row(
            f"base alone, {count} requests: {many} adapters loaded / none loaded",
            _rates(found["base, loaded"]),
            base,
        ),
        ratio_row(f"{count} requests: {many} adapters / base alone", _rates(found["mixed"]), base),
        ratio_row(
            f"{many} adapters, {count} requests: engine / PEFT adapter_names",
            _rates(found["mixed"]),
            _rates(found["PEFT"]),
        ),
    ]
    return rows


def _rates(found: Sequence[dict[str, Any]]) -> list[float]:
    for trial in found:
        if trial["errors"] or (trial["short"] and not trial["lost"]):
            raise RuntimeError(
                f"A trial failed: {trial['errors']}, {trial['short']} short answers."
            )
    return [trial["tokens_per_second"] for trial in found]


def steps(setup: Setup, quick: bool) -> list[Row]:
    """Compare the prefill and the decoding steps of a batch with 8 adapters with those of the base."""
    names = adapter_names(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    system = lorakit_engine.start(setup)
    system.prepare(names)
    # New prompts each round, so that no prefix is in the cache.
    passages = iter(prompts(tokenizer, 1000, length=(PROMPT, PROMPT), seed=5))
    times: dict[str, dict[str, list[float]]] = {
        kind: {"base": [], "mixed": []} for kind in ("prefill", "step")
    }

    def trial(name: str, chosen: Sequence[str | None]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            jobs = [Request(next(passages), adapter, ANSWER) for adapter in chosen]
            # The first step finds all requests, so that the steps of all trials have the same tokens.
            begun = system.engine.between_steps(start_time)
            trial = closed_loop(system, jobs, ROWS, patience=60)
            prefill, step = batch_times(trial.answers, begun.result())
            times["prefill"][name].append(prefill)
            times["step"][name].append(step)
            return {}

        return run

    def start_time() -> float:
        wait_until(lambda: system.engine.status().waiting == ROWS)
        return time.perf_counter()

    trials = {"base": trial("base", [None] * ROWS), "mixed": trial("mixed", names)}
    run_in_turn(trials, 1)
    for kind in times:
        times[kind] = {name: [] for name in trials}  # the first round warmed up
    run_in_turn(trials, 2 if quick else 12)
    rows = []
    for kind, title in (("step", "decoding step"), ("prefill", f"prefill of {PROMPT} tokens")):
        mixed, base = (times[kind][name] for name in ("mixed", "base"))
        found = ratio(mixed, base)
        interval = {"low": found.low, "high": found.high, "times": [mixed, base]}
        title = f"{title}, {ROWS} requests: {ROWS} adapters / base alone"
        rows.append(row(title, found.middle, "x", **interval))
        rows.append(row(f"{title.partition(':')[0]}: base alone", 1000 * median(base), "ms"))
    return rows


def batch_times(answers: Sequence[Answer], began: float) -> tuple[float, float]:
    """Return the seconds until all first tokens of a batch, and the median seconds of a step after them."""
    if any(answer.error or answer.ended is None for answer in answers):
        raise RuntimeError(f"A request failed: {[answer.error for answer in answers]}.")
    first = max(answer.times[0] for answer in answers)
    gaps = [
        after - before
        for answer in answers
        for before, after in zip(answer.times, answer.times[1:], strict=False)
        if before >= first
    ]
    return first - began, median(gaps)


def store(setup: Setup, quick: bool) -> list[Row]:
    """Time the choice among loaded adapters, and the load of another one."""
    loaded = (1, 10) if quick else LOADED
    repeats = 3 if quick else 10
    with TemporaryDirectory() as folder:
        root = Path(folder)
        names = [f"m{i:04}" for i in range(max(loaded) + repeats)]
        config = AutoConfig.from_pretrained(setup.base)
        write_adapters(root, names, config, rank=MEGABYTE_RANK)
        size = (root / names[0] / "adapter_model.safetensors").stat().st_size
        system = lorakit_engine.start(
            Setup(setup.base, root, setup.dtype, setup.threads), budget=64 << 30
        )
        rows, leases, position = [], [], 0
        for count in loaded:
            while position < count:
                leases.append(system.store.acquire(names[position]))
                position += 1
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                leases.append(system.store.acquire(names[position]))
                times.append(time.perf_counter() - began)
                position += 1
            title = f"load an adapter of {size / 1e6:.1f} MB, {count:,} loaded"
            rows.append(row(title, 1000 * median(times), "ms", times=times))
            times = []
            for i in range(50):
                began = time.perf_counter()
                system.store.acquire(names[i % count]).release()
                times.append(time.perf_counter() - began)
            title = f"choose among {count:,} loaded adapters"
            rows.append(row(title, 1e6 * median(times), "us", times=times))
        for lease in leases:
            lease.release()
        system.stop()
    return rows


def budget(setup: Setup, quick: bool) -> list[Row]:
    """Compare a budget for a tenth of the adapters with one for all, at half of the capacity.

    The tenth is more than the adapters in flight, so that requests pay for swapping and not for waiting until an
    adapter in use is free. Both servers get the same requests at the same times.
    """
    many, seconds = (30, 4.0) if quick else (SWAPPED, 120.0)
    names = adapter_names(many)
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    large = lorakit_engine.start(setup)
    large.prepare(names)
    size = large.store.stats().bytes
    jobs = requests(prompts(tokenizer, 16), names)
    capacity = figures(closed_loop(large, jobs, 16, patience=60))["requests_per_second"]
    large.stop()
    jobs = requests(prompts(tokenizer, max(int(capacity / 2 * seconds), 4), seed=1), names)
    times = poisson(capacity / 2, len(jobs))
    found, swapped = {}, {}
    for name, share in (("all", 2.0), ("a tenth", 0.1)):
        server = lorakit_http.start(setup, ["--adapter_memory", f"{int(size * share)}B"])
        server.prepare(names)
        before = server.loads()
        found[name] = figures(open_loop(server, jobs, times, patience=60))
        swapped[name] = server.loads() - before
        server.stop()
    idle, busy = swap_times(setup, names, size // 10)
    few = f"budget for a tenth of {many} adapters"
    rows = [
        row(f"{few}: swap one in", 1000 * median(idle), "ms", times=idle),
        row(
            f"{few}: swap one in while {ROWS} requests decode",
            1000 * median(busy),
            "ms",
            times=busy,
        ),
        row(f"{few}: requests that swapped one in, of {len(jobs)}", swapped["a tenth"]),
    ]
    for kind, title in (("first_token", "first token"), ("whole_answer", "answer")):
        for percentile in ("p50", "p95"):
            for name in found:
                about = f"{title}, {percentile} at half of the capacity, budget for {name} of {many} adapters"
                rows.append(row(about, 1000 * found[name][kind][percentile], "ms"))
    failed = sum(found["a tenth"]["errors"].values()) + found["a tenth"]["lost"]
    rows.append(row(f"{few}: errors and unanswered requests", failed, target="0"))
    return rows


def swap_times(setup: Setup, names: Sequence[str], budget: int) -> tuple[list[float], list[float]]:
    """Return the seconds of swapping an adapter in, while nothing is computed and while requests are."""
    system = lorakit_engine.start(setup, budget=budget)
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    system.prepare(names)

    def swaps(names: Sequence[str]) -> list[float]:
        times = []
        for name in names:
            before = system.store.stats().loads
            began = time.perf_counter()
            system.store.acquire(name).release()
            if system.store.stats().loads > before:
                times.append(time.perf_counter() - began)
        return times

    count = len(names) // 4
    idle = swaps(names[:count])
    # Enough tokens for the time that the swaps take.
    passages = prompts(tokenizer, ROWS, length=(PROMPT, PROMPT), seed=9)
    held = names[count : count + ROWS] if count > ROWS else names[:1] * ROWS
    answers = [
        Answer(Request(passage, name, 12 * count), time.perf_counter(), sent=time.perf_counter())
        for passage, name in zip(passages, held, strict=True)
    ]
    for answer in answers:
        system.submit(answer.request, answer)
    wait_until(lambda: all(answer.times for answer in answers))
    busy = swaps(names[-count:])
    if any(answer.ended is not None for answer in answers):
        raise RuntimeError("The requests ended before the last swap.")
    system.drain()
    system.stop()
    return idle, busy


GROUPS: dict[str, Callable[[Setup, bool], list[Row]]] = {
    "throughput": throughput,
    "steps": steps,
    "store": store,
    "budget": budget,
}


def run() -> None:
    """Measure one group in this process."""
    from benchmarks.serving import prepare_setup

    parser = process_parser(__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    setup = prepare_setup(args.dtype, adapter_names(SWAPPED))
    rows = GROUPS[args.group](setup, args.quick)
    write_result(args, {"rows": rows})
    os._exit(0)  # the threads of the systems do not end by themselves


# --- the part ----------------------------------------------------------------------------------------


def measured(runs: Runs, dtype: str, quick: bool) -> dict[str, list[Row]]:
    """Run each group in a process of its own, and return its rows."""
    found = {}
    for group in GROUPS:
        options = ["--dtype", dtype, *(["--quick"] if quick else [])]
        done = runs.run(f"measures {group}", "benchmarks.serving_steps", group, *options)
        found[group] = done["rows"]
        report.say(f"  {group}: {done['process_seconds']:.0f} s")
    return found


def sections(measures: dict[str, list[Row]]) -> Iterator[report.Section]:
    """Yield the table."""
    table = report.table("measure", "value", "range", "target")
    for rows in measures.values():
        for found in rows:
            span = f"{found['low']:.2f} to {found['high']:.2f}" if "low" in found else ""
            table.add_row(found["measure"], shown(found), span, found["target"])
    yield report.Section(
        "Ratios and times within one process",
        table,
        "Ratios of throughput: higher is better. Ratios of steps and prefills: lower is better. Ranges are over the "
        "rounds for throughput, and 95 % intervals for steps and prefills.",
    )


def shown(found: Row) -> str:
    """Return the value of a row with its unit."""
    unit = found["unit"]
    if unit == "x":
        return f"{found['value']:.2f} x"
    return (
        f"{found['value']:,.0f} {unit}".strip()
        if found["value"] >= 100 or not unit
        else f"{found['value']:.1f} {unit}"
    )


if __name__ == "__main__":
    run()
