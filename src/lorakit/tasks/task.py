"""The base class of tasks, which encode rows of data as examples and score outputs; and its types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fields = Mapping[str, Any]
"""One row, by field names (`prompt`, `completion`, `messages`, `text`, `label` ...)."""

Kind = Literal["text", "classification", "regression"]
"""The output of a model: generated text, one of several classes, or a number."""


@dataclass(slots=True, kw_only=True)
class Example:
    """One row as token ids for the model, and as text for scoring and display.

    The length of an example is its number of tokens.
    """

    input_ids: list[int]
    prompt: str
    """The input of the model, as text."""
    completion: str
    """The expected output as text: the reference for generated text or for a predicted label."""
    gold: Mapping[str, Any] = field(default_factory=dict)
    """Further values of the row for scoring, such as a table or a category. Empty for most tasks."""
    origin: str = ""
    """Source of the row, as `file:line`."""
    split: str = ""
    """Split of the row: its name on the hub, or the file name without suffixes."""
    truncated: bool = False
    may_be_cut: bool = False
    """Whether a prompt that is too long is cut (`data.too_long` is truncate) and not rejected."""
    key: str = ""
    """What identifies the input. Examples with the same key are in the same split. By default `prompt`; that of a chat
    depends on the tokenizer, and on the day if the template writes a date."""

    def __post_init__(self) -> None:
        self.key = self.key or self.prompt

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True, kw_only=True)
class LanguageExample(Example):
    """An example for language modelling. Some of its tokens are targets."""

    loss_mask: list[bool]
    """Same length as `input_ids`; True where the token is a target. False at position 0, which no token predicts."""
    prompt_length: int
    """Number of leading tokens from which `completion` is generated."""
    uncut_prompt: list[int] | None = None
    """Token ids of the prompt without the cut that makes room for the completion; None without such a cut."""

    @property
    def prompt_ids(self) -> list[int]:
        """Return the token ids of the prompt in training."""
        return self.input_ids[: self.prompt_length]

    @property
    def generation_ids(self) -> list[int]:
        """Return the token ids to generate from. They do not depend on the completion."""
        return self.prompt_ids if self.uncut_prompt is None else self.uncut_prompt


@dataclass(slots=True, kw_only=True)
class LabelledExample(Example):
    """An example with one target for the whole sequence."""

    label: int | float
    """A class index (int) or a score (float)."""
    token_type_ids: list[int] | None = None
    """0 for the first text, 1 for the second; for models with token types (BERT), else None."""


Groups = Sequence[Sequence[Example]]
"""For each input of the model, the examples with it: one or more."""


class RowError(DataError):
    """A row that cannot be encoded. The caller adds file and line.

    `column` is the invalid field, which lets the caller report the column's name in the file.
    """

    def __init__(self, what: str, column: str | None = None) -> None:
        super().__init__(f"'{column}' {what}" if column else what)
        self.what = what
        self.column = column


class BadRow(RowError):
    """A row with a missing, empty or wrongly typed field."""


class TooLong(RowError):
    """A row with more tokens than `max_length`."""

    def __init__(self, length: int, max_length: int) -> None:
        super().__init__(f"{length:,} tokens, more than max_length {max_length:,}")
        self.length = length


class UnknownLabel(RowError):
    """A label that the training set lacks. Such a row is never skipped, because skipping would inflate the scores."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data set of a named task.

    A split has one or several names. Among local files (`train.jsonl`, `train_subset.jsonl.gz`) the first name that
    exists is used; on the hub, the first name. A split without names does not exist.
    """

    folder: str
    """Sub-folder of `data.root` with its files."""
    hub: str | None = None
    """`owner/name` or `owner/name:config`; None if the hub does not have it."""
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    def names(self, split: str) -> tuple[str, ...]:
        """Return the names of a split, the hub's first. A plus in a name joins several splits."""
        return getattr(self, split)


class Task(ABC):
    """Base class of tasks. A task encodes rows as examples and scores the outputs of a model.

    A generic task (completion, chat, text, classification, regression) reads any data with its columns. A named task
    is a subclass of a generic one that defines its data set: location, columns and scores.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]
    """Sets of field names. A row must have all fields of at least one set."""
    condition: ClassVar[str] = ""
    """What the columns must fulfil besides, for messages."""
    metric: ClassVar[str] = "loss"
    """The main score of the task, one of `scores`; the loss for a task without scores."""
    scores: ClassVar[tuple[str, ...]] = ()
    """Names of the scores that `score` returns."""
    quick_scores: ClassVar[tuple[str, ...]] = ()
    """Names of the scores that are cheap enough for validation during training."""
    less_is_better: ClassVar[tuple[str, ...]] = ()
    """Names of the scores for which lower is better."""
    decoding: ClassVar[Mapping[str, Any] | None] = None
    """Settings of text generation that differ from the defaults, by field name of `Decoding`."""
    encodings: ClassVar[tuple[str, ...]] = ()
    """Text formats of a row, the default first; empty if the task has only one."""
    data_set: ClassVar[DataSet | None] = None
    """Data set of a named task, used when the configuration names no data."""
    scored_split: ClassVar[Literal["validation", "test"]] = "test"
    """Default split of `lorakit evaluate`: the split of the published scores."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Class names in index order, if the task defines them. A label is then a name or an index; only a name if names
    are numbers other than their indices."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Fields that `rows` adds to those of the data. Templates can use them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        truncate: bool = False,
        labels: Sequence[str] = (),
        encoding: str | None = None,
        is_encoder_decoder: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.labels = tuple(labels)
        self.encoding = encoding or next(iter(self.encodings), "")
        self.is_encoder_decoder = is_encoder_decoder

    @abstractmethod
    def encode(self, fields: Fields) -> Example:
        """Return the example of one row, of at most `max_length` tokens.

        Raises:
            BadRow: A field is missing, empty or of the wrong type.
            TooLong: The example has more than `max_length` tokens and `truncate` is off.
            UnknownLabel: The label is not one of `labels`.
        """

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether this task reads rows with these columns. `rows` decide if the columns fit several tasks."""
        return any(set(layout) <= set(columns) for layout in cls.layouts)

    @classmethod
    def source_format(cls, columns: Collection[str], rows: Iterable[Fields]) -> str:
        """Return the format of rows with these columns in a few words, for the user."""
        return next(
            (" and ".join(layout) for layout in cls.layouts if set(layout) <= set(columns)), ""
        )

    @classmethod
    def labels_of(cls, rows: Iterable[Fields], known: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the class names of a training set in index order; empty without classes.

        `known` contains the class names that the data set declares, if any.
        """
        return cls.classes

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield the examples of one row of data, each as the fields that `encode` reads.

        A generic task has one example per row. A named task may have several (one for each reference text), or none.

        Raises:
            BadRow: A field is missing, empty or of the wrong type.
        """
        yield fields

    @classmethod
    @abstractmethod
    def score(
        cls,
        outputs: Sequence[Any],
        examples: Groups,
        *,
        quick: bool = False,
        lowercase: bool = True,
        classes: int | None = None,
    ) -> dict[str, float]:
        """Return the scores of a model's outputs.

        Args:
            outputs: Texts as returned by `answer`, class indices, or numbers.
            examples: For each output the examples with its input, one or more.
            quick: Compute `quick_scores` only.
            lowercase: Whether generic text scores ignore case.
            classes: Number of classes.
        """

    @classmethod  # noqa: B027 - a task without scores has nothing to check
    def check_scoring(cls, examples: Groups) -> None:
        """Check before the model runs that `score` can score outputs of the examples.

        Raises:
            ConfigurationError: A package that it needs is missing.
            DataError: It cannot compare with the references.
        """

    @classmethod
    def stop_ids(cls, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids that end a generated text, besides eos."""
        return []

    @classmethod
    def answer(cls, text: str) -> str:
        """Return the part of a generated text that is scored."""
        return text.strip()


def text_field(fields: Fields, column: str) -> str:
    """Return a field after checking that it is non-empty text."""
    value = fields.get(column)
    if value is None:
        raise BadRow("is missing", column)
    if not isinstance(value, str):
        advice = ""
        if isinstance(value, int | float):
            advice = "; write it in quotes"
            if column in ("prompt", "completion"):
                advice += f", or convert it with data.{column}_template '{{{column}}}'"
        raise BadRow(f"is {json_type(value)}, expected text{advice}", column)
    if not value.strip():
        raise BadRow("is empty", column)
    return checked_text(value, column)


def checked_text(text: str, column: str) -> str:
    """Return `text` after checking that it is valid Unicode. JSON escapes can encode half of a surrogate pair."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # The CSV reader decodes a byte that is not UTF-8 to U+DC00 + byte (surrogateescape).
            if 0xDC80 <= code <= 0xDCFF:
                raise BadRow(f"is not UTF-8 (byte 0x{code - 0xDC00:02x})", column) from None
            raise BadRow(f"contains half of a surrogate pair (\\u{code:04x})", column) from None
    return text


def json_type(value: object) -> str:
    """Return the type of a value in JSON terms, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"
