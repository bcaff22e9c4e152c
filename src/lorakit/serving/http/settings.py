"""What the HTTP server allows. `lorakit serve` has an option of the same name for each limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Largest requests. A larger one is answered with a 4xx that names the limit."""

    max_body: int = 2_000_000
    """Most bytes of a request's body."""
    max_body_seconds: float = 30.0
    """Most seconds until a body has arrived."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt. Default: the model's context. Raises the context of a model that states none."""
    max_tokens: int = 4096
    """Most new tokens of an answer. Also the default of a chat, if the context leaves as many."""
    max_choices: int = 16
    """Most answers of a request: prompts times n."""
    max_stops: int = 4
    """Most stop texts of a request."""
    max_stop_length: int = 256
    """Most characters of a stop text."""
    max_top_logprobs: int = 20
    """Most likely tokens that are reported for each token."""
    max_messages: int = 1024
    """Most messages of a chat."""
    max_inputs: int = 256
    """Most texts of a request for classes."""
    max_blend: int = 8
    """Most adapters in the blend of a request."""
    max_seconds: float = 600.0
    """Time limit of a request in seconds. A longer one is cancelled."""
    max_requests: int | None = None
    """Most requests at a time. Default: as many as the engine runs and queues."""


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Settings of the HTTP server."""

    base_name: str
    """Name of the base in the field `model`."""
    limits: HttpLimits = HttpLimits()
    allow_loading: bool = False
    """Offer the routes that load and unload adapters."""
    health_without_key: bool = False
    """Answer /health without a key, for load balancers that cannot send one."""
    hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered; empty is any. A page of another site cannot then reach a server on
    this machine through a name of its own (DNS rebinding)."""
