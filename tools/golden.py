"""Compare what lorakit does with what the baseline did: runs, files, command lines and answers.

    python tools/golden.py                        # record the baseline if needed, record this tree, compare
    python tools/golden.py --only runs/lora peft  # only these cases or groups
    python tools/golden.py record FOLDER          # record the lorakit that Python imports
    python tools/golden.py compare A B            # compare two recorded folders

The baseline is the commit in tools/baseline. Its results are not committed, since they depend on the processor. They
stay in .golden/, and are recorded again when the tool, a library or the processor changes. Everything runs offline on
tiny random models, in one thread, so that results repeat bit for bit.

A case is one JSON file and, for tensors, one safetensors file. Numbers and tensors that differ by rounding are counted
apart from other differences, and so are messages, which may change. The exit status is 1 if something else differs that
`EXPECTED` does not list.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
CACHE = ROOT / ".golden"

EXPECTED: dict[str, str] = {
    "runs/dropout:*": "other random numbers, wherever dropout draws them",
}
"""Reasons for intended differences, by pattern of CASE:PATH."""

ROUNDING = 1e-5
"""Largest difference, relative to the largest value of a tensor, that counts as rounding."""

MOST_SHOWN = 10
"""Most differences of a case that are printed."""

_QUIET = {
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"},
}

EQUAL, MESSAGE, ROUNDED, INTENDED, DIFFERENT = KINDS = (
    *("equal", "message", "rounding", "expected", "DIFFERENT"),
)
"""Kinds of difference, the worst last."""


def main() -> int:
    """Record and compare; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["all", "record", "compare"], default="all")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    arguments = parser.parse_intermixed_args()
    only, folders = arguments.only, [folder.resolve() for folder in arguments.folders]
    needed = {"all": 0, "record": 1, "compare": 2}[arguments.action]
    if len(folders) != needed:
        parser.error(f"{arguments.action} takes {needed} folders, not {len(folders)}.")
    if arguments.action == "record":
        prepare_cache()
        return record(folders[0], only)
    if arguments.action == "compare":
        return compare(*folders, only)
    baseline, present = CACHE / "baseline", CACHE / "present"
    prepare_cache()
    if record_with(CACHE / "tree" / "src", baseline, only, keep=True):
        print("The baseline could not be recorded.", file=sys.stderr)
        return 1
    failed = record_with(ROOT / "src", present, only, keep=False)
    return compare(baseline, present, only) or failed


def prepare_cache() -> None:
    """Empty the cache unless it was made by this tool, from this commit, with these libraries and processor."""
    commit = (TOOLS / "baseline").read_text(encoding="utf-8").strip()
    libraries = [f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "peft")]
    sources = [path.read_text(encoding="utf-8") for path in sorted(TOOLS.glob("golden*"))]
    facts = [commit, *libraries, platform.processor(), _processor(), *sources]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    file = CACHE / "key"
    if file.exists() and file.read_text(encoding="utf-8") == key:
        return
    shutil.rmtree(CACHE, ignore_errors=True)
    tree = CACHE / "tree"
    tree.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", commit, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
    file.write_text(key, encoding="utf-8")


def _processor() -> str:
    """Return the name of the processor on Linux, whose `platform.processor` is empty."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith("model name")), "")


def record_with(source: Path, folder: Path, only: Sequence[str], *, keep: bool) -> int:
    """Record the lorakit in `source`, in a process of its own; return the exit status."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, __file__, "record", str(folder), "--only", *only]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(source)}).returncode


def record(folder: Path, only: Sequence[str]) -> int:
    """Record the cases that `folder` lacks; return 1 if one raised an exception."""
    os.environ.update(_QUIET)  # before the libraries are imported, which read them
    import torch
    from golden_cases import cases
    from golden_inputs import build_inputs
    from safetensors.torch import save_file

    import lorakit

    source = Path(lorakit.__file__).parents[1]
    if source != Path(os.environ.get("PYTHONPATH") or source).resolve():
        print(f"Python imports lorakit from {source}, not from PYTHONPATH.", file=sys.stderr)
        return 1
    print(f"recording {source} in {folder}")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    inputs, failed = CACHE / "inputs", False
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log.txt", "a", encoding="utf-8"))
        if not (inputs / "complete").exists():
            shutil.rmtree(inputs, ignore_errors=True)
            with redirect_stdout(log), redirect_stderr(log):
                build_inputs(inputs)
            (inputs / "complete").touch()
        for name, case in stack.enter_context(cases(inputs)).items():
            path = folder / f"{name}.json"
            if not is_selected(name, only) or path.exists():
                continue
            began = time.monotonic()
            random.seed(0)
            torch.manual_seed(0)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    values, tensors = case(scratch)
            except Exception:
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
                failed = True
                continue
            text = json.dumps(values, indent=1, default=str, sort_keys=True)
            text = text.replace(str(scratch), "<scratch>").replace(str(inputs), "<inputs>")
            path.parent.mkdir(parents=True, exist_ok=True)
            if tensors:
                whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(whole, path.with_suffix(".safetensors"))
            path.write_text(text, encoding="utf-8")
            print(f"{time.monotonic() - began:5.1f} s  {name}", flush=True)
    return int(failed)


def compare(first: Path, second: Path, only: Sequence[str]) -> int:
    """Print how two recorded folders differ; return 1 if they do so unexpectedly."""
    names = sorted(
        {
            path.relative_to(folder).with_suffix("").as_posix()
            for folder in (first, second)
            for path in folder.rglob("*.json")
        }
    )
    counts: Counter[str] = Counter()
    cases_of: dict[tuple[str, str], list[str]] = {}  # the same difference may be in many
    for name in filter(lambda name: is_selected(name, only), names):
        found = list(differences(name, first, second))
        counts[max((kind for kind, _ in found), key=KINDS.index, default=EQUAL)] += 1
        if len(found) > MOST_SHOWN:
            found[MOST_SHOWN:] = [(found[-1][0], f"{len(found) - MOST_SHOWN} more differences")]
        for difference in found:
            cases_of.setdefault(difference, []).append(name)
    for (kind, text), cases in cases_of.items():
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        print(f"{kind:<9} {', '.join(cases[:3])}{more}: {text}")
    print(", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "no cases")
    return int(counts[DIFFERENT] > 0 or not counts)


def is_selected(name: str, only: Sequence[str]) -> bool:
    """Return whether a case matches a pattern, or is in a group that does."""
    return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}/") for pattern in only)


def differences(name: str, first: Path, second: Path) -> Iterator[tuple[str, str]]:
    """Yield the kind and a description of each difference in a case; one for all rounding, one for each reason."""
    reasons: set[str] = set()
    rounded: list[float] = []
    for path, one, other in _leaves(_read(first, name), _read(second, name)):
        kind, distance = _kind(path, one, other)
        expected = [EXPECTED[p] for p in EXPECTED if fnmatchcase(f"{name}:{path}", p)]
        if kind == ROUNDED:
            rounded.append(distance)
        elif kind == DIFFERENT and expected:
            reasons.add(expected[0])
        elif kind != EQUAL:
            size = f", by {distance:.1e} of the largest value" if distance else ""
            yield kind, f"{path} {_shown(one)} -> {_shown(other)}{size}"
    if rounded:
        yield ROUNDED, f"{len(rounded)} numbers or tensors, by at most {max(rounded):.1e}"
    yield from ((INTENDED, reason) for reason in sorted(reasons))


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return the values and tensors of a case; nothing where it was not recorded."""
    from safetensors.torch import load_file

    path = folder / f"{name}.json"
    if not path.exists():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    tensors = path.with_suffix(".safetensors")
    return {**values, "tensors": load_file(tensors) if tensors.exists() else {}}


_MISSING = "<missing>"


def _leaves(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each leaf of two nested values."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            inner = f"{path}.{key}" if path else str(key)
            yield from _leaves(one.get(key, _MISSING), other.get(key, _MISSING), inner)
    else:
        yield path, one, other


def _kind(path: str, one: Any, other: Any) -> tuple[str, float]:
    """Return the kind of difference between two leaves, and that of numbers relative to the largest one."""
    import torch

    if path.split(".")[0] == "message":
        return (EQUAL if one == other else MESSAGE), 0
    if isinstance(one, float) and isinstance(other, float):
        one, other = torch.tensor(one).double(), torch.tensor(other).double()
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        is_equal = type(one) is type(other) and one == other
        return (EQUAL if is_equal else DIFFERENT), 0
    if one.shape != other.shape or one.dtype != other.dtype:
        return DIFFERENT, 0
    if torch.equal(one, other):
        return EQUAL, 0
    distance = float((one.double() - other.double()).abs().max() / one.double().abs().max())
    return (ROUNDED if distance <= ROUNDING else DIFFERENT), distance


def _shown(value: Any) -> str:
    """Return a value, or the dtype and shape of a tensor."""
    shape = getattr(value, "shape", None)
    return str(value)[:120] if shape is None else f"{value.dtype}{list(shape)}"


if __name__ == "__main__":
    sys.exit(main())
