"""A built-in data set that needs no download: docstrings of the Python standard library.

The prompt is a function's module and signature, the completion is the first sentence of its docstring::

    # textwrap
    def indent(text, prefix, predicate=None):

    Add 'prefix' to the beginning of selected lines in 'text'.

It parses the source of the running Python without importing it, so its size differs between Python versions and
builds (3.11: about 3,300 examples, of which 600 are in tkinter, which some systems leave out). Train, validation and
test share no top-level module and no completion.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lorakit.errors import DataError, nearest

SPLITS = ("train", "validation", "test")
LEFT_OUT = {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "antigravity", "this"}
"""Applications, vendored wheels and jokes. `test` is not in `sys.stdlib_module_names`."""

SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)\.(?=\s|$)")
PLAIN_SENTENCE = re.compile(r"[A-Z][a-z]+ [^<>|\\{}:;@]*[\w)'\"`\]]")
REMARK = re.compile(
    r"(Deprecated|Internal|Helper|See|Same|Like|Ditto|Used?|This|The|These|Just|If|When|Override)\b"
)
"""First words of docstrings that comment on the code and do not describe the function."""


def load(split: str) -> list[dict[str, str]]:
    """Return the rows of a split, `{prompt, completion, module}`, in an order that mixes modules.

    Raises:
        DataError: The split does not exist, or Python was installed without its sources.
    """
    if split not in SPLITS:
        raise DataError(
            f"docstrings has no split {split!r}; its splits are {', '.join(SPLITS)}."
            + nearest(split, SPLITS)
        )
    return [dict(row) for row in _rows() if split_of(row["module"]) == split]


def split_of(module: str) -> str:
    """Return the split of a module. Submodules and twins (`_pyio`, `pyio`) share a split."""
    top = module.split(".")[0].lstrip("_")
    tenth = int(hashlib.sha256(top.encode()).hexdigest(), 16) % 10
    return "validation" if tenth == 0 else "test" if tenth in (1, 2) else "train"


def summary(docstring: str) -> str | None:
    """Return the first sentence of a docstring, or None if it is not a plain, short statement."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = (paragraph[: end.start()] if end else paragraph).strip()
    plain = sentence.isascii() and PLAIN_SENTENCE.fullmatch(sentence) and not REMARK.match(sentence)
    if not plain or not 4 <= len(sentence.split()) <= 24 or len(sentence) > 140:
        return None
    return sentence + "."


@cache
def _rows() -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for path, module in _modules():
        for scope, function in _functions(_tree(path)):
            docstring = ast.get_docstring(function)
            completion = summary(docstring) if docstring else None
            prompt = f"# {'.'.join((module, *scope))}\n{signature(function)}\n"
            if completion is None or len(prompt) > 200:
                continue
            # Keep each sentence once: a copy in another split would leak the answer.
            row = {"prompt": prompt, "completion": completion, "module": module}
            rows.setdefault(completion.casefold(), row)
    if not rows:
        raise DataError(
            f"docstrings: no Python sources in {_library()}; this Python was installed without the sources "
            "of its standard library. Set data.train to another data set."
        )
    # Neighbours in a file are similar. Sorting by a hash makes the first rows representative.
    return sorted(rows.values(), key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the `def` line of a function."""
    prefix = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{prefix} {function.name}({ast.unparse(function.args)}){returns}:"


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> Iterator[tuple[Path, str]]:
    library = _library()
    for path in sorted(library.rglob("*.py")):
        names = path.relative_to(library).with_suffix("").parts
        if names[0] not in sys.stdlib_module_names or LEFT_OUT.intersection(names):
            continue  # site-packages, among others
        if not {"test", "tests", "_vendor"}.intersection(names):
            yield path, ".".join(name for name in names if name != "__init__")


def _tree(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # malformed on purpose, or unreadable
            return ast.Module(body=[], type_ignores=[])


def _functions(
    scope: ast.Module | ast.ClassDef, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the public functions and methods, each with the classes around it."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, (*names, node.name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
            "_"
        ):
            yield names, node
