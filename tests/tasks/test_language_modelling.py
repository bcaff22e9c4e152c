from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import BOS, tiny_encoder_tokenizer, tiny_sentencepiece, tiny_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from lorakit.errors import DataError
from lorakit.tasks import BadRow, Completion, PlainText, TooLong
from lorakit.tasks.language_modelling import (
    continuation_text,
    encode_text,
    prompt_ids,
    puts_blank_first,
)

TOKENIZER = tiny_tokenizer()
WITH_BOS = tiny_tokenizer(adds_bos=True)
TEXT = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable())


def encode(prompt, completion, tokenizer=TOKENIZER, **settings):
    settings = {"max_length": 100_000} | settings
    return Completion(tokenizer, **settings).encode({"prompt": prompt, "completion": completion})


def targets(example):
    return [i for i, t in zip(example.input_ids, example.loss_mask, strict=True) if t]


@given(prompt=TEXT, completion=TEXT, bos=st.booleans())
def test_example_is_prompt_then_completion_then_eos(prompt, completion, bos):
    tokenizer = WITH_BOS if bos else TOKENIZER
    example = encode(prompt, completion, tokenizer)

    # Generation and training use the same token ids before the completion.
    assert example.prompt_ids == tokenizer(prompt)["input_ids"] == prompt_ids(tokenizer, prompt)
    assert tokenizer.decode(targets(example)) == completion + tokenizer.eos_token
    assert example.loss_mask == [i >= example.prompt_length for i in range(len(example))]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert (example.input_ids[0] == tokenizer.bos_token_id) == bos
    assert (example.prompt, example.completion) == (prompt, completion)
    assert not example.truncated


def test_the_boundary_is_that_of_generation_not_of_the_joined_text():
    prompt, completion = "The ", "pub"
    joined = TOKENIZER(prompt + completion)["input_ids"]
    example = encode(prompt, completion)
    assert (
        joined[: example.prompt_length] != example.prompt_ids
    )  # " p" is one token in the joined text
    assert example.prompt_ids == TOKENIZER(prompt)["input_ids"]


CONTINUED = [
    ('{"answer": "', 'Paris"}'),
    ("os.", "path"),
    ("def f(x):\n", "    return x"),
    ("Answer:", " Paris"),
    ("Answer: ", "Paris"),
    ("a", "\n\nb"),
    ("caf", "é"),
]


@pytest.mark.parametrize(("prompt", "completion"), CONTINUED)
def test_no_blank_comes_between_prompt_and_completion(prompt, completion) -> None:
    """Llama 2's tokenizer puts one before a text, but the completion continues a text."""
    tokenizer = tiny_sentencepiece()
    example = encode(prompt, completion, tokenizer)
    ids = example.input_ids[example.prompt_length : -1]
    assert tokenizer.decode([*prompt_ids(tokenizer, prompt), *ids]) == prompt + completion
    assert continuation_text(tokenizer, example.prompt_ids, ids) == completion
    other = encode(prompt, completion, tokenizer, is_encoder_decoder=True)
    assert targets(other)[:-1] == encode_text(tokenizer, completion)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tiny_encoder_tokenizer()], ids=["BPE", "BERT"])
def test_other_tokenizers_put_no_blank_first(tokenizer) -> None:
    assert not puts_blank_first(tokenizer)


def test_a_vocabulary_without_small_letters_has_its_bos() -> None:
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", "</s>", *"ACGT"])}, []))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    dna = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert encode("AC", "GT", dna).input_ids == [0, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WITH_BOS], ids=["no bos", "bos"])
def test_a_text_that_has_its_bos_gets_no_second_one(tokenizer) -> None:
    """Texts that a chat template has written begin with it."""
    written = f"{BOS}The river"
    assert encode(written, " pub", tokenizer).input_ids.count(tokenizer.bos_token_id) == 1
    text = PlainText(tokenizer, max_length=99).encode({"text": written})
    assert text.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(tokenizer, written) == encode(written, " pub", tokenizer).prompt_ids


def test_special_tokens_after_a_text_do_not_separate_prompt_and_completion():
    tokenizer = tiny_encoder_tokenizer()  # [CLS] text [SEP]
    tokenizer.eos_token = "[SEP]"
    example = encode("The river", " pub", tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "[CLS]The river"
    assert tokenizer.decode(targets(example)) == " pub[SEP]"


@pytest.mark.parametrize("bos", [False, True])
def test_truncation_cuts_the_prompt_from_its_left_and_keeps_bos(bos):
    tokenizer = WITH_BOS if bos else TOKENIZER
    whole = encode("The river pub near the park", " is cheap", tokenizer)
    answer = targets(whole)
    example = encode(
        "The river pub near the park",
        " is cheap",
        tokenizer,
        max_length=len(answer) + 4,
        truncate=True,
    )
    assert example.truncated
    assert len(example) == len(answer) + 4
    assert targets(example) == answer
    start = [tokenizer.bos_token_id] if bos else []
    assert example.prompt_ids == start + whole.prompt_ids[len(start) - 4 :]
    kept = len(answer) + 4 - len(start)
    assert example.generation_ids == start + whole.prompt_ids[len(start) :][-kept:]


@pytest.mark.parametrize("bos", [False, True])
def test_a_completion_too_long_by_itself_loses_its_end(bos):
    tokenizer = WITH_BOS if bos else TOKENIZER
    whole = encode("The river", " serves cheap English food", tokenizer)
    example = encode(
        "The river", " serves cheap English food", tokenizer, max_length=6, truncate=True
    )
    assert example.prompt_ids == [whole.input_ids[0] if bos else whole.prompt_ids[-1]]
    assert targets(example) == targets(whole)[:5]
    assert tokenizer.eos_token_id not in targets(example)


@pytest.mark.slow
@given(
    prompt=TEXT,
    completion=TEXT,
    max_length=st.integers(min_value=2, max_value=40),
    bos=st.booleans(),
)
def test_truncated_examples_fit_and_keep_a_target_that_something_predicts(
    prompt, completion, max_length, bos
):
    tokenizer = WITH_BOS if bos else TOKENIZER
    example = encode(prompt, completion, tokenizer, max_length=max_length, truncate=True)
    assert len(example) == len(example.loss_mask) <= max_length
    assert 1 <= example.prompt_length < len(example)
    assert not example.loss_mask[0]
    assert all(example.loss_mask[example.prompt_length :])


def test_too_long_without_truncation_names_both_lengths():
    with pytest.raises(TooLong, match=r"^11 tokens, more than max_length 5$") as caught:
        encode("The river\n", "pub is\n", max_length=5)
    assert caught.value.length == 11


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": None}, "'completion' is missing"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        (
            {"prompt": "a", "completion": 3},
            r"'completion' is a number \(3\), expected text; write it in quotes, or convert it with "
            r"data\.completion_template '\{completion\}'",
        ),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' is a list, expected text"),
        (
            {"prompt": "a", "completion": "\ud83d"},
            r"'completion' contains half of a surrogate pair",
        ),
        ({"prompt": "caf\udce9", "completion": "b"}, r"'prompt' is not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(BadRow, match=message):
        Completion(TOKENIZER, max_length=99).encode(fields)


def test_a_tokenizer_without_eos_is_rejected():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Completion(tiny_encoder_tokenizer(), max_length=99)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WITH_BOS], ids=["no bos", "bos"])
def test_all_of_a_plain_text_but_its_first_token_is_a_target(tokenizer):
    text = "The river pub"
    example = PlainText(tokenizer, max_length=100).encode({"text": text})
    assert example.input_ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert example.loss_mask == [False] + [True] * (len(example) - 1)


def test_a_plain_text_that_is_too_long_loses_its_end():
    whole = PlainText(TOKENIZER, max_length=100).encode({"text": "The river pub"})
    with pytest.raises(TooLong):
        PlainText(TOKENIZER, max_length=3).encode({"text": "The river pub"})
    short = PlainText(TOKENIZER, max_length=3, truncate=True).encode({"text": "The river pub"})
    assert short.input_ids == whole.input_ids[:3]
    assert short.truncated
