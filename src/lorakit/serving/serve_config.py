"""Options of `lorakit serve`."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field

from lorakit.configuration import LocalPath, conform
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.models.base_config import BaseConfig

DEMO = "out/demo"
"""Run folder of `lorakit demo`, whose adapter is served if neither an adapter nor a base is named."""

_AT_LEAST = {
    0: ("max_stops", "max_stop_length", "max_top_logprobs", "max_blend", "verify", "port"),
    0.001: ("max_seconds", "max_body_seconds"),
    1: (
        "max_running",
        "max_queue",
        "max_body",
        "max_tokens",
        "max_choices",
        "max_messages",
        "max_inputs",
        "max_prompt_tokens",
        "max_requests",
    ),
    2: ("num_labels",),
}
_AT_MOST = {"verify": 1, "port": 65535}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of `lorakit serve`. A request above a limit, such as `max_tokens`, gets a 4xx answer that names it."""

    max_body: int = 2_000_000
    """Maximum size of a request body, in bytes."""
    max_body_seconds: float = 30.0
    """Time limit for receiving a request body, in seconds."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt, in tokens. Default: the model's context. Raises the context of a model that states
    none."""
    max_tokens: int = 4096
    """Maximum number of new tokens in an answer. Also the default of a chat, if the context has room."""
    max_choices: int = 32  # LangChain sends 20 prompts in a request
    """Maximum number of answers in a request: prompts times n."""
    max_stops: int = 4
    """Maximum number of stop texts in a request."""
    max_stop_length: int = 256
    """Maximum length of a stop text, in characters."""
    max_top_logprobs: int = 20
    """Maximum number of most likely tokens to report for each token."""
    max_messages: int = 1024
    """Maximum number of messages in a chat."""
    max_inputs: int = 256
    """Maximum number of texts in a request for classes."""
    max_blend: int = 8
    """Maximum number of adapters in a blend."""
    max_seconds: float = 600.0
    """Time limit of a request in seconds. A longer one is cancelled."""
    max_requests: int | None = None
    """Maximum number of requests at a time. Default: as many as the engine runs and queues."""
    base: BaseConfig | None = None
    """The base model. Default: the base recorded in the adapters."""
    served_name: str | None = None
    """Name of the base in requests. Default: its own, such as smollm2-135m-instruct-q4_1."""
    adapters: LocalPath | None = None
    """Folder whose subfolders are adapters or runs; each is served under its folder's name. Default: without
    --follow and --base.name the adapter of lorakit demo, in out/demo."""
    follow: list[str] = field(default_factory=list)
    """Run folders to follow, each as PATH or NAME=PATH. The newest adapter of a run answers while its training goes
    on."""
    pin: list[str] = field(default_factory=list)
    """Adapters to load at the start and to keep loaded."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs keys."""
    port: int = 8000
    """Port to listen on. 0 takes a free one."""
    open: bool = False
    """Open the playground in the default browser once the server answers."""
    prompt: str = ""
    """Prompt that --open enters in the playground."""
    keys: LocalPath | None = None
    """YAML or JSON file of API keys, with the adapters and rates of each. Every route then needs a key."""
    health_without_key: bool = False
    """Answer /health without a key, for load balancers that cannot send one."""
    allow_loading: bool = False
    """Enable the routes that load and unload adapters of the folder. With keys, only operators may use them."""
    allow_public: bool = False
    """Listen on an address that other machines can reach without keys. Anyone there can then use the server."""
    num_labels: int | None = None
    """Maximum number of labels of a classifier. Default: the largest number that an adapter records. PEFT folders
    record none."""
    allow_other_base: bool = False
    """Allow adapters that record another base."""
    adapter_memory: str = "1GB"
    """Memory for adapters. When it is full, the least recently used idle adapter is unloaded."""
    cache_memory: str = "2GB"
    """Memory for keys and values of running requests."""
    max_running: int = 32
    """Maximum number of requests in a batch."""
    max_queue: int = 256
    """Maximum number of requests that wait for a place in a batch. Another one gets a 429 answer."""
    verify: float = 0.0
    """Share of the answers of text, 0 to 1, that are computed again by their adapters alone and compared. Failures are
    logged and counted in /metrics."""
    verify_stops: bool = False
    """Shut down when an answer that was computed again differs."""
    access_log: bool = False
    """Print a line for each request."""

    def __post_init__(self) -> None:
        conform(self)
        for least, names in _AT_LEAST.items():
            for name in names:
                require_at_least(name, getattr(self, name), least)
        for name, most in _AT_MOST.items():
            if (value := getattr(self, name)) > most:
                raise ConfigurationError(f"{name} is {value}; it must be at most {most}.")
        for name in ("adapter_memory", "cache_memory"):
            bytes_of(name, getattr(self, name))
        if self.verify_stops and not self.verify:
            raise ConfigurationError(
                "verify_stops is true, and verify is 0: no answer is computed again. Add --verify 0.05."
            )
        if not self.is_loopback and self.keys is None and not self.allow_public:
            raise ConfigurationError(
                f"host is {self.host}, which other machines can reach, and there are no keys. Add --keys FILE, or "
                "--allow_public true to let anyone use the server."
            )

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Names in the Host header that are answered; empty is any.

        A page of another site cannot then reach a server on this machine through a name of its own (DNS rebinding).
        """
        if not self.is_loopback or self.keys is not None:
            return ()
        return tuple(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", self.host)))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def followed(self) -> dict[str, str]:
        """The runs to follow: name to path, with ``~`` expanded. An existing path may contain ``=``.

        Raises:
            ConfigurationError: Two runs have the same name.
        """
        found: dict[str, str] = {}
        for run in self.follow:
            name, equals, path = run.partition("=")
            whole = os.path.expanduser(run)
            if not equals or os.path.exists(whole):
                name, path = os.path.basename(os.path.abspath(whole)), whole
            path = os.path.expanduser(path)
            if name in found:
                raise ConfigurationError(
                    f"follow has two runs with the name '{name}', '{found[name]}' and '{path}'. Give one of them "
                    f"another name: NAME={path}."
                )
            found[name] = path
        return found


_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_of(name: str, text: str) -> int:
    """Return a size as a number of bytes.

    Raises:
        ConfigurationError: It is not a size.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigurationError(f"{name} is {text!r}; write a size such as 500MB or 2GB.")
    return int(float(match[1]) * _UNITS[match[2]])
