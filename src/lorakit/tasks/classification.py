"""Classification and regression of one text or a pair of texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit import metrics
from lorakit.configuration import LARGEST_NUMBER, is_finite
from lorakit.errors import DataError, nearest
from lorakit.formatting import listed
from lorakit.tasks.task import (
    BadRow,
    Fields,
    Groups,
    LabelledExample,
    Task,
    TooLong,
    UnknownLabel,
    json_type,
    text_field,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PAIR = ("sentence1", "sentence2")
"""Fields of a pair of texts."""

WHOLE = re.compile(r"([+-]?\d+)\.0*")
"""A whole number with a decimal point. pandas writes integers so if a value of their column was missing."""


class Labelled(Task):
    """Base class of classification and regression: one target for a text or a pair of texts."""

    texts: ClassVar[tuple[str, ...]] = ()
    """Columns of the text or the pair of texts; if empty, `text` or PAIR."""
    targets: ClassVar[tuple[str, ...]] = ("score", "label")
    """Columns of the target, which rows to predict lack. Regression reads the first that a row has."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.takes_token_types = "token_type_ids" in tokenizer.model_input_names
        # Some tokenizers (GPT-2) add no special token between two texts. A line feed separates them.
        specials = tokenizer.num_special_tokens_to_add
        self.separator = "" if specials(pair=True) > specials(pair=False) else "\n"

    @classmethod
    def check_scoring(cls, examples: Groups) -> None:
        """Score the labels themselves. All of them: a score may need two classes."""
        labels = targets(examples)
        classes = 1 + max(map(int, labels)) if cls.kind == "classification" else 1
        cls.score(labels, examples, classes=classes)

    def encode_unlabelled(self, fields: Fields) -> LabelledExample:
        """Return the example of a row to predict. Its label is 0 and has no meaning."""
        return self._encode(fields, 0, "")

    def _encode(self, fields: Fields, label: int | float, answer: str) -> LabelledExample:
        """Tokenise the text or the pair of texts. `answer` is the label as text."""
        names = self.texts
        if not names:
            is_pair = "text" not in fields and not fields.keys().isdisjoint(PAIR)
            names = PAIR if is_pair else ("text",)
        texts = [text_field(fields, name) for name in names]
        tokenize = partial(
            self.tokenizer,
            texts[0],
            self.separator + texts[1] if len(texts) == 2 else None,
            return_token_type_ids=self.takes_token_types,
        )
        encoded = tokenize(verbose=False)
        truncated = len(encoded["input_ids"]) > self.max_length
        if truncated:
            if not self.truncate:
                raise TooLong(len(encoded["input_ids"]), self.max_length)
            side = self.tokenizer.truncation_side
            self.tokenizer.truncation_side = "right"  # some tokenizers would cut the start
            try:
                encoded = tokenize(truncation="longest_first", max_length=self.max_length)
            finally:
                self.tokenizer.truncation_side = side
        return LabelledExample(
            input_ids=list(encoded["input_ids"]),
            token_type_ids=list(encoded["token_type_ids"]) if self.takes_token_types else None,
            label=label,
            prompt="\n".join(texts),
            completion=answer,
            truncated=truncated,
        )


class Classification(Labelled):
    """Classification of `text`, or of `sentence1` and `sentence2`. The `label` is a name or a whole number.

    Class indices follow the sorted labels of the training set: whole numbers by value, names alphabetically. Labels
    0 ... n-1 are therefore their own indices.
    """

    name = "classification"
    kind = "classification"
    metric = "accuracy"
    scores = quick_scores = ("accuracy", "f1", "matthews")
    layouts = (("text", "label"), ("sentence1", "sentence2", "label"))

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.index = {label: i for i, label in enumerate(self.labels)}
        digits = ((i, name) for i, name in enumerate(self.classes) if name.isdecimal())
        # Stars from 1 to 5 are names, so a label 0 is an error and not the name at index 0.
        self.takes_indices = bool(self.classes) and all(int(name) == i for i, name in digits)

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether the columns fit and no label has a fraction."""
        return super().reads(columns, rows) and not _are_scores(rows)

    @classmethod
    def labels_of(cls, rows: Iterable[Fields], known: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the sorted labels of the training set, two or more, or `known` if it contains them all."""
        if cls.classes:
            return cls.classes
        names = set()
        for row in rows:
            with suppress(BadRow):  # encode() reports the row with its line
                names.add(class_name(row.get("label")))
        indices = sorted(name for name in names.difference(known) if name.isdecimal())
        if known and indices:  # of the declared names, which would be classes of their own
            raise DataError(
                f"the training set has the labels {listed(indices, 5)}, and its data set declares {listed(known)}. "
                "Write the declared names in all rows"
            )
        if len(names) < 2:
            labels = f"only the label {next(iter(names))!r}" if names else "no label"
            raise DataError(
                f"the training set has {labels}; classification needs at least two. Add rows of another label. If "
                "data.limit leaves them out, raise data.limit"
            )
        if names <= set(known):
            return tuple(known)
        try:
            return tuple(sorted(names, key=lambda name: (int(name), name)))
        except ValueError:
            return tuple(sorted(names))

    def encode(self, fields: Fields) -> LabelledExample:
        """Return the example; a pair that is too long loses tokens from the end of its longer text."""
        label = class_name(fields.get("label"))
        is_index = self.takes_indices and label not in self.index and label.isdecimal()
        if is_index and int(label) < len(self.classes):
            label = self.classes[int(label)]
        if label not in self.index:
            labels = ", ".join(self.labels)
            problem = (
                f"is {label!r}, which task {self.name} does not have; write one of {labels}"
                f"{', or its index from 0' if self.takes_indices else ''}."
                if self.classes
                else f"is {label!r}, which the training set does not have; its labels are {labels}."
            )
            raise UnknownLabel(problem + nearest(label, self.labels), "label")
        return self._encode(fields, self.index[label], label)

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return accuracy, F1 and the Matthews correlation: :func:`lorakit.metrics.classification`."""
        labels = [int(label) for label in targets(examples)]
        return metrics.classification(outputs, labels, classes=settings.get("classes"))


class Regression(Labelled):
    """Regression on `text`, or on `sentence1` and `sentence2`. The target is a `score`, or a fractional `label`."""

    name = "regression"
    kind = "regression"
    metric = "pearson"
    scores = quick_scores = ("pearson", "spearman", "mse")
    layouts = (("text", "score"), ("sentence1", "sentence2", "score"), *Classification.layouts)

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether the columns fit and the targets are scores, or numeric labels, some with a fraction."""
        if not super().reads(columns, rows):
            return False
        return "score" in columns or _are_scores(rows)

    def encode(self, fields: Fields) -> LabelledExample:
        """Return the example; a pair that is too long loses tokens from the end of its longer text."""
        column = next((name for name in self.targets if name in fields), "label")
        score = number(fields.get(column), column)
        return self._encode(fields, score, str(score))

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return Pearson's and Spearman's correlation and the squared error: :func:`lorakit.metrics.regression`."""
        return metrics.regression(outputs, targets(examples))


def targets(examples: Groups) -> list[int | float]:
    """Return the class indices or scores of labelled examples, one per input."""
    return [example.label for (example,) in examples if isinstance(example, LabelledExample)]


def class_name(label: object) -> str:
    """Return a label as text: a whole number (1, 1.0, "1.0") as its digits, a boolean as true or false."""
    if label is None:
        raise BadRow("is missing", "label")
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, str):
        name = text_field({"label": label}, "label").strip()
        whole = WHOLE.fullmatch(name)
        return whole[1] if whole else name
    raise BadRow(f"is {json_type(label)}, expected a name or a whole number", "label")


def number(value: object, column: str) -> float:
    """Return a field as a number that a float32 tensor can hold. Text is parsed (CSV)."""
    if value is None:
        raise BadRow("is missing", column)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRow(f"is {json_type(value)}, expected a number", column)
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise BadRow(f"is {value!r}, expected a number", column) from None
    if not is_finite(result):
        raise BadRow(
            f"is {value!r}, expected a finite number of at most {LARGEST_NUMBER} in size", column
        )
    return result


def _are_scores(rows: Iterable[Fields]) -> bool:
    """Return whether the labels are scores: numbers, some with a fraction.

    Reject labels of which some have a fraction and others are not numbers.
    """
    labels = [row["label"] for row in rows if row.get("label") not in (None, "")]
    numbers = [_number_or_none(label) for label in labels]
    if all(value is None or value.is_integer() for value in numbers):
        return False
    if None in numbers:
        other = labels[numbers.index(None)]
        raise BadRow(
            f"has decimal numbers and {other!r:.80}. Set data.task to regression, which reports the rows without a "
            "number, or to classification, which makes a class of each label",
            "label",
        )
    return True


def _number_or_none(label: object) -> float | None:
    try:
        return number(label, "label")
    except BadRow:
        return None
