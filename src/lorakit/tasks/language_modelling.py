"""Language modelling on prompt and completion, and on plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import DataError
from lorakit.metrics.overlap import text_scores
from lorakit.tasks import conversion
from lorakit.tasks.task import BadRow, Fields, Groups, LanguageExample, Task, TooLong, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class TextTask(Task):
    """Base class of tasks that generate text. Scores: BLEU and ROUGE-L against all references."""

    kind = "text"
    metric = "bleu"
    scores = quick_scores = ("bleu", "rouge_l")

    @classmethod
    def check_scoring(cls, examples: Groups) -> None:
        """Score the first input, with a reference as its output."""
        first = examples[:1]
        cls.score([texts[0] for texts in references(cls, first)], first)

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return corpus BLEU and mean ROUGE-L, from 0 to 100."""
        lowercase = settings.get("lowercase", True)
        return text_scores(outputs, references(cls, examples), lowercase=lowercase)


class Completion(TextTask):
    """Completion of a `prompt` by a `completion`, both plain text.

    Alpaca's rows (`instruction`, `input`, `output`) are converted.
    """

    name = "completion"
    layouts = (conversion.PROMPT_COMPLETION, conversion.ALPACA)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.start = start_ids(tokenizer)
        self.end = end_id(tokenizer)
        # Tokens between prompt and completion; named tasks may insert eos.
        self.before_completion: list[int] = []
        # The completion of an encoder-decoder is a text of its own.
        is_text = self.is_encoder_decoder or not puts_blank_first(tokenizer)
        self._encode_completion = encode_text if is_text else continuation_ids

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether there are prompts and completions, both text: lists of messages are a chat."""
        fits = super().reads(columns, ())
        return fits and not conversion.is_conversational(next(iter(rows), {}))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids to generate from. Training uses the same ids before a completion."""
        return with_start(self.start, encode_text(self.tokenizer, prompt)) + self.before_completion

    @classmethod
    def source_format(cls, columns: Collection[str], rows: Iterable[Fields]) -> str:
        """Return the columns that the prompt and the completion come from."""
        if {"prompt", "completion"} <= set(columns) or not conversion.is_alpaca(columns):
            return super().source_format(columns, rows)
        for name in conversion.lone_columns(columns):
            return f"Alpaca's rows with the {name} of data.columns or a template"
        return (
            "Alpaca's instruction, input and output, the first two in Alpaca's prompt (data.task chat uses the chat "
            "template)"
        )

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield the row, with prompt and completion where it is one of Alpaca's."""
        if conversion.is_alpaca(fields):
            if "prompt" not in fields:
                fields = {**fields, "prompt": conversion.alpaca_prompt(fields)}
            if "completion" not in fields:
                fields = {**fields, "completion": text_field(fields, "output")}
        yield fields

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the example `[prompt, completion, eos]`. The completion and eos are targets."""
        prompt = text_field(fields, "prompt")
        completion = text_field(fields, "completion")
        # Tokenise prompt and completion separately, because generation appends to the prompt's tokens. The joined
        # text may merge characters across the boundary into a token that generation never sees.
        prompt_ids = self.prompt_ids(prompt)
        completion_ids = self._encode_completion(self.tokenizer, completion)
        for ids, column in ((prompt_ids, "prompt"), (completion_ids, "completion")):
            if not ids:
                raise BadRow("has no tokens in the vocabulary of this tokenizer", column)
        example = LanguageExample(
            input_ids=[*prompt_ids, *completion_ids, self.end],
            loss_mask=[False] * len(prompt_ids) + [True] * (len(completion_ids) + 1),
            prompt_length=len(prompt_ids),
            prompt=prompt,
            completion=completion,
        )
        return fit(example, self.max_length, truncate=self.truncate, keep=len(self.start))


class PlainText(Task):
    """Language modelling on a `text`. Every token after the first is a target, and so is the eos at the end."""

    name = "text"
    kind = "text"
    layouts = (("text",),)
    condition = ", if it is the only column or data.task is text"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.start = start_ids(tokenizer)
        self.end = end_id(tokenizer)

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether `text` is the only column. Beside others it may be the input of a classifier."""
        return set(columns) == {"text"}

    @classmethod
    def source_format(cls, columns: Collection[str], rows: Iterable[Fields]) -> str:
        """Return what the model learns: the whole text."""
        return "plain text, every token after the first is a target"

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the example `[text, eos]`; a text that is too long loses its end.

        The example's prompt is the whole text, since equal prompts stay in one split.
        """
        text = text_field(fields, "text")
        ids = [*with_start(self.start, encode_text(self.tokenizer, text)), self.end]
        truncated = len(ids) > self.max_length
        if truncated and not self.truncate:
            raise TooLong(len(ids), self.max_length)
        ids = ids[: self.max_length]
        if len(ids) < 2:
            raise BadRow("has no tokens in the vocabulary of this tokenizer", "text")
        return LanguageExample(
            input_ids=ids,
            loss_mask=[False] + [True] * (len(ids) - 1),
            prompt_length=1,
            prompt=text,
            completion="",
            truncated=truncated,
        )

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return no scores: only the loss and the perplexity compare a model with plain text."""
        return {}


def references(task: type[Task], examples: Groups) -> list[list[str]]:
    """Return the references of each input, post-processed by `task.answer` like outputs."""
    return [[task.answer(example.completion) for example in group] for group in examples]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids to generate from. Training used the same ids before a completion."""
    return with_start(start_ids(tokenizer), encode_text(tokenizer, prompt))


def with_start(start: list[int], ids: list[int]) -> list[int]:
    """Put the special tokens of a text's start before it, unless it begins with them: a chat template writes them."""
    return ids if ids[: len(start)] == start else start + ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise `text` without special tokens."""
    # verbose=False: no warning about the tokenizer's length limit; `fit` checks `max_length`.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def puts_blank_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a blank before a text, as those of Llama 2 and Mistral 7B do."""
    if "\n" not in str(tokenizer.decode(encode_text(tokenizer, "\n"))):
        return False  # T5's reads a line feed as a blank, so nothing shows what follows without one
    return continuation_ids(tokenizer, "a") != encode_text(tokenizer, "a")


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text that continues another one, so without a blank that the tokenizer puts before a text."""
    before, ids = encode_text(tokenizer, "\n"), encode_text(tokenizer, "\n" + text)
    if ids[: len(before)] != before:  # the text starts with a line feed that has merged
        return encode_text(tokenizer, text)
    return ids[len(before) :]


def continuation_text(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    ids: Sequence[int],
    *,
    special: bool = False,
) -> str:
    """Return the text of tokens that continue those `before`, with special tokens if `special`.

    SentencePiece strips the blank at the start of a text only.
    """

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=not special))

    start, whole = decode([*before]), decode([*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode([*ids])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: usually bos, or nothing.

    Special tokens after a text (eos, in some tokenizers) must not separate prompt and completion.
    """
    text = next((text for text in _short_texts(tokenizer) if encode_text(tokenizer, text)), "a")
    bare = encode_text(tokenizer, text)
    full = tokenizer.encode(text, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise DataError(
        f"{type(tokenizer).__name__} encodes a text differently when it adds special tokens; use another tokenizer"
    )


def _short_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a letter, then the tokens' texts: the vocabulary of a protein or DNA model may lack the letter."""
    yield "a"
    special = set(tokenizer.all_special_ids)
    yield from (str(tokenizer.decode([i])) for i in range(len(tokenizer)) if i not in special)


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of eos. A model needs eos to learn to stop."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token, but every "
            "completion must end with one; set it: tokenizer.eos_token = '...'"
        )
    return end


def fit(
    example: LanguageExample, max_length: int, *, truncate: bool, keep: int = 0
) -> LanguageExample:
    """Return the example cut to `max_length` tokens.

    The prompt is cut first, from its left, because the tokens next to the answer matter most. Its first `keep` tokens
    (bos) stay. An answer that is too long by itself loses its end and eos, so that the model learns no false end. One
    token of the prompt always stays. `generation_ids` keeps up to `max_length` tokens of the prompt.

    Raises:
        TooLong: The example is too long and `truncate` is off.
    """
    if len(example) <= max_length:
        return example
    if not truncate:
        raise TooLong(len(example), max_length)
    answer = len(example) - example.prompt_length
    prompt_length = min(max(max_length - answer, 1), example.prompt_length)

    def cut(values: list[T]) -> list[T]:
        prompt, rest = values[: example.prompt_length], values[example.prompt_length :]
        return [*cut_prompt(prompt, prompt_length, keep), *rest][:max_length]

    example.uncut_prompt = cut_prompt(example.prompt_ids, max_length, keep)
    example.input_ids, example.loss_mask = cut(example.input_ids), cut(example.loss_mask)
    example.loss_mask[0] = False  # no token predicts it any more
    example.prompt_length = prompt_length
    example.truncated = True
    return example


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading token ids that two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def cut_prompt(values: list[T], length: int, keep: int = 0) -> list[T]:
    """Return up to `length` of a prompt's token ids, or other values, cut from the left after the first `keep`."""
    if len(values) <= length:
        return values
    head = min(keep, length)
    return [*values[:head], *values[len(values) - length + head :]]
