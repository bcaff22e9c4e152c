"""The guide to error messages quotes the messages of the library, and has an entry for each of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "errors.md"
LIBRARY = ROOT / "src" / "lorakit"
VALUE = "\0"
"""A value inside a message."""


# --- the page -------------------------------------------------------------------------------------


def quotes(page: str) -> list[str]:
    """Return the code spans in the first column of every table."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def pattern(quote: str) -> re.Pattern[str]:
    """Match a message that contains the words of the quote; `...` stands for any text."""
    return re.compile(".*".join(map(re.escape, quote.split("..."))), re.DOTALL)


def stale(page: str, source: Source) -> list[str]:
    """Return the quotes that match no text of the source."""
    return [q for q in quotes(page) if not any(map(pattern(q).search, source.texts))]


def missing(page: str, source: Source) -> list[str]:
    """Return the messages that no quote matches, with their file and function."""
    patterns = [pattern(quote) for quote in quotes(page)]
    return [
        f"{place}: {message.replace(VALUE, '...')}"
        for place, message in source.messages
        if not any(p.search(message) for p in patterns)
    ]


# --- the library ----------------------------------------------------------------------------------


def text_of(node: ast.expr) -> str:
    """Return the constant words of an expression, with VALUE in place of each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=body, orelse=orelse):
            return text_of(body) + VALUE + text_of(orelse)
    return VALUE


def has_words(text: str) -> bool:
    return re.search("[a-z]{2}", text) is not None


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


class Source:
    """The texts of some Python files.

    Attributes:
        texts: All strings except docstrings.
        messages: File and function, and text, of every message of an error.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.nodes = {path: list(ast.walk(ast.parse(text))) for path, text in files.items()}
        self.functions = {
            path: [node for node in nodes if isinstance(node, ast.FunctionDef)]
            for path, nodes in self.nodes.items()
        }
        self.errors = self._errors()
        self.messages = sorted(set(self._messages()))
        self.texts = set(self._texts())

    def _errors(self) -> dict[str, int]:
        """Return what creates an error (a class, or a function with the text as parameter), and the text's position."""
        # `error` is a parameter, a class of errors; a Problem becomes a row's error.
        found = {"LorakitError": 0, "error": 0, "Problem": 1}
        classes = [n for nodes in self.nodes.values() for n in nodes if isinstance(n, ast.ClassDef)]
        for _ in classes:
            found |= {n.name: 0 for n in classes if any(name_of(b) in found for b in n.bases)}
        for function in (f for functions in self.functions.values() for f in functions):
            parameters = [argument.arg for argument in function.args.args]
            for text in _texts_of_calls(function, found):
                if isinstance(text, ast.Name) and text.id in parameters:
                    found[function.name] = parameters.index(text.id)
        return found

    def _messages(self) -> Iterator[tuple[str, str]]:
        for path, functions in self.functions.items():
            for function in functions:
                for text in _texts_of_calls(function, self.errors):
                    for words in filter(has_words, self._resolved(text, function)):
                        yield f"{path}:{function.name}", words

    def _resolved(self, text: ast.expr, function: ast.FunctionDef) -> Iterator[str]:
        """Yield the texts of an expression: a string, a variable, a constant, or the result of a function."""
        yield text_of(text)
        if isinstance(text, ast.Name):
            everything = [node for nodes in self.nodes.values() for node in nodes]
            for node in ast.walk(function) if text.id.islower() else everything:
                if isinstance(node, ast.Assign) and name_of(node.targets[0]) == text.id:
                    yield text_of(node.value)
        if isinstance(text, ast.Call):
            for called in (f for functions in self.functions.values() for f in functions):
                if called.name == name_of(text.func):
                    for node in ast.walk(called):
                        if isinstance(node, ast.Return) and node.value is not None:
                            yield text_of(node.value)

    def _texts(self) -> Iterator[str]:
        for nodes in self.nodes.values():
            docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.expr) and node not in docstrings:
                    yield from filter(has_words, [text_of(node)])


def _texts_of_calls(function: ast.FunctionDef, positions: Mapping[str, int]) -> Iterator[ast.expr]:
    """Yield the texts that a function, without the functions inside it, passes to what creates errors."""
    nodes = list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call):
            position = positions.get(name_of(node.func))
            if position is not None and position < len(node.args):
                yield node.args[position]
        nodes += ast.iter_child_nodes(node)


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def library() -> Source:
    files = sorted(LIBRARY.rglob("*.py"))
    return Source({str(f.relative_to(LIBRARY)): f.read_text("utf-8") for f in files})


@pytest.mark.slow
def test_every_quote_is_in_the_source(page: str, library: Source) -> None:
    assert stale(page, library) == []


@pytest.mark.slow
def test_every_message_has_an_entry(page: str, library: Source) -> None:
    assert len(library.messages) > 500
    found = missing(page, library)
    assert not found, "\n".join(map(str, found))


def test_quotes_have_words_to_search_for(page: str) -> None:
    assert [q for q in quotes(page) if len(re.findall(r"[A-Za-z_]{2,}", q)) < 2] == []


MODULE = '''
class LorakitError(Exception): ...
class DataError(LorakitError): ...

NO_NAME = "No name is set."

def _bad(problem):
    return DataError(problem)

def read(path):
    """Read a list of rows."""
    if not path:
        raise DataError(NO_NAME)
    if path.is_dir():
        raise DataError(f"'{path}' is a folder; " + "name its files.")
    reason = f"holds {len(path)} rows" if path else "is empty"
    raise _bad(reason)
'''
ENTRIES = "| `No name is` | c | f |\n| `is a folder; name`<br>`holds ... rows` | c | `f` |\n"


def test_quotes_match_messages() -> None:
    source = Source({"module.py": MODULE})
    assert stale(ENTRIES, source) == missing(ENTRIES, source) == []


@pytest.mark.parametrize("word", ["No name", "a folder", "rows"])
def test_changed_message_is_found(word: str) -> None:
    source = Source({"module.py": MODULE.replace(f"{word}", "other")})
    assert [quote for quote in stale(ENTRIES, source) if word in quote]
    assert len(missing(ENTRIES, source)) == 1


def test_docstring_is_no_message() -> None:
    assert stale("| `Read a list` | c | f |", Source({"module.py": MODULE})) == ["Read a list"]
