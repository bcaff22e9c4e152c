"""Turn the tokens of an answer into text while they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

WINDOW = 32
"""Tokens that are decoded again until they form text. A character has four at most; more are no whole characters."""
BEFORE = 5
"""Tokens of the prompt that are decoded before the first token of an answer: one whole character at least."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for an incomplete character."""


class TextStream:
    """The text of one answer: whole characters, without special tokens, up to a stop text.

    Args:
        tokenizer: Decodes the tokens.
        stop: Texts that end the answer.
        before: Tokens that the answer continues. SentencePiece strips the space at the start of a text, but not here.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids = list(before[-BEFORE:])
        # A token's text depends on those before it (spaces, several tokens for a character), so a window is decoded.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        """Whether a stop text was found."""

    def push(self, token: int) -> str:
        """Add a token; return the new text that is certain. Text that may begin a stop text is kept back."""
        self._ids.append(token)
        before = self._decode(self._start, self._read)
        after = self._decode(self._start, len(self._ids))
        is_certain = len(after) > len(before) and not after.endswith(REPLACEMENT)
        if not is_certain and len(self._ids) - self._read < WINDOW:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._until_stop(after[len(before) :])

    def finish(self) -> str:
        """Return the text that was kept back, when the answer ends without a stop text."""
        if self.stopped:
            return ""
        rest = self._decode(self._start, len(self._ids))[
            len(self._decode(self._start, self._read)) :
        ]
        self._start = self._read = len(self._ids)
        text = self._until_stop(rest)
        text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(  # type: ignore[return-value]
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _until_stop(self, text: str) -> str:
        """Return what is certain of the held text and `text`, up to the first stop text."""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
