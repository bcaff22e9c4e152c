"""API keys: which models each may use, and how much."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.configuration import YAML, converted
from lorakit.errors import ConfigurationError, nearest
from lorakit.serving.http.errors import ApiError

SHORTEST = 16
"""Fewest characters of a key."""


class Budget:
    """An amount that may be used per minute. It refills steadily, up to the amount of one minute."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._now, self._lock = now, threading.Lock()
        self._left, self._at = float(per_minute), now()

    def take(self, amount: float) -> float:
        """Take an amount if it is left. Return 0, or the seconds until it will be."""
        with self._lock:
            now = self._now()
            refilled = (now - self._at) * self.per_minute / 60
            self._left, self._at = min(self.per_minute, self._left + refilled), now
            if amount <= self._left:
                self._left -= amount
                return 0.0
            return (amount - self._left) * 60 / self.per_minute

    def give_back(self, amount: float) -> None:
        """Return what was taken and not used."""
        with self._lock:
            self._left = min(self.per_minute, self._left + amount)


@dataclass(frozen=True, kw_only=True, eq=False)
class Key:
    """Who sends a request. Never holds the key itself, so that no log can show it."""

    name: str
    digest: bytes = field(default=b"", repr=False)
    """SHA-256 of the key."""
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the models that it may use, the base's name too."""
    operator: bool = False
    """Whether it may load and unload adapters and read /metrics, which has the names of all adapters."""
    requests: Budget | None = None
    tokens: Budget | None = None

    def allows(self, model: str) -> bool:
        """Return whether the key may use a model."""
        return any(fnmatchcase(model, pattern) for pattern in self.adapters)

    def take_request(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429, if there were too many within a minute.
        """
        if self.requests is not None and (wait := self.requests.take(1)):
            raise ApiError(
                429,
                f"The key {self.name!r} allows {self.requests.per_minute:,} requests per minute "
                "(requests_per_minute).",
                code="rate_limit_exceeded",
                retry=wait,
            )

    def reserve_tokens(self, count: int) -> None:
        """Count the tokens that a request uses at most.

        Raises:
            ApiError: 429, if there were too many within a minute; 400 for more than a minute's.
        """
        if self.tokens is None or not count:
            return
        if count > self.tokens.per_minute:
            raise ApiError(
                400,
                f"The request may use {count:,} tokens (the prompts, and max_tokens for each answer), and the key "
                f"{self.name!r} allows {self.tokens.per_minute:,} per minute (tokens_per_minute). Set a lower "
                "max_tokens.",
                param="max_tokens",
                code="tokens_per_minute",
            )
        if wait := self.tokens.take(count):
            raise ApiError(
                429,
                f"The key {self.name!r} allows {self.tokens.per_minute:,} tokens per minute (tokens_per_minute).",
                code="rate_limit_exceeded",
                retry=wait,
            )

    def give_back_tokens(self, count: int) -> None:
        """Give back reserved tokens that were not used."""
        if self.tokens is not None:
            self.tokens.give_back(count)


OPEN = Key(name="", operator=True)
"""Everyone, on a server without keys."""


class KeyRing:
    """The keys of a server."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)

    def find(self, authorization: str | None) -> Key:
        """Return the key of an Authorization header.

        Raises:
            ApiError: 401, if there is none or it is not known.
        """
        if authorization is None:
            raise _unauthorized("This server needs an API key")
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorized("The Authorization header has another form")
        digest = digest_of(given.strip())
        found = None
        for key in self.keys:  # all of them: the time tells nothing of which one fits
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise _unauthorized("The API key is not known")
        return found


def _unauthorized(reason: str) -> ApiError:
    return ApiError(
        401, f"{reason}. Send the header 'Authorization: Bearer KEY'.", code="invalid_api_key"
    )


def digest_of(key: str) -> bytes:
    """Return the SHA-256 of a key, by which keys are compared."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


# --- the file ------------------------------------------------------------------------------------------

_FIELDS: dict[str, Any] = {
    "name": str,
    "key": str,
    "sha256": str,
    "adapters": list[str],
    "operator": bool,
    "requests_per_minute": int,
    "tokens_per_minute": int,
}


def read_keys(path: str | Path) -> KeyRing:
    """Return the keys in a YAML or JSON file, a list of mappings.

    Raises:
        ConfigurationError: The file cannot be read, or an entry is invalid. No message has a key.
    """
    content = storage.read_yaml(path, ConfigurationError, secret=True)
    if isinstance(content, dict) and list(content) == ["keys"]:
        content = content["keys"]
    if not isinstance(content, list) or not content:
        raise ConfigurationError(
            f"'{path}' has no list of keys. Write '- name: NAME' and '  key: KEY' for each of them."
        )
    keys = [_key(entry, number, path) for number, entry in enumerate(content, start=1)]
    for what, values in (("name", [k.name for k in keys]), ("key", [k.digest for k in keys])):
        if len(set(values)) < len(values):
            raise ConfigurationError(
                f"'{path}' has two entries with the same {what}. Remove one of them."
            )
    return KeyRing(keys)


def _key(entry: object, number: int, path: str | Path) -> Key:
    where = f"entry {number} of '{path}'"
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f"{where} is not a mapping. Write 'name: NAME' and 'key: KEY'.")
    for name in entry:
        if name not in _FIELDS:
            raise ConfigurationError(
                f"{where} has the unknown field {name!r:.40}.{nearest(str(name), _FIELDS)} Fields: "
                f"{', '.join(_FIELDS)}."
            )
    values = {}
    for name, value in entry.items():
        try:
            values[name] = converted(value, _FIELDS[name], f"{name} in {where}", YAML)
        except ConfigurationError:
            if name not in ("key", "sha256"):
                raise
            raise ConfigurationError(
                f"{name} in {where} is not text. Put it between quotation marks."
            ) from None
    if not values.get("name") or ("key" in values) == ("sha256" in values):
        raise ConfigurationError(
            f"{where} needs name, and either key or sha256 (the SHA-256 of the key)."
        )
    for name in ("requests_per_minute", "tokens_per_minute"):
        if values.get(name, 1) < 1:
            raise ConfigurationError(f"{name} in {where} is {values[name]}; it must be at least 1.")
    return Key(
        name=values["name"],
        digest=_digest(values, where),
        adapters=tuple(values.get("adapters", ("*",))),
        operator=values.get("operator", False),
        requests=_budget(values.get("requests_per_minute")),
        tokens=_budget(values.get("tokens_per_minute")),
    )


def _digest(values: Mapping[str, str], where: str) -> bytes:
    if "key" in values:
        key = values["key"]
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigurationError(
                f"key in {where} has {len(key)} characters; it must have at least {SHORTEST} ASCII characters without "
                "spaces. This makes one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        return digest_of(key)
    try:
        digest = bytes.fromhex(values["sha256"])
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigurationError(f"sha256 in {where} must have 64 hexadecimal digits.")
    return digest


def _budget(per_minute: int | None) -> Budget | None:
    return None if per_minute is None else Budget(per_minute)
