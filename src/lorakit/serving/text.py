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

    def text_of(self, token: int) -> str:
        """Return the text that a token would have next, also a special one; `REPLACEMENT` for a part of a character."""
        known = self._ids[self._start : self._read]
        before, after = (self._decode(ids, special=True) for ids in (known, [*known, token]))
        if after.startswith(before):
            return after[len(before) :]
        return self._decode([token], special=True)

    def push(self, token: int) -> str:
        """Add a token; return the new text that is certain. Text that may begin a stop text is kept back."""
        self._ids.append(token)
        before, after = self._window()
        is_certain = len(after) > len(before) and not after.endswith(REPLACEMENT)
        if not is_certain and len(self._ids) - self._read < WINDOW:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._until_stop(after[len(before) :])

    def finish(self) -> str:
        """Return the text that was kept back, when the answer ends without a stop text."""
        if self.stopped:
            return ""
        before, after = self._window()
        self._start = self._read = len(self._ids)
        text = self._until_stop(after[len(before) :])
        text, self._held = text + self._held, ""
        return text

    def _window(self) -> tuple[str, str]:
        """Return the text of the window without and with the tokens whose text is not certain yet."""
        ids = self._ids[self._start :]
        return self._decode(ids[: self._read - self._start]), self._decode(ids)

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        return self._tokenizer.decode(  # type: ignore[return-value]
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
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
