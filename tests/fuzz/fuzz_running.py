"""Run mutated files through the readers, in forked processes under limits of memory and time.

``python tests/fuzz/fuzz_running.py`` (or ``make fuzz``) runs every reader and prints a table. Input number i of a
reader depends on the seed and i only. A worker process runs a batch of inputs and keeps its position in shared memory,
so the parent knows which input ended or stopped it, and continues behind that one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from fuzz_targets import BY_NAME, TARGETS, Files, Mismatch, Target

from lorakit.errors import LorakitError

CPU_SECONDS = 3
"""For one input."""
IDLE_SECONDS = 60
"""Wall time without progress after which a worker is killed."""
ADDRESS_SPACE = 1 << 30
"""Bytes that a worker may map beyond those of its parent."""
MEMORY = 256 << 20
"""Bytes by which one input may raise the resident memory."""
MESSAGE = 3000
"""Characters of the longest message."""
BATCH = 200
OUT = Path("out/fuzz")
CASES = Path(__file__).parent / "cases"


@dataclass
class Finding:
    """One way in which a reader fails, with the smallest input that shows it."""

    target: str
    kind: str
    """What went wrong and where, without the details of the input: equal for equal causes."""
    detail: str
    index: int
    files: Files = field(repr=False)
    count: int = 1

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))


@dataclass
class Report:
    """What the inputs of one reader did."""

    target: str
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)
    """The smallest input of each kind."""
    failed: set[tuple[int, str]] = field(default_factory=set)
    """Number and kind of each input with a finding."""

    def add(self, finding: Finding) -> None:
        self.failed.add((finding.index, finding.kind))
        known = self.findings.setdefault(finding.kind, finding)
        if known is not finding:
            smallest = min(known, finding, key=lambda f: f.size)
            smallest.count = known.count + finding.count
            self.findings[finding.kind] = smallest


# --- one input ------------------------------------------------------------------------------------


def input_of(target: Target, seeds: list[Files], seed: int, index: int) -> Files:
    """Return input number `index`; the first ones are the seeds themselves."""
    if index < len(seeds):
        return seeds[index]
    random = Random(f"{target.name} {seed} {index}")
    files = target.mutate(random, random.choice(seeds), random.choice(seeds))
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        # The first change can leave something that the mutator of the format does not understand.
        with contextlib.suppress(Exception):
            files = target.mutate(random, files, random.choice(seeds))
    return files


def write(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def judge(target: Target, files: Files, folder: Path) -> tuple[str, str, str]:
    """Run one input; return "accepted", "refused" or "finding", with the kind and the detail of a finding."""
    write(files, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        messages = target.check(folder)
        verdict = ("refused" if messages else "accepted", "", "")
        for message in messages:
            verdict = _judged(message, f"row of {target.name}") or verdict
    except LorakitError as error:
        verdict = _judged(str(error), _place(error)) or ("refused", "", "")
        if any(_is_memory(cause) for cause in _causes(error)):
            verdict = ("finding", f"memory: {_place(error)}", str(error)[:500])
    except Mismatch as error:
        verdict = ("finding", f"mismatch: {error.kind}", error.detail[:1000])
    except BaseException as error:
        kind = "memory" if _is_memory(error) else "traceback"
        lines = "".join(traceback.format_exception(error))
        verdict = ("finding", f"{kind}: {type(error).__name__} {_place(error)}", lines[-3000:])
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if growth > MEMORY:
        verdict = ("finding", "memory: the resident memory grew", f"by {growth:,} bytes; {verdict}")
    return verdict


def _judged(message: str, place: str) -> tuple[str, str, str] | None:
    """Return a finding if a message is not fit for a terminal."""
    if len(message) > MESSAGE:
        return (
            "finding",
            f"message too long: {place}",
            f"{len(message):,} characters: {message[:300]!r}",
        )
    odd = next(
        (
            c
            for c in message
            if not (c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs")
        ),
        None,
    )
    if odd is not None:
        return "finding", f"message with control characters: {place}", repr(message[:1000])
    return None


def _place(error: BaseException) -> str:
    """Return the innermost function of lorakit that the error passed, with its file."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/lorakit/" in f.filename] or frames
    return f"{Path(inside[-1].filename).name}:{inside[-1].name}" if inside else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "malloc" in text


# --- many inputs ----------------------------------------------------------------------------------


def run(
    target: Target,
    executions: int,
    *,
    seed: int = 0,
    first: int = 0,
    until: set[tuple[int, str]] | None = None,
) -> Report:
    """Run `executions` inputs of a reader.

    Args:
        target: The reader.
        executions: The number of inputs.
        seed: Another seed gives other inputs.
        first: Number of the first input.
        until: Stop behind an input with a failure other than these.
    """
    report = Report(target.name)
    before = _cpu_seconds()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "seeds").mkdir()
        torch.manual_seed(0)
        seeds = target.seeds(work / "seeds")
        shared = mmap.mmap(-1, 24)
        index = first
        while index < first + executions:
            stop = min(first + executions, index + BATCH)
            index = _run_batch(target, seeds, seed, range(index, stop), shared, work, report, until)
            if until is not None and report.failed - until:
                break
    report.executions = index - first
    report.seconds = _cpu_seconds() - before
    return report


def _run_batch(
    target: Target,
    seeds: list[Files],
    seed: int,
    indices: range,
    shared: mmap.mmap,
    work: Path,
    report: Report,
    until: set[tuple[int, str]] | None,
) -> int:
    """Run a batch in a forked process; return the number of the next input."""
    log = work / "findings.jsonl"
    log.unlink(missing_ok=True)
    shared[:] = struct.pack("<3Q", indices.start, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about threads; the worker starts none
        child = os.fork()
    if child == 0:
        try:
            _work(target, seeds, seed, indices, shared, work, log, until)
            os._exit(0)
        except BaseException:  # a mistake in the harness
            (work / "harness.txt").write_text(traceback.format_exc(), errors="backslashreplace")
        finally:
            os._exit(1)
    status = _wait(child, shared)
    if (work / "harness.txt").exists():
        raise RuntimeError((work / "harness.txt").read_text())
    position, accepted, refused = struct.unpack("<3Q", shared[:])
    report.accepted += accepted
    report.refused += refused
    for line in log.read_text().splitlines() if log.exists() else ():
        index, kind, detail = json.loads(line)
        report.add(Finding(target.name, kind, detail, index, input_of(target, seeds, seed, index)))
    if status == 0:
        return position
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    kind = {
        signal.SIGPROF: "hang: too much CPU time",
        signal.SIGKILL: "hang: no progress, or killed for memory",
    }
    name = kind.get(
        number, f"crash: signal {number}" if number else f"crash: exit status {status >> 8}"
    )
    report.add(Finding(target.name, name, "", position, input_of(target, seeds, seed, position)))
    return position + 1


def _wait(child: int, shared: mmap.mmap) -> int:
    """Wait for a worker; kill it if it makes no progress."""
    position, since = bytes(shared[:8]), time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
        if shared[:8] != position:
            position, since = bytes(shared[:8]), time.monotonic()
        elif time.monotonic() - since > IDLE_SECONDS:
            os.kill(child, signal.SIGKILL)


def _work(
    target: Target,
    seeds: list[Files],
    seed: int,
    indices: range,
    shared: mmap.mmap,
    work: Path,
    log: Path,
    until: set[tuple[int, str]] | None,
) -> None:
    """Run the inputs in this process."""
    limit_process(work)
    accepted = refused = 0
    for index in indices:
        shared[:] = struct.pack("<3Q", index, accepted, refused)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        verdict, kind, detail = judge(target, input_of(target, seeds, seed, index), work / "input")
        if verdict == "refused" and index < len(seeds):
            verdict, kind = "finding", "a valid file is rejected"
        accepted += verdict == "accepted"
        refused += verdict == "refused"
        if verdict == "finding":
            with log.open("a") as file:
                file.write(json.dumps([index, kind, detail]) + "\n")
            if until is not None and (index, kind) not in until:
                break
    shared[:] = struct.pack("<3Q", index + 1, accepted, refused)


def limit_process(work: Path) -> None:
    """Bound the memory of this process, silence it, and point lorakit's cache into `work`."""
    os.environ["LORAKIT_CACHE"] = str(work / "input" / "cache")
    warnings.simplefilter("ignore")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    faulthandler.disable()  # that of pytest writes to a copy of the standard error
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


# --- command line ---------------------------------------------------------------------------------


def save(finding: Finding, out: Path) -> Path:
    """Write the input and the description of a finding into a folder of its own."""
    number = sum(1 for _ in out.glob(f"{finding.target}-*")) + 1 if out.exists() else 1
    folder = out / f"{finding.target}-{number}"
    write(finding.files, folder / "input")
    command = f"python tests/fuzz/fuzz_running.py --replay {folder}"
    (folder / "finding.txt").write_text(
        f"reader: {finding.target}\nkind: {finding.kind}\ntimes: {finding.count}\nreplay: {command}\n\n"
        f"{finding.detail}\n",
        errors="backslashreplace",
    )
    return folder


def replay(folder: Path) -> tuple[str, str, str]:
    """Run the input of a folder that `save` wrote again, in this process and without limits."""
    target = BY_NAME[folder.name.rsplit("-", 1)[0]]
    root = folder / "input"
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with tempfile.TemporaryDirectory() as name:
        os.environ["LORAKIT_CACHE"] = f"{name}/input/cache"
        return judge(target, files, Path(name) / "input")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run mutated files through every reader of lorakit."
    )
    parser.add_argument(
        "--executions", type=int, default=5000, help="inputs of each reader, at least"
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="CPU minutes, if they last longer"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run")
    parser.add_argument("--reader", action="append", choices=BY_NAME, help="only this reader")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of the findings; it is emptied"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="run one finding again")
    options = parser.parse_args()
    if options.replay:
        print(*replay(options.replay), sep="\n")
        return 0
    shutil.rmtree(options.out, ignore_errors=True)
    targets = [t for t in TARGETS if not options.reader or t.name in options.reader]
    print(f"seed {options.seed}\n\nreader        executions  seconds  accepted  refused  findings")
    reports = {}
    for target in targets:
        reports[target.name] = run(target, options.executions, seed=options.seed)
        _print(reports[target.name])
    # Share the rest of the time.
    used = sum(report.seconds for report in reports.values())
    share = (options.minutes * 60 - used) / len(targets)
    for target in targets if share > 0 else ():
        report = reports[target.name]
        more = int(share / max(report.seconds / report.executions, 1e-4))
        extra = run(target, more, seed=options.seed, first=report.executions)
        for name in ("executions", "accepted", "refused", "seconds"):
            setattr(report, name, getattr(report, name) + getattr(extra, name))
        for finding in extra.findings.values():
            report.add(finding)
    if share > 0:
        print("\nwith the rest of the time:")
        for report in reports.values():
            _print(report)
    findings = [f for report in reports.values() for f in report.findings.values()]
    for finding in findings:
        print(f"\n{save(finding, options.out)}: {finding.kind} ({finding.count} times)")
    return 1 if findings else 0


def _print(report: Report) -> None:
    print(
        f"{report.target:<12}  {report.executions:>10,}  {report.seconds:>7.1f}  {report.accepted:>8,}"
        f"  {report.refused:>7,}  {len(report.findings):>8}",
        flush=True,
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
