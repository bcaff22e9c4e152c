"""Language modelling on prompt and completion: the loss is on the completion and its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.metrics.overlap import text_scores
from lorakit.tasks.task import BadRow, Example, Fields, LanguageExample, Task, TooLong, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTask(Task):
    """What tasks share whose answer is a text: BLEU and ROUGE-L against every reference."""

    kind = "text"
    metric = "bleu"
    scores = quick_scores = ("bleu", "rouge_l")

    @classmethod
    def score(
        cls, outputs: Sequence[Any], examples: Sequence[Sequence[Example]], **settings: Any
    ) -> dict[str, float]:
        """Return corpus BLEU and mean ROUGE-L, from 0 to 100."""
        lowercase = settings.get("lowercase", True)
        return text_scores(outputs, references(cls, examples), lowercase=lowercase)


class Completion(TextTask):
    """`prompt` and `completion`, as plain text."""

    name = "completion"
    layouts = (("prompt", "completion"),)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.start = start_ids(tokenizer)
        self.end = end_id(tokenizer)
        self.before_completion: list[int] = []

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids to generate from, the same that training puts before a completion."""
        return self.start + encode_text(self.tokenizer, prompt) + self.before_completion

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the example `[prompt, completion, eos]`; the completion's tokens and eos are targets."""
        prompt = text_field(fields, "prompt")
        completion = text_field(fields, "completion")
        # Prompt and completion are tokenised apart. Generation is given the tokens of the prompt alone
        # and can only append: tokenising the joined text may merge the last character of the prompt with
        # the first of the completion, and train on a boundary that never occurs when generating.
        prompt_ids = self.prompt_ids(prompt)
        completion_ids = encode_text(self.tokenizer, completion)
        for ids, column in ((prompt_ids, "prompt"), (completion_ids, "completion")):
            if not ids:
                raise BadRow("has no tokens in this tokenizer's vocabulary", column)
        example = LanguageExample(
            input_ids=[*prompt_ids, *completion_ids, self.end],
            loss_mask=[False] * len(prompt_ids) + [True] * (len(completion_ids) + 1),
            prompt_length=len(prompt_ids),
            prompt=prompt,
            completion=completion,
        )
        return fit(example, self.max_length, truncate=self.truncate, keep=len(self.start))


def references(task: type[Task], examples: Sequence[Sequence[Example]]) -> list[list[str]]:
    """Return the expected answers to each input, as `task` leaves a generated one."""
    return [[task.answer(example.completion) for example in group] for group in examples]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids to generate from, the same that training put before a completion."""
    return start_ids(tokenizer) + encode_text(tokenizer, prompt)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise `text` without the special tokens that the tokenizer would put around it."""
    # `verbose=False`: a length above the tokenizer's own limit is judged here, against `max_length`.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: usually bos, or nothing.

    What it puts after a text (eos, for some) must not stand between prompt and completion.
    """
    bare = encode_text(tokenizer, "a")
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise DataError(
        f"{type(tokenizer).__name__} changes a text's tokens when it adds special tokens"
    )


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of eos, without which a model never learns to stop."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token, which every "
            "completion must end with; set it: tokenizer.eos_token = '...'"
        )
    return end


def fit(
    example: LanguageExample, max_length: int, *, truncate: bool, keep: int = 0
) -> LanguageExample:
    """Return the example cut to `max_length` tokens.

    The prompt gives way first, from its left, since what stands next to the answer matters most; its
    first `keep` tokens (bos) stay. An answer that is too long by itself loses its end, and with it eos,
    so that no false end is learnt; one token of the prompt stays before it.

    Raises:
        TooLong: the example is too long and `truncate` is off.
    """
    if len(example) <= max_length:
        return example
    if not truncate:
        raise TooLong(len(example), max_length)
    answer = len(example) - example.prompt_length
    budget = min(
        max(max_length - answer, 1), example.prompt_length
    )  # tokens of the prompt that stay
    head = min(keep, budget)
    tail = budget - head
    kept = [
        *range(head),
        *range(example.prompt_length - tail, example.prompt_length),
        *range(example.prompt_length, len(example)),
    ][:max_length]
    example.input_ids = [example.input_ids[i] for i in kept]
    example.loss_mask = [example.loss_mask[i] for i in kept]
    example.loss_mask[0] = False  # the token that predicted it is gone
    example.prompt_length = budget
    example.truncated = True
    return example
