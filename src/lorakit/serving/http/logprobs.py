"""Texts of single tokens, and log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lorakit.serving.engine import Token
from lorakit.serving.http.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from lorakit.serving.text import REPLACEMENT, TextStream

LOWEST = -9999.0
"""What OpenAI reports for a token of probability 0; JSON has no infinity."""


class TokenTexts:
    """The text of each token of one answer, with the blanks that it has after the tokens before it.

    The answer continues the tokens `before`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer, before=before)
        self._offset = 0
        self.text = self._stream.text_of

    def add(self, token: int) -> tuple[str, int]:
        """Append a token. Return its text, and the position of that in the text of all tokens."""
        text, offset = self.text(token), self._offset
        self._offset += len(self._stream.push(token))
        return text, offset


def chat_logprobs(tokens: Sequence[Token], texts: TokenTexts) -> ChatLogprobs:
    """Return the log-probabilities of new tokens of a chat's answer."""
    content = []
    for token in tokens:
        top = [_top(texts.text(i), value) for i, value in token.top]
        own = _top(texts.add(token.id)[0], token.logprob)
        content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(tokens: Sequence[Token], texts: TokenTexts, top: int) -> CompletionLogprobs:
    """Return the log-probabilities of new tokens of a completion, with the `top` most likely ones."""
    result = CompletionLogprobs(
        tokens=[], token_logprobs=[], top_logprobs=[] if top else None, text_offset=[]
    )
    for token in tokens:
        likely: dict[str, float] = {}
        for i, value in token.top:  # the most likely of several tokens with one text
            likely.setdefault(texts.text(i), finite(value))
        text, offset = texts.add(token.id)
        result.tokens.append(text)
        result.token_logprobs.append(finite(token.logprob))
        result.text_offset.append(offset)
        if result.top_logprobs is not None:
            # OpenAI adds the token itself where it is not among them.
            result.top_logprobs.append({**likely, text: finite(token.logprob)})
    return result


def _top(text: str, value: float | None) -> TopLogprob:
    return TopLogprob(
        token=text,
        logprob=finite(value),
        bytes=None if REPLACEMENT in text else list(text.encode()),
    )


def finite(value: float | None) -> float:
    """Return a log-probability as a number that JSON has."""
    return value if value is not None and math.isfinite(value) else LOWEST
