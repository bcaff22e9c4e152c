"""Base class of the named tasks that generate text. It builds prompt and completion from a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.tasks.language_modelling import Completion
from lorakit.tasks.task import Fields, LanguageExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NamedText(Completion):
    """A named task that generates text from the context of a row. A row has one or several reference texts.

    Encoding `paper` is that of the LoRA paper's code and has no instruction: the context, eos, a space and the text,
    eos. Encoding `prompt` inserts the context into `template`, an instruction for instruction-tuned models.
    `data.prompt_template` replaces the template.
    """

    encodings = ("paper", "prompt")
    derived = ("context",)
    template: ClassVar[str]
    """Template of the prompt, with the placeholder `{context}`."""
    after_context: ClassVar[str | None] = None
    """Text after the context in encoding `paper`; None appends eos."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        if self.encoding == "paper" and self.after_context is None:
            self.before_completion = [self.end]

    @abstractmethod
    def context(self, fields: Fields) -> str:
        """Return the context of a row as text.

        Raises:
            BadRow: A field is missing, empty or of the wrong type.
        """

    @abstractmethod
    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the reference texts of a row. Each becomes one example.

        Raises:
            BadRow: A field is missing, empty or of the wrong type.
        """

    def gold(self, fields: Fields) -> Mapping[str, Any]:
        """Return further values of a row that scoring needs."""
        return {}

    def prompt(self, fields: Fields) -> str:
        """Return the prompt of a row. The row needs no answers."""
        return self.around(self.context(fields))

    def around(self, context: str) -> str:
        """Return the prompt for a context."""
        if self.encoding == "paper":
            return context + (self.after_context or "")
        return self.template.replace("{context}", context)

    @staticmethod
    def after(prompt: str, answer: str) -> str:
        """Return an answer with a space before it, or without one after a prompt that ends in a space or line feed."""
        return ("" if prompt[-1:].isspace() else " ") + answer.removeprefix(" ")

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield one example for each text of a row."""
        prompt, context, gold = self.prompt(fields), self.context(fields), self.gold(fields)
        for answer in self.answers(fields):
            yield {
                **fields,
                "context": context,
                "prompt": prompt,
                "completion": self.after(prompt, answer),
                "gold": gold,
            }

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the example of one text, with `gold` for scoring."""
        example = super().encode(fields)
        example.gold = fields.get("gold", {})
        return example
