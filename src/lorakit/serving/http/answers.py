"""The bodies of answers, in OpenAI's forms."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class PromptTokens(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int = 0
    """Tokens whose keys and values were in the cache."""


class Usage(BaseModel):
    """Number of tokens."""

    prompt_tokens: int
    """A prompt with several answers counts once."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class AnswerBody(BaseModel):
    """What every answer has."""

    id: str
    created: int
    model: str
    """As in the request."""
    system_fingerprint: str
    """Receipt: the digests of the base and of the adapters that computed the answer."""


# --- completions ---------------------------------------------------------------------------------------


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens, under the model's own scores (temperature 1, no top_p)."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]
    """Position of each token in the answer's text, in characters."""


class CompletionChoice(BaseModel):
    """One answer, or a part of one in a stream."""

    index: int
    """Prompts in order, each with its n answers."""
    text: str
    logprobs: CompletionLogprobs | None = None
    base_logprobs: list[float] | None = None
    """Not of OpenAI's API: log-probabilities of the answer's tokens under the base alone. In a stream, the answer's
    last event has them."""
    finish_reason: FinishReason | None = None


class Completion(AnswerBody):
    """Answers to prompts. In a stream, each event holds a part."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


# --- chats ---------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """One of the most likely tokens."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of the token; null for a part of a character."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens, under the model's own scores (temperature 1, no top_p)."""

    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    base_logprobs: list[float] | None = None
    """As in `CompletionChoice`."""
    finish_reason: FinishReason


class Chat(AnswerBody):
    """Answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPart(BaseModel):
    """A part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    base_logprobs: list[float] | None = None
    """As in `CompletionChoice`."""
    finish_reason: FinishReason | None = None


class ChatChunk(AnswerBody):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatPart]
    usage: Usage | None = None


# --- classes, models, the rest -------------------------------------------------------------------------


class ClassifyRow(BaseModel):
    """The prediction for one input."""

    index: int
    label: str | None
    """The most likely class; null for a score."""
    score: float
    """Probability of the label, or the score."""
    scores: dict[str, float]
    """Probability of every class; empty for a score."""


class ClassifyAnswer(AnswerBody):
    """Predictions, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[ClassifyRow]
    usage: Usage


class Model(BaseModel):
    """The base or an adapter."""

    id: str
    """What `model` in a request may be."""
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lorakit"] = "lorakit"
    root: str
    """The base's name, or the name of the adapter's folder."""
    parent: str | None
    """The base of an adapter; null for the base."""
    details: dict[str, Any]
    """Of every model: kind, limits, digest, chat. Of an adapter also: method, rank, size, task, labels, scores, report.
    Of the base also: dtype, context, engine, notice, version."""


class Models(BaseModel):
    """The models that the key may use."""

    object: Literal["list"] = "list"
    data: list[Model]


class LoadAnswer(BaseModel):
    """An adapter was loaded or unloaded."""

    id: str
    object: Literal["model"] = "model"
    status: Literal["loaded", "unloaded"]


class Health(BaseModel):
    """The state of a server that answers requests."""

    status: Literal["ok"] = "ok"
