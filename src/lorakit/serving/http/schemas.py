"""The bodies of requests. Every field acts, or is rejected by name: none is ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorakit.serving.folders import LONGEST_NAME, is_folder_name

T = TypeVar("T")

List = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first invalid item ends the validation. All of a large body would take seconds on the event loop."""
MOST = 1000
"""Most prompts or adapters in a body, whatever the server's limits are; they are counted before they are validated."""
MOST_TEXTS = 10_000
"""The same for messages with their parts, and for texts to classify."""


def unsupported(field: str, message: str) -> PydanticCustomError:
    """Return the error of a field that the server does not support as it is set."""
    return PydanticCustomError("unsupported", "{message}", {"message": message, "field": field})


class Strict(BaseModel):
    """A body without unknown fields, whose values have exactly the declared types. The first unknown field is named."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's API that lorakit does not support, with the values besides null that change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.unsupported.items():
            value = data.get(name)
            if value is None or any(value == n and type(value) is type(n) for n in neutral):
                continue
            listed = " or ".join(map(json.dumps, neutral))
            also = f", or set it to {listed}" if neutral else ""
            raise unsupported(
                name,
                f"'{name}' is a field of OpenAI's API that this server does not support. Leave it out{also}.",
            )
        known = {n: value for n, value in data.items() if n not in cls.unsupported}
        for name in known:
            if name not in cls.model_fields:
                raise PydanticCustomError("unknown", "is not a field", {"field": name})
        return known


class StreamOptions(Strict):
    """Options of a stream."""

    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool | None = False
    """Send the usage in a last chunk before [DONE]."""


Name = Annotated[str, Field(min_length=1, max_length=1000)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Generating(Strict):
    """What completions and chats have in common."""

    model: Name
    """The base's name, or an adapter's."""
    lora: dict[str, Weight] | None = None
    """Adapters with weights, to blend on the base; `model` is then the base."""
    n: Count | None = 1
    """Answers for each prompt."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 0
    """Not of OpenAI's API. 0 allows all tokens."""
    seed: Seed | None = None
    """Two requests with the same settings and seed get the same answer. Default: a random one."""
    stop: str | List[str] | None = None
    """Texts that end an answer and are not part of it."""
    max_tokens: Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    base_logprobs: bool | None = False
    """Not of OpenAI's API. After each answer, report its tokens' log-probabilities under the base alone: what the
    adapters changed."""
    user: str | None = None
    """A name of the end user, which changes nothing: it is neither stored nor logged."""

    @field_validator("lora", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST:
            raise ValueError(f"a mapping with at most {MOST:,} entries")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a text, or a list of texts; none is empty")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise unsupported(
                "stream_options", "'stream_options' needs stream: true. Leave it out."
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}


class CompletionRequest(Generating):
    """A text to continue."""

    unsupported = {**_UNSUPPORTED, "echo": (False,), "suffix": ("",)}

    prompt: str | List[str] | List[int] | List[List[int]]
    """A text or the ids of its tokens, or a list of these; each is answered."""
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Report the log-probability of each token, and of this many of the most likely ones."""
    best_of: Count | None = None
    """Supported only if it equals n."""

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_if_off(cls, value: Any) -> Any:
        return None if value is False else value  # as chats turn them off

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) or _is_ids(value) else value
        is_list = isinstance(parts, list) and 0 < len(parts) <= MOST
        if not is_list or not (all(isinstance(p, str) for p in parts) or all(map(_is_ids, parts))):
            raise ValueError(
                "a text, a list of token ids, or a list of texts or of lists of token ids, "
                f"at most {MOST:,}"
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> Any:
        if self.best_of not in (None, self.n or 1):
            raise unsupported(
                "best_of", "'best_of' other than n is not supported by this server. Leave it out."
            )
        if self.base_logprobs and self.logprobs is None:
            raise unsupported(
                "base_logprobs",
                "'base_logprobs' needs logprobs. Set logprobs: 0, or leave it out.",
            )
        return self

    @property
    def max_tokens_field(self) -> tuple[str, int | None]:
        """The field that limits the new tokens of an answer, and its value."""
        return "max_tokens", self.max_tokens or 16

    @property
    def top_logprobs_field(self) -> tuple[str, int | None]:
        """The field with the number of the most likely tokens to report, and its value; None reports no tokens."""
        return "logprobs", self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or _is_ids(self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    # A client may send back an answer of OpenAI's API as it is, where these are null or empty.
    unsupported = {
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "tool_calls": ([],),
        "tool_call_id": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    """developer is another name of system."""
    content: str | List[TextPart]
    name: Name | None = None
    """The author, for chat templates that write it."""

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, value: Any) -> Any:
        is_parts = isinstance(value, list) and bool(value)
        if not isinstance(value, str) and not is_parts:
            raise ValueError('a text, or a list of {"type": "text", "text": ...}')
        for part in value if is_parts else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError(
                    'of parts {"type": "text", "text": ...}; this server reads text only'
                )
        return value


def _parts(message: Any) -> int:
    """Return the number of parts of a message; a text is one."""
    content = message.get("content") if isinstance(message, dict) else None
    return max(1, len(content)) if isinstance(content, list) else 1


class ChatRequest(Generating):
    """A conversation to answer."""

    unsupported = {
        **_UNSUPPORTED,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (False, True),  # of the tools, which are not supported
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: List[Message] = Field(min_length=1)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MOST)] | None = None
    """Not of OpenAI's API. More variables of the chat template, such as `enable_thinking` of Qwen 3."""
    max_completion_tokens: Count | None = None
    """New tokens of an answer. Default: what the context leaves, up to the server's limit."""
    logprobs: bool | None = False
    """Report the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Report this many of the most likely tokens, too."""
    safety_identifier: str | None = None
    """As `user`."""

    @field_validator("messages", mode="before")
    @classmethod
    def _few_messages(cls, value: Any) -> Any:
        if isinstance(value, list) and sum(map(_parts, value)) > MOST_TEXTS:
            raise ValueError(f"a list with at most {MOST_TEXTS:,} messages and parts of them")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Any:
        if self.top_logprobs and not self.logprobs:
            raise unsupported("top_logprobs", "'top_logprobs' needs logprobs: true. Leave it out.")
        if self.base_logprobs and not self.logprobs:
            raise unsupported(
                "base_logprobs", "'base_logprobs' needs logprobs: true. Leave it out."
            )
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise unsupported(
                "max_tokens",
                "'max_tokens' and 'max_completion_tokens' differ. Leave out max_tokens, the older name.",
            )
        return self

    @property
    def max_tokens_field(self) -> tuple[str, int | None]:
        """The field that limits the new tokens of an answer, and its value; None leaves it to the server."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_field(self) -> tuple[str, int | None]:
        """The field with the number of the most likely tokens to report, and its value; None reports no tokens."""
        return "top_logprobs", (self.top_logprobs or 0) if self.logprobs else None


class ClassifyRequest(Strict):
    """Texts to classify or score."""

    model: Name
    """An adapter with classes or a score."""
    input: str | List[str] | List[List[str]]
    """A text, a list of texts, or a list of pairs of texts."""

    @field_validator("input", mode="before")
    @classmethod
    def _texts_or_pairs(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        is_list = isinstance(parts, list) and 0 < len(parts) <= MOST_TEXTS
        if not is_list or not (all(isinstance(p, str) for p in parts) or all(map(_is_pair, parts))):
            raise ValueError(
                f"a text, a list of texts, or a list of pairs of texts, at most {MOST_TEXTS:,}"
            )
        return value

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The inputs, each one text or two."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        return [(i,) if isinstance(i, str) else tuple(i) for i in inputs]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(t, str) for t in value)


def _folder_name(name: str) -> str:
    if not is_folder_name(name):
        raise ValueError(
            f"a name of up to {LONGEST_NAME} printable characters, without slashes and without a dot as the first"
        )
    return name


class LoadRequest(Strict):
    """An adapter to load, as in vLLM."""

    lora_name: Annotated[str, AfterValidator(_folder_name)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """Its folder, under the folder of adapters of the server."""
    load_inplace: bool = False
    """Replace an adapter of this name. Requests in flight finish with the old one."""


class UnloadRequest(Strict):
    """An adapter to unload. Requests in flight finish with it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=1000)]
