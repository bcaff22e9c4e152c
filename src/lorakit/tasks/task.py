"""What a task is: it turns one row of data into one example that a model can be trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.errors import DataError
from lorakit.tasks.data_set import DataSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fields = Mapping[str, Any]
"""One row, by the names that tasks use (`prompt`, `completion`, `messages`, `text`, `label` ...)."""

Kind = Literal["text", "classification", "regression"]
"""What a model answers with: text it writes, one of several classes, or a number."""


@dataclass(slots=True, kw_only=True)
class Example:
    """One row as the model sees it, and as text for scoring and display.

    Its length, everywhere in lorakit, is the number of its tokens.
    """

    input_ids: list[int]
    prompt: str
    """The input as text: what the model is given."""
    completion: str
    """The expected answer as text: the reference that generated text, or a predicted label, is scored against."""
    gold: Mapping[str, Any] = field(default_factory=dict)
    """What scoring needs of the row beside `completion`: a table, a category. Empty for most tasks."""
    origin: str = ""
    """Where the row stands, as `file:line`."""
    split: str = ""
    """The split that it stands in: the hub's name of it, or its file's without endings."""
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True, kw_only=True)
class LanguageExample(Example):
    """An example whose targets are some of its own tokens."""

    loss_mask: list[bool]
    """Same length as `input_ids`; True where the token itself is a target. Never True at position 0:
    nothing precedes it that could predict it."""
    prompt_length: int
    """The first `prompt_length` tokens are what generation starts from to produce `completion`."""

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids to generate from."""
        return self.input_ids[: self.prompt_length]


@dataclass(slots=True, kw_only=True)
class LabelledExample(Example):
    """An example with one target for the whole sequence."""

    label: int | float
    """A class index (int) or a score (float)."""
    token_type_ids: list[int] | None = None
    """0 for the first text, 1 for the second, for models that take them (BERT)."""


class RowError(DataError):
    """A row that cannot become an example; whoever knows the file adds the line.

    `column` names the field at fault, so that the message can use the name it has in the file.
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
    """A label that the training set does not have: never skipped, or scores would be too good."""


class Task(ABC):
    """How rows of one kind become examples, and how what a model makes of them is scored.

    A generic task (completion, chat, classification, regression) reads any data with its columns. A named task is a
    subclass of one that knows its data set: where it lies, what its columns are, and how it is scored.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of fields, any one of which a row must have."""
    metric: ClassVar[str] = "loss"
    """The score that speaks for the task, one of `scores`."""
    scores: ClassVar[tuple[str, ...]] = ()
    """Names of the scores that `score` returns."""
    quick_scores: ClassVar[tuple[str, ...]] = ()
    """Names of those that are cheap enough to be taken during training."""
    less_is_better: ClassVar[tuple[str, ...]] = ()
    """Names of those of which less is better."""
    decoding: ClassVar[Mapping[str, Any] | None] = None
    """Settings of text generation other than the defaults, by the names in `Decoding`."""
    encodings: ClassVar[tuple[str, ...]] = ()
    """Ways to write a row as text, the default first; empty where there is but one."""
    data_set: ClassVar[DataSet | None] = None
    """Where a named task finds its rows when the configuration names none."""
    scored_split: ClassVar[Literal["validation", "test"]] = "test"
    """The split that `lorakit evaluate` scores when none is named: that of the published scores."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Class names in index order, where the task itself says them; a label is then a name or an index."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Fields that `rows` adds to those of the data, for templates to name."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        truncate: bool = False,
        labels: Sequence[str] = (),
        encoding: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.labels = tuple(labels)
        self.encoding = encoding or next(iter(self.encodings), "")

    @abstractmethod
    def encode(self, fields: Fields) -> Example:
        """Return the example of one row, of at most `max_length` tokens.

        Raises:
            BadRow: a field is missing, empty or of the wrong type.
            TooLong: the example has more than `max_length` tokens and `truncate` is off.
            UnknownLabel: the label is not one of `labels`.
        """

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Whether this task can read rows with these columns. `rows` settles what columns leave open."""
        del rows
        return any(set(layout) <= set(columns) for layout in cls.layouts)

    @classmethod
    def labels_of(cls, rows: Iterable[Fields], known: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the class names that a training set defines, in index order; empty without classes.

        `known` holds the names that the data set itself declares, if it does.
        """
        del rows, known
        return cls.classes

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield the examples that one row of data holds, each in the fields that `encode` reads.

        Raises:
            BadRow: a field is missing, empty or of the wrong type.
        """
        yield fields

    @classmethod
    @abstractmethod
    def score(
        cls,
        outputs: Sequence[Any],
        examples: Sequence[Sequence[Example]],
        *,
        quick: bool = False,
        lowercase: bool = True,
        classes: int | None = None,
    ) -> dict[str, float]:
        """Return the scores of what a model made of the examples.

        Args:
            outputs: Texts as `answer` leaves them, class indices, or numbers.
            examples: For each output the examples with its input, one or more.
            quick: Only those of `quick_scores`.
            lowercase: Whether generic scores of text take upper and lower case as the same.
            classes: How many classes there are.
        """

    @classmethod  # noqa: B027 - most tasks have nothing to check
    def check_scoring(cls) -> None:
        """Raise a ConfigurationError where a package that `score` needs is missing; called before the work."""

    @classmethod
    def answer(cls, text: str) -> str:
        """Return what counts of a generated text."""
        return text.strip()


def text_field(fields: Fields, column: str) -> str:
    """Return a field that must be non-empty text."""
    value = fields.get(column)
    if value is None:
        raise BadRow("is missing", column)
    if not isinstance(value, str):
        raise BadRow(f"is {kind(value)}, expected text", column)
    if not value.strip():
        raise BadRow("is empty", column)
    return checked_text(value, column)


def checked_text(text: str, column: str) -> str:
    """Return `text` if it is valid Unicode, which tokenizers require and JSON escapes do not ensure."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # Readers that go on after a byte that is not UTF-8 leave it as U+DC80 + byte - 0x80.
            if 0xDC80 <= code <= 0xDCFF:
                raise BadRow(f"is not UTF-8 (byte 0x{code - 0xDC00:02x})", column) from None
            raise BadRow(f"holds half of a surrogate pair (\\u{code:04x})", column) from None
    return text


def kind(value: object) -> str:
    """Name the type of a value in the words of a data file."""
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
