"""Positions of virtual tokens in examples, batches and prompts."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from tiny_tokenizer import CHAT_TEMPLATE, tiny_encoder_tokenizer, tiny_tokenizer

from lorakit import PrefixEmbedding, PrefixLayer, attach
from lorakit.compute.base import check_context
from lorakit.compute.batching import collator
from lorakit.compute.model_input import model_prompts, place
from lorakit.compute.objective import LanguageModellingLoss
from lorakit.errors import DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualTokens
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource
from lorakit.tasks import Chat, LabelledExample, LanguageExample, PlainText
from lorakit.tasks.classification import Classification

P, X = PREFIX_START, INFIX_START
TOKENS = VirtualTokens(prefix=2, infix=1)


def language(prompt: list[int], completion: list[int]) -> LanguageExample:
    return LanguageExample(
        input_ids=[*prompt, *completion],
        loss_mask=[False] * len(prompt) + [True] * len(completion),
        prompt_length=len(prompt),
        prompt="p",
        completion="c",
        origin="file:1",
    )


def test_prefix_after_bos_and_infix_before_the_completion() -> None:
    example = language([1, 7, 8], [9, 2])
    placed = place(example, TOKENS, [1])
    assert placed.input_ids == [1, P, P + 1, 7, 8, X, 9, 2]
    assert placed.loss_mask == [False] * 6 + [True] * 2
    assert placed.prompt_ids == TOKENS.place([1, 7, 8], keep=1) == [1, P, P + 1, 7, 8, X]
    assert example.input_ids == [1, 7, 8, 9, 2]
    assert place(language([7, 8], [9]), TOKENS, [1]).input_ids == [P, P + 1, 7, 8, X, 9]
    assert place(language([], [9]), TOKENS, []).input_ids == [P, P + 1, X, 9]


def test_a_prompt_to_continue_keeps_bos_before_the_prefix() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    base = base_of("llama", tokenizer)
    attach(base.model, PrefixLayer(prefix_length=2, infix_length=1))
    prompt = tokenizer("river")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    placed = [prompt[0], P, P + 1, *prompt[1:], X]
    assert model_prompts(base.model, tokenizer, [prompt]) == [placed]


def test_what_a_classifier_reads_ends_with_the_infix() -> None:
    example = LabelledExample(
        input_ids=[2, 7, 3, 8, 3],
        token_type_ids=[0, 0, 0, 1, 1],
        label=1,
        prompt="p",
        completion="1",
    )
    placed = place(example, TOKENS, [2])
    assert placed.input_ids == [2, P, P + 1, 7, 3, 8, 3, X]
    assert placed.token_type_ids == [0, 0, 0, 0, 0, 1, 1, 0]


def base_of(arch: str, tokenizer, **settings) -> Base:
    model = tiny_models.build(arch, vocab_size=len(tokenizer), **settings)
    return Base(
        model=model,
        tokenizer=tokenizer,
        source=ModelSource(name=arch, kind="folder", path_or_id="."),
    )


@pytest.fixture
def decoder() -> Base:
    return base_of("llama", tiny_tokenizer())


EXAMPLES = [language([5, 6, 7], [8, 9]), language([5, 6, 7], [9]), language([10, 6], [11, 12, 4])]


def test_packed_and_padded_batches_have_the_same_loss_and_gradient(decoder: Base) -> None:
    adapters = attach(decoder.model, PrefixLayer(prefix_length=2, infix_length=2), seed=1)
    parameters = adapters.trainable_parameters()
    results = []
    for packed in (False, True):
        batch = collator(decoder, packed=packed)(EXAMPLES)
        if packed:  # one prefix for all three, one infix for each of two prompts
            ids = batch["input_ids"]
            assert [int((ids == P + i).sum()) for i in range(2)] == [1, 1]
            assert int((ids >= X).sum()) == 4
        loss = LanguageModellingLoss(path="fused").loss_sum(decoder.model, batch)
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for padded, together in zip(*results, strict=True):
        torch.testing.assert_close(padded, together, atol=1e-5, rtol=1e-4)


def test_targets_are_words_alone(decoder: Base) -> None:
    attach(decoder.model, PrefixEmbedding(prefix_length=2, infix_length=1))
    labels = collator(decoder)(EXAMPLES)["labels"]
    assert labels[labels != -100].tolist() == [8, 9, 9, 11, 12, 4]
    adapted = collator(decoder)
    decoder.model._lorakit_adapters.activate(None)
    assert int(adapted(EXAMPLES)["input_ids"].max()) < P


def test_virtual_tokens_count_towards_the_context(decoder: Base) -> None:
    long = language(list(range(3, 60)), [4, 4])
    check_context(decoder, [long])
    attach(decoder.model, PrefixEmbedding(prefix_length=5, infix_length=1))
    with pytest.raises(
        DataError, match=r"59 tokens and the adapter's 6 virtual ones.*max_length to 58"
    ):
        check_context(decoder, [long])
    with pytest.raises(DataError, match=r"Prompt 1 has 55 tokens and 6 virtual ones"):
        generate(decoder.model, decoder.tokenizer, [[5] * 55], Decoding(max_new_tokens=4))


def test_tokens_without_an_embedding_are_rejected(decoder: Base) -> None:
    """The tokenizers of some bases have more tokens than the base."""
    count = decoder.model.config.vocab_size
    with pytest.raises(DataError, match=f"^file:1 has the token id {count:,}, and the base has"):
        check_context(decoder, [language([3], [count, 4])])
    with pytest.raises(DataError, match=f"^Prompt 2 has the token id {count:,}, and the base has"):
        generate(decoder.model, decoder.tokenizer, [[5], [count]], Decoding(max_new_tokens=4))


def test_an_encoder_decoder_trains_the_last_turn_alone() -> None:
    base = base_of("t5", tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in "12" for role in ("user", "assistant")
    ]
    chat = Chat(base.tokenizer, max_length=99)
    with pytest.raises(DataError, match=r"loss on several assistant turns, but 't5'.*Set weight 0"):
        check_context(base, [chat.encode({"messages": turns})])
    turns[1]["weight"] = 0
    example = chat.encode({"messages": turns})
    check_context(base, [example])
    (labels,) = collator(base)([example])["labels"].tolist()
    assert base.tokenizer.decode(labels) == "assistant 2<|im_end|>"
    marked = dataclasses.replace(example, loss_mask=list(example.loss_mask))
    marked.loss_mask[example.prompt_length - 1] = True  # the header of the last turn
    check_context(base, [marked])
    text = PlainText(base.tokenizer, max_length=99).encode({"text": "river pub"})
    with pytest.raises(DataError, match="is plain text, but 't5' is an encoder-decoder"):
        check_context(base, [text])


def repeating(ids: list[int], size: int) -> set[int]:
    """Return the tokens with which `ids` would end in an n-gram that they have already."""
    ngrams = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    return {ngram[-1] for ngram in ngrams if [*ngram[:-1]] == ids[len(ids) - size + 1 :]}


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_whole_passes_in_any_batch(decoder: Base, beams: int) -> None:
    adapters = attach(decoder.model, PrefixLayer(prefix_length=2, infix_length=2), seed=1)
    prompts = [[5, 6, 7, 9, 30], [10, 6], [40, 41, 42]]
    decoding = Decoding(max_new_tokens=6, beams=beams, no_repeat_ngram=3)
    together = generate(decoder.model, decoder.tokenizer, prompts, decoding)
    alone = [generate(decoder.model, decoder.tokenizer, [p], decoding)[0] for p in prompts]
    assert together == alone
    if beams == 1:
        for prompt, text in zip(prompts, together, strict=True):
            ids = adapters.virtual_tokens.place(prompt)
            start = len(ids)
            with torch.no_grad():
                for _ in range(6):
                    scores = decoder.model(torch.tensor([ids])).logits[:, -1]
                    scores[0, [*repeating(ids[start:], 3)]] = -torch.inf
                    ids.append(int(scores.argmax()))
                    if ids[-1] == decoder.tokenizer.eos_token_id:
                        break
            assert decoder.tokenizer.decode(ids[start:], skip_special_tokens=True) == text


def test_an_encoder_classifies_with_its_first_token_where_it_was() -> None:
    tokenizer = tiny_encoder_tokenizer()
    base = base_of("roberta", tokenizer)
    attach(base.model, PrefixLayer(prefix_length=2, infix_length=1, train_modules="classifier"))
    task = Classification(tokenizer, max_length=32, labels=("no", "yes"))
    examples = [
        task.encode({"text": text, "label": label})
        for text, label in (("cheap food", "yes"), ("a river in the park", "no"))
    ]
    batch = collator(base)(examples)
    assert batch["input_ids"][:, :3].tolist() == [[tokenizer.cls_token_id, P, P + 1]] * 2
    base.model(**batch).loss.backward()
