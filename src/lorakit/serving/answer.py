"""One request while an engine computes it: its tokens, its text and its events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lorakit.errors import BaseModelError
from lorakit.serving.engine import End, Ending, Event, GenerationRequest, Piece, Token
from lorakit.serving.sampling import Chooser
from lorakit.serving.text import TextStream

_LOG = logging.getLogger(__name__)


class Answer:
    """The answer to one request.

    Args:
        request: The request.
        deliver: Receives the events.
        ends: Tokens that end a text, besides those of the request.
        wake: Called after `cancel`, from any thread.
    """

    def __init__(
        self,
        request: GenerationRequest,
        deliver: Callable[[Event], Any],
        ends: frozenset[int],
        wake: Callable[[], None],
    ) -> None:
        self.request = request
        self.chooser = Chooser(request.sampling, request.top_logprobs)
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self.is_cancelled = False
        self.has_ended = False
        self._deliver, self._wake = deliver, wake
        self._ends = ends | request.stop_ids
        self._text = TextStream(request.lease.tokenizer, request.stop, request.text_before)

    def cancel(self) -> None:
        """Stop computing the request. Its End follows with the reason "cancelled", unless it has ended."""
        self.is_cancelled = True
        self._wake()

    def accept(self, token: Token | None) -> bool:
        """Add the next token and deliver its text; return whether the answer has ended.

        Args:
            token: None if the scores hold NaN or allow no token, which ends the answer with an error.
        """
        if token is None:
            names = ", ".join(name for name, _, _ in self.request.lease.receipt.adapters)
            whose = f"the adapter {names}" if names else "the base"
            self.fail(
                BaseModelError(
                    f"The scores of the next token are NaN or infinite under {whose}. Load the adapter again from a "
                    "file without NaN, or serve the base in float32."
                )
            )
            return True
        try:
            self._add(token)
        except Exception as error:  # of the tokenizer, which may be the adapter's own
            _LOG.warning("The text of an answer cannot be decoded.", exc_info=error)
            self.fail(error)
        return self.has_ended

    def _add(self, token: Token) -> None:
        self.tokens.append(token.id)
        is_end = token.id in self._ends
        is_last = is_end or len(self.tokens) >= self.request.max_tokens
        text = "" if is_end else self._text.push(token.id)
        if is_last:
            text += self._text.finish()
        self._give(Piece(text, (token,)))
        if is_end or self._text.stopped:
            self.end("stop")
        elif is_last:
            self.end("length")

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.end("error", error)

    def end(self, reason: Ending, error: Exception | None = None) -> None:
        """Deliver the last event, once."""
        if not self.has_ended:
            self.has_ended = True
            self._give(End(reason, len(self.tokens), self.cached_tokens, error))

    def _give(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # another request must not suffer
            _LOG.exception("A receiver of events failed.")
            self.is_cancelled = self.has_ended = True
