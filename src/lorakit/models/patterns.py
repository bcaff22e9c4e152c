"""Match module paths against the names and regular expressions of settings and files, in bounded time.

A pattern from a file is untrusted: a regular expression such as ``(a+)+$`` needs exponential time on some paths. So all
matches of one source share a time limit. Most keys of rank and alpha patterns are plain names, which are looked up in a
dictionary.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import regex

from lorakit.errors import LorakitError

SECONDS = 5.0
"""CPU time of this thread for all matches of one source."""

_NAME = re.compile(r"\^?((?:[^\\^$*+?{}\[\]()|\n\0]|\\[^0-9A-Za-z\n\0])*)\$?")
"""A name: characters that stand for themselves, escaped ones, and dots."""

_ANY, _START = "\n", "\0"
"""In a name: any character, and the start of the path. No path contains them."""

V = TypeVar("V")


@contextmanager
def pattern_errors(
    option: str, error: type[LorakitError], pattern: str = "", where: str = ""
) -> Iterator[None]:
    """Raise an `error` that names the option if a pattern is invalid or slow; `where` is its file, as " in FILE"."""
    try:
        yield
    except regex.error as invalid:
        raise error(
            f"{option} holds {pattern or invalid.pattern!r:.60}, which is not a valid regular expression: {invalid}. "  # type: ignore[attr-defined]
            f"Correct it{where}."
        ) from None
    except TimeoutError:
        raise error(
            f"{option} has regular expressions that take too long to match: all together have {SECONDS:g} seconds. "
            f"Write simpler ones{where}, or the names of the layers."
        ) from None


class Matcher:
    """Compile regular expressions once, and match them within `SECONDS` of CPU time in total."""

    def __init__(self) -> None:
        self.left = SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def compile(self, pattern: str) -> regex.Pattern[str]:
        """Return the compiled pattern.

        Raises:
            regex.error: It is not a regular expression.
            TimeoutError: The time is used up.
        """
        compiled = self._compiled.get(pattern)
        if compiled is None:
            self.check()
            start = time.thread_time()
            # The module's own cache holds 500 patterns, and is slow to search when it is full.
            compiled = self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
            self.left -= time.thread_time() - start
        return compiled

    def fullmatch(self, pattern: str, path: str) -> regex.Match[str] | None:
        """Return the match of the whole path, or None; errors as for `compile`."""
        compiled = self.compile(pattern)
        self.check()
        start = time.thread_time()
        try:
            return compiled.fullmatch(path, timeout=self.left)
        finally:
            self.left -= time.thread_time() - start

    def restart(self) -> None:
        """Start the time limit again, for the next operation with the same patterns."""
        self.left = SECONDS

    def check(self) -> None:
        """Raise a TimeoutError if the time is used up."""
        if self.left <= 0:
            raise TimeoutError


class PatternTable(Generic[V]):
    r"""The value of the first pattern that covers a module path, by PEFT's rule.

    The rule is ``re.match(rf"(.*\.)?({key})$", path)``. A key without other special characters than dots is a name,
    and a name costs one lookup for each ending of a path. Every other key is tried as a regular expression.

    Args:
        patterns: The values by pattern.
        matcher: The time limit of all matches.

    Raises:
        regex.error: A key is not a regular expression.
        TimeoutError: The patterns take too long to compile.
    """

    def __init__(self, patterns: Mapping[str, V], matcher: Matcher) -> None:
        self._keys, self._values = list(patterns), list(patterns.values())
        self.matcher = matcher
        # A dot in a name matches any character, so names are compared without their characters at those positions.
        self._names: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        """The indices of the keys by length of the name, positions of its dots, and name."""
        self._expressions: list[tuple[int, str]] = []
        for index, key in enumerate(self._keys):
            name = _name(key)
            if name is None:
                matcher.compile(key)  # so that "a)(b" is an error
                matcher.compile(expression := rf"(.*\.)?({key})")
                self._expressions.append((index, expression))
                continue
            dots = tuple(m.start() for m in re.finditer(_ANY, name))
            by_name = self._names.setdefault(len(name), {}).setdefault(dots, {})
            by_name.setdefault(name, []).append(index)

    def get(self, path: str, default: V) -> V:
        """Return the value of the first key that covers the path, else the default.

        Raises:
            TimeoutError: A regular expression takes too long.
        """
        if not self._keys:  # as for most adapters, and a server loads thousands of layers
            return default
        first = min(self._by_name(path), default=len(self._keys))
        for index, expression in self._expressions:
            if index > first:
                break
            if self.matcher.fullmatch(expression, path):
                first = index
                break
        return default if first == len(self._keys) else self._values[first]

    def unused(self, paths: Collection[str]) -> list[str]:
        """Return the keys that cover none of the paths; errors as for `get`."""
        used = {index for path in paths for index in self._by_name(path)}
        for index, expression in self._expressions:
            if any(self.matcher.fullmatch(expression, path) for path in paths):
                used.add(index)
        return [key for index, key in enumerate(self._keys) if index not in used]

    def _by_name(self, path: str) -> Iterator[int]:
        """Yield the index of every name that covers the path."""
        self.matcher.check()
        start = time.thread_time()
        for ending in endings(path):
            texts = (ending, _START + ending) if len(ending) == len(path) else (ending,)
            for text in texts:
                for dots, by_name in self._names.get(len(text), {}).items():
                    masked = text
                    for i in dots:
                        masked = f"{masked[:i]}{_ANY}{masked[i + 1 :]}"
                    yield from by_name.get(masked, ())
        self.matcher.left -= time.thread_time() - start


def endings(path: str) -> Iterator[str]:
    """Yield the path, and what follows each of its dots: the names that PEFT's rule for lists accepts."""
    yield path
    start = path.find(".") + 1
    while start:
        yield path[start:]
        start = path.find(".", start) + 1


def _name(key: str) -> str | None:
    """Return a key that is a name, with `_ANY` for each dot and `_START` for a ``^``; None for any other key."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    text = re.sub(r"\\(.)|\.", lambda m: m[1] or _ANY, match[1], flags=re.DOTALL)
    return _START + text if key.startswith("^") else text
