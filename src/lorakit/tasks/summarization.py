"""SAMSum: summarise a chat in one or two sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorakit import metrics
from lorakit.tasks.language_modelling import TextTask, references
from lorakit.tasks.named_text import NamedText
from lorakit.tasks.task import BadRow, DataSet, Fields, Groups, checked_text, json_type, text_field


class SAMSum(NamedText):
    """Summarise a dialogue (Gliwa et al. 2019).

    As in the paper, a line feed separates turns, and a blank line separates dialogue and summary.
    """

    name = "samsum"
    layouts = (("dialogue", "summary"),)
    metric = "ROUGE_1"
    scores = ("ROUGE_1", "ROUGE_2", "ROUGE_L")
    quick_scores = (*TextTask.quick_scores, *scores)
    data_set = DataSet(folder="samsum", hub="knkarthick/samsum")
    template = "Summarize the conversation in one or two sentences.\n\n{context}\n\nSummary:"
    after_context = "\n\n"

    def context(self, fields: Fields) -> str:
        """Return the turns, one per line."""
        dialogue = fields.get("dialogue")
        if not isinstance(dialogue, str):
            raise BadRow(f"is {json_type(dialogue)}, expected text", "dialogue")
        return "\n".join(checked_text(dialogue, "dialogue").splitlines()).strip()

    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the summary; none for an empty dialogue, which one official row has."""
        if not self.context(fields):
            return []
        return [text_field(fields, "summary").strip()]

    @classmethod
    def check_scoring(cls, examples: Groups) -> None:
        """Check that ROUGE is installed and can compare the references."""
        metrics.rouge([""] * len(examples), references(cls, examples))

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return ROUGE-1, 2 and L: :func:`lorakit.metrics.rouge`."""
        scores = metrics.rouge(outputs, references(cls, examples))
        if settings.get("quick"):
            return {**super().score(outputs, examples, **settings), **scores}
        return scores
