"""Named tasks whose answer is a text: how a row becomes prompt and completion, as the paper had it or as a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.tasks.language_modelling import Completion
from lorakit.tasks.task import Example, Fields, LanguageExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NamedText(Completion):
    """A row has a context, from which one or several texts are to be written.

    Encoding `paper` is that of the LoRA paper's code: the context's tokens, the end-of-sequence token, a space and the
    text, the end-of-sequence token; without any instruction. Encoding `prompt` puts the context into `template`, which
    models that follow instructions know what to make of, and which `data.prompt_template` replaces.
    """

    encodings = ("paper", "prompt")
    derived = ("context",)
    template: ClassVar[str]
    """The prompt, with `{context}` where the context goes."""
    after_context: ClassVar[str | None] = None
    """What ends the context in encoding `paper`; None is the end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        if self.encoding == "paper" and self.after_context is None:
            self.before_completion = [self.end]

    @abstractmethod
    def context(self, fields: Fields) -> str:
        """Return what a row says that the text is written from.

        Raises:
            BadRow: a field is missing, empty or of the wrong type.
        """

    @abstractmethod
    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the texts of a row, an example each.

        Raises:
            BadRow: a field is missing, empty or of the wrong type.
        """

    def gold(self, fields: Fields) -> Mapping[str, Any]:
        """Return what scoring needs of a row beside the texts."""
        del fields
        return {}

    def prompt(self, fields: Fields) -> str:
        """Return the text to generate from, for a row with or without its answers."""
        return self.around(self.context(fields))

    def around(self, context: str) -> str:
        """Return a context as the text to generate from."""
        if self.encoding == "paper":
            return context + (self.after_context or "")
        return self.template.replace("{context}", context)

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield an example for each of a row's texts."""
        prompt, context, gold = self.prompt(fields), self.context(fields), self.gold(fields)
        space = "" if prompt[-1:].isspace() else " "
        for answer in self.answers(fields):
            yield {
                **fields,
                "context": context,
                "prompt": prompt,
                "completion": space + answer,
                "gold": gold,
            }

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the example of one text, with what scoring needs."""
        example = super().encode(fields)
        example.gold = fields.get("gold", {})
        return example


def each_example(
    outputs: Sequence[str], examples: Sequence[Sequence[Example]]
) -> tuple[list[str], list[Example]]:
    """Return every example with the output for its input, where rows of one input count one by one."""
    pairs = [(output, e) for output, group in zip(outputs, examples, strict=True) for e in group]
    return [output for output, _ in pairs], [example for _, example in pairs]
