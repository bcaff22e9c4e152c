"""What the HTTP server allows. `lorakit serve` has an option of the same name for each limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Request limits. A request above a limit gets a 4xx answer that names the limit."""

    max_body: int = 2_000_000
    """Maximum size of a request body, in bytes."""
    max_body_seconds: float = 30.0
    """Time limit for receiving a request body, in seconds."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt, in tokens. Default: the model's context. Raises the context of a model that states
    none."""
    max_tokens: int = 4096
    """Maximum number of new tokens in an answer. Also the default of a chat, if the context has room."""
    max_choices: int = 16
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


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Settings of the HTTP server."""

    base_name: str
    """Name of the base in the field `model`."""
    limits: HttpLimits = HttpLimits()
    allow_loading: bool = False
    """Enable the routes that load and unload adapters."""
    health_without_key: bool = False
    """Answer /health without a key, for load balancers that cannot send one."""
    hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered; empty is any. A page of another site cannot then reach a server on
    this machine through a name of its own (DNS rebinding)."""
