"""Keep a server busy for minutes, and check every answer afterwards.

    python -m benchmarks soak --minutes 10
    python -m benchmarks soak --minutes 2 --fault prefix --verify 0.05    must find wrong answers

A hundred clients send greedy and sampled requests for the base, adapters and blends to `lorakit serve`. Their prompts
share beginnings longer than a page of the cache. Meanwhile adapters are loaded, unloaded, and replaced by others under
the same name; clients disconnect within an answer and send malformed bodies; one adapter is full of NaN and one is
truncated. Every answer is kept with its receipt and checked against the base with exactly those weights
(soak_check.py). The exit status is 1 if an answer is wrong or lost, or an error was unexpected.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from safetensors.numpy import load_file, save_file

from benchmarks import report
from benchmarks.faults import FAULTS
from benchmarks.server_process import COMMAND, ServerProcess
from benchmarks.serving_workload import prompts, write_adapter
from benchmarks.soak_check import BOUNDS, Checked, Reference, Vocabulary, check
from benchmarks.soak_load import NAN, TRUNCATED, Outcome, Site, Timeline, soak
from lorakit.adapters.formats.fingerprint import base_record
from lorakit.evaluation.generation_settings import ending_tokens
from lorakit.models.loading import Base, load_base
from lorakit.serving.folders import Location
from lorakit.serving.folders import digests_of as content_digests

NAMES, VERSIONS = 16, 24
"""Names that clients ask for, and contents that they can stand for."""
SCALE = 0.05
"""Standard deviation of B: the adapters differ clearly from each other, and still write text."""
PREFIXES, PREFIX = 2, 80
"""Beginnings that prompts share, and their tokens: several pages of the cache."""
ANSWER = (4, 24)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=BOUNDS, help="of the server")
    parser.add_argument("--bound", type=float, help="largest difference of a log-probability")
    parser.add_argument("--fault", choices=FAULTS, help="start the server with this fault")
    parser.add_argument("--verify", type=float, help="share that the server verifies itself")
    parser.add_argument("--prefix", type=int, default=PREFIX, help="tokens that prompts share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--serve-options", default="", help="further options of lorakit serve, in one argument"
    )
    parser.add_argument("--results", type=Path, help="folder for soak.json; default: write none")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Soak and check; return the exit status."""
    args = arguments(argv)
    bound = args.bound or BOUNDS[args.dtype]
    with TemporaryDirectory() as folder:
        record = _soak_and_check(args, Path(folder), bound)
    report.show(sections(record))
    if args.results:
        report.write_results_to(args.results)
        name = f"soak-{args.fault}" if args.fault else "soak"
        report.write(name, record, sections(record), quick=False)
    return 0 if is_clean(record) else 1


def is_clean(record: Mapping[str, Any]) -> bool:
    """Whether nothing was wrong, lost or unexpected."""
    return not (record["wrong"] or record["lost"] or record["unexpected"]) and record["exit"] == 0


def _soak_and_check(args: argparse.Namespace, folder: Path, bound: float) -> dict[str, Any]:
    # The reference has the server's weights: rounded to its dtype, then exact in float32.
    base = load_base(args.base, dtype=args.dtype)
    assert base.tokenizer is not None
    root = folder / "adapters"
    digest = base_record(base.model, tokenizer=base.tokenizer).exact or ""
    versions = write_contents(root, base.model.config, args.seed)
    timeline = Timeline()
    names = [f"t{i:02}" for i in range(NAMES)]
    for name, content in zip(names, versions, strict=False):
        shutil.copytree(versions[content], root / name)
        timeline.loaded(name, content, 0, 0)
    outside = folder / "outside"
    shutil.copytree(next(iter(versions.values())), outside)
    options = ["--allow_loading", "true", "--base.dtype", args.dtype, *args.serve_options.split()]
    if args.verify is not None:
        options += ["--verify", str(args.verify)]
    server = ServerProcess(
        args.base,
        root,
        folder / "log",
        options=options,
        command=("benchmarks.faults", args.fault) if args.fault else COMMAND,
    )
    outcome = Outcome()
    try:
        site = Site(
            url=server.url,
            base=server.base_name,
            names=names,
            versions=versions,
            prefixes=prompts(base.tokenizer, PREFIXES, length=(args.prefix, args.prefix)),
            vocabulary=min(len(base.tokenizer), base.model.config.vocab_size),
            answer=ANSWER,
            timeline=timeline,
            outside=outside,
        )
        report.say(f"Soaking {args.base} with {args.clients} clients for {args.minutes:g} minutes.")
        with MemoryWatch(server) as memory:
            asyncio.run(soak(site, args.clients, 60 * args.minutes, outcome, seed=args.seed))
        metrics = verification_metrics(server.metrics())
        healthy = httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    finally:
        status = server.stop()
    report.say(f"Checking {len(outcome.kept):,} answers.")
    checked = check(
        outcome.kept,
        Reference(base.model.float(), versions),
        Vocabulary(base.tokenizer),
        digests_of(versions),
        timeline,
        bound=bound,
        base=digest,
        end_tokens=end_tokens_of(base),
    )
    record = {
        "machine": report.machine(),
        "options": {k: v for k, v in vars(args).items() if k != "results"},
        "bound": bound,
        "memory": memory.samples,
        "verification": metrics,
        "healthy": healthy,
        "exit": status,
        **counts(outcome, checked),
    }
    if status != 0 or not healthy:
        record["log"] = server.last_lines()
        report.say(record["log"])
    return record


def write_contents(root: Path, config: Any, seed: int) -> dict[str, Path]:
    """Write the contents that names can stand for, and the two bad adapters. Return the folders of the contents."""
    versions = {f"v{i:02}": root / "versions" / f"v{i:02}" for i in range(VERSIONS)}
    for i, folder in enumerate(versions.values()):
        # Different ranks and targets in one batch.
        targets = ("q_proj", "v_proj") if i % 3 else ("q_proj", "k_proj", "v_proj")
        rank = (2, 4, 8)[i % 3]
        write_adapter(folder, config, seed=seed * 1000 + i, rank=rank, scale=SCALE, targets=targets)
    for name in (NAN, TRUNCATED):
        write_adapter(root / name, config, seed=seed * 1000 + 999, scale=SCALE)
    file = root / NAN / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.fill(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    file = root / TRUNCATED / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return versions


def digests_of(versions: Mapping[str, Path]) -> dict[str, str]:
    """Return the contents by the first 16 digits of their digests."""
    found = {}
    for content, folder in versions.items():
        location = Location(str(folder))
        found[content_digests(location, location.state()).whole[:16]] = content
    return found


def end_tokens_of(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer of the base."""
    return frozenset(ending_tokens(base.model, base.tokenizer))  # type: ignore[arg-type]


class MemoryWatch:
    """Samples the resident memory of a server every few seconds."""

    def __init__(self, server: ServerProcess, every: float = 5.0) -> None:
        self._server, self._every = server, every
        self.samples: list[tuple[float, int]] = []
        """Seconds since the start, and bytes."""
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            if self._server.is_running:
                self.samples.append((time.monotonic() - self._began, self._server.memory))
            if self._stop.wait(self._every):
                return


def memory_at(samples: Sequence[tuple[float, int]], seconds: float) -> int | None:
    """Return the first sample after some seconds, or None."""
    return next((size for at, size in samples if at >= seconds), None)


def verification_metrics(text: str) -> dict[str, float]:
    """Return the counters of the server's own verification, summed over the adapters."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        name = re.sub(r'adapter="[^"]*",?', "", name).replace("{}", "")
        is_counted = "verif" in name and not name.startswith("#")
        if is_counted and "_created" not in name and "_bucket" not in name:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def counts(outcome: Outcome, checked: Checked) -> dict[str, Any]:
    """Return what happened, for JSON."""
    return {
        "answers": len(outcome.kept),
        "checked": checked.answers,
        "tokens": checked.tokens,
        "greedy": checked.greedy,
        "worst": checked.worst,
        "unreadable": checked.unreadable,
        "wrong": len(checked.wrong),
        "reasons": checked.reasons,
        "examples": [
            {"reason": w.reason, "fingerprint": w.kept.fingerprint, **_shown(w.kept.question)}
            for w in checked.wrong[:10]
        ],
        "lost": outcome.lost,
        "disconnected": outcome.disconnected,
        "expected": dict(outcome.expected),
        "unexpected": dict(outcome.unexpected),
        "changes": dict(outcome.changes),
    }


def _shown(question: Any) -> dict[str, Any]:
    return asdict(question) | {"prompt": len(question.prompt)}


def sections(record: dict[str, Any]) -> list[report.Section]:
    """Return the table."""
    options = record["options"]
    table = report.table("what", "count")
    table.add_row("answers, all checked", f"{record['checked']:,}")
    table.add_row(
        "checked tokens (of greedy answers)", f"{record['tokens']:,} ({record['greedy']:,})"
    )
    table.add_row("answers with tokens that could not be read", f"{record['unreadable']:,}")
    table.add_row("largest difference of a log-probability", f"{record['worst']:.2g}")
    table.add_row("wrong answers", f"{record['wrong']:,}")
    for reason, count in sorted(record["reasons"].items()):
        table.add_row(f"- {reason}", f"{count:,}")
    table.add_row("lost requests", f"{record['lost']:,}")
    table.add_row("disconnected within an answer", f"{record['disconnected']:,}")
    for kind in ("changes", "expected", "unexpected"):
        title = {
            "changes": "adapters",
            "expected": "expected errors",
            "unexpected": "unexpected errors",
        }
        table.add_row(title[kind], f"{sum(record[kind].values()):,}")
        for name, count in sorted(record[kind].items()):
            table.add_row(f"- {name}", f"{count:,}")
    early = memory_at(record["memory"], min(60, 30 * options["minutes"]))
    if early is not None:
        late = record["memory"][-1][1]
        table.add_row(
            "resident memory after a minute, at the end",
            f"{early / 1e6:,.0f}, {late / 1e6:,.0f} MB",
        )
    for name, value in sorted(record["verification"].items()):
        table.add_row(name, f"{value:g}")
    title = f"{options['clients']} clients for {options['minutes']:g} minutes: {options['base']}, {options['dtype']}"
    if options["fault"]:
        title += f", with the fault {options['fault']!r}"
    note = (
        f"A log-probability may differ by {record['bound']:g} from the base with the adapter added to its weights, in "
        "float32; a greedy token may be less likely than the most likely one by twice that."
    )
    return [report.Section(title, table, note)]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
