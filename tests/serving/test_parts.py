"""The parts of the engines: pages, sampling, texts, the queue."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import (
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorakit.serving.engine import Receipt, Sampling
from lorakit.serving.http.logprobs import TokenTexts
from lorakit.serving.pages import PagePool, first_key, next_key
from lorakit.serving.preparing import _names as label_names
from lorakit.serving.queue import FairQueue
from lorakit.serving.sampling import BLOCK, FEW, Chooser, choose
from lorakit.serving.text import REPLACEMENT, TextStream

TOKENIZER = tiny_tokenizer()

# --- pages ---------------------------------------------------------------------------------------------


class Pages(RuleBasedStateMachine):
    """Requests take, find, name and release pages; no page ever has two meanings."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6)
        self.holders: Counter[int] = Counter()
        self.content: dict[int, int] = {}  # what was named last, by page

    @rule(target=held)
    def take(self):
        if not self.pool.available:
            with pytest.raises(KeyError):
                self.pool.take()
            return None
        page = self.pool.take()
        assert not self.holders[page]
        self.holders[page] += 1
        self.content.pop(page, None)
        return page

    @rule(target=held, key=st.integers(0, 3))
    def find(self, key):
        page = self.pool.find(bytes([key]))
        if page is not None:
            assert self.content[page] == key
            self.pool.hold(page)
            self.holders[page] += 1
        return page

    @rule(page=held, key=st.integers(0, 3))
    def name(self, page, key):
        if page is not None and self.holders[page]:
            known = self.pool.find(bytes([key]))
            self.pool.name(page, bytes([key]))
            if known is None and page not in self.content:
                self.content[page] = key

    @rule(page=consumes(held))
    def release(self, page):
        if page is not None and self.holders[page]:
            self.pool.release([page])
            self.holders[page] -= 1

    @rule(page=held)
    def forget(self, page):
        if page is not None and self.holders[page]:
            self.pool.forget([page])
            self.content.pop(page, None)

    @invariant()
    def no_page_is_lost(self):
        assert self.pool.available == 6 - sum(1 for count in self.holders.values() if count)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_key_depends_on_everything_before_it():
    keys = {
        next_key(next_key(first_key(salt), first), second)
        for salt in ("a", "b")
        for first in ([1, 2], [2, 1])
        for second in ([3, 4], [4, 3])
    }
    assert len(keys) == 8


def test_a_receipt_names_adapters_and_weights_without_doubt():
    adapters = (("a", "1" * 64, 1.0), ("b=2;c*", "2" * 64, 0.123456789), ("é", "3" * 64, 2.0))
    found = Receipt("0" * 64, adapters).fingerprint
    digits = [f"{i}" * 16 for i in range(4)]
    assert found == (
        f"base={digits[0]};a={digits[1]};b%3D2%3Bc%2A={digits[2]}*0.123456789;é={digits[3]}*2"
    )


def test_equal_labels_are_replaced_by_numbers():
    assert label_names(["no", "yes"], 2) == ("no", "yes")
    assert label_names(["yes", "yes"], 2) == ("LABEL_0", "LABEL_1")
    assert label_names(["yes"], 2) == ("LABEL_0", "LABEL_1")
    assert label_names([], 1) == ()


# --- sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(temperature=1.5, top_p=0.8, top_k=12),
    ],
)
def test_tokens_are_drawn_as_transformers_defines_the_settings(sampling):
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    expected = TemperatureLogitsWarper(sampling.temperature)(None, scores[None])
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    expected = expected[0].softmax(-1)
    chooser, count = Chooser(sampling), 4000
    drawn = torch.zeros(40)
    for _ in range(count):
        drawn[choose(scores[None], [chooser])[0].id] += 1
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    error = (drawn / count - expected).abs().max()
    assert error < 4 * (0.25 / count) ** 0.5  # four standard deviations of the least certain share


def drawn_alone(scores, chooser):
    """The token of one request (V), by the formula that defines it."""
    sampling = chooser.sampling
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k:
        values, ids = scores.topk(min(sampling.top_k, len(scores)))
        kept = values.softmax(-1)
    elif sampling.top_p < 1:
        for count in (min(FEW, len(scores)), len(scores)):  # equal scores are in another order
            values, ids = scores.topk(count)
            kept = (values - scores.logsumexp(-1)).exp()
            if kept[:-1].sum() >= sampling.top_p:
                break
    else:
        kept, ids = scores.softmax(-1), torch.arange(len(scores))
    if sampling.top_k or sampling.top_p < 1:
        allowed = kept.cumsum(-1) - kept < sampling.top_p
        allowed[0] = True
        kept, ids = kept[allowed], ids[allowed]
    cumulative = kept.double().cumsum(-1)
    point = chooser.draw() * cumulative[-1]
    chooser.advance()
    return int(ids[torch.searchsorted(cumulative, point, right=True)])


@pytest.mark.parametrize("size", [40, 2 * BLOCK, 3000])
def test_requests_with_any_settings_draw_together_what_each_draws_alone(size):
    samplings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=i)
        for i, temperature in enumerate((0.2, 1.0, 2.5))
        for top_k in (0, 1, 7, FEW + 5, 2**31 - 1)
        for top_p in (1.0, 0.9, 0.2)
    ]
    together, alone = ([Chooser(sampling) for sampling in samplings] for _ in range(2))
    generator = torch.Generator().manual_seed(size)
    for spread in (0.5, 1, 2, 4, 8):
        scores = torch.randn(len(samplings), size, generator=generator) * spread
        scores = scores.bfloat16().float()  # with equal scores
        scores[:, ::5] = -torch.inf
        found = [token.id for token in choose(scores, together)]
        assert found == [drawn_alone(*pair) for pair in zip(scores, alone, strict=True)]


def test_a_draw_at_the_end_finds_a_possible_token(monkeypatch):
    """Sums of blocks and sums within a block are rounded differently."""
    monkeypatch.setattr(Chooser, "draw", lambda self: 1 - 2**-53)
    scores = torch.randn(200, 2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 4
    scores[:, -9:] = -torch.inf
    chosen = choose(scores, [Chooser(Sampling())] * len(scores))
    assert max(token.id for token in chosen) == 2 * BLOCK - 10


def test_top_p_of_a_flat_distribution_needs_more_than_the_few_that_are_sorted_first():
    chooser = Chooser(Sampling(top_p=0.9))
    drawn = {choose(torch.zeros(1, 1500), [chooser])[0].id for _ in range(3000)}
    assert len(drawn) > FEW


SMALLEST = 5e-324


@pytest.mark.parametrize("temperature", [SMALLEST, 1e-40, 1e-7, 2.0])
@pytest.mark.parametrize("top_p", [SMALLEST, 1e-40, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 2**31 - 1])
def test_any_settings_choose_a_possible_token(temperature, top_p, top_k):
    scores = torch.tensor([[3.0, -torch.inf, 1.0, 3e38], [1.0, -3e38, -torch.inf, -1.0]])
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    first, second = choose(scores, [Chooser(sampling, 50), Chooser(sampling)])
    assert first.id == 3
    assert second.id == 0 if min(temperature, top_p) < 1e-6 or top_k == 1 else second.id in (0, 3)
    assert len(first.top) == 4


def test_rows_without_a_possible_token_are_none_and_the_others_are_chosen():
    scores = torch.tensor(
        [[0.0, 1.0], [torch.nan, 1.0], [-torch.inf, -torch.inf], [2.0, -torch.inf]]
    )
    for temperature in (0.0, 1.0):
        chosen = choose(scores, [Chooser(Sampling(temperature=temperature), 0) for _ in range(4)])
        assert [token is None for token in chosen] == [False, True, True, False]
    assert chosen[3].id == 0
    assert chosen[3].logprob == 0


def test_a_ban_hides_no_nan():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]])
    allowed = scores.clone().index_fill_(1, torch.tensor([2]), -torch.inf)
    first, second = choose(scores, [Chooser(Sampling(temperature=0), 0) for _ in range(2)], allowed)
    assert (first.id, second) == (1, None)
    assert first.logprob == pytest.approx(float(scores[0].log_softmax(-1)[1]))


# --- texts -----------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=200)
def test_the_pieces_of_any_text_are_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(
    st.text("ab é😀", min_size=1, max_size=30),
    st.lists(st.text("ab é😀", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=300)
def test_a_stop_text_is_found_wherever_tokens_end(text, stops):
    stream, pieces = TextStream(TOKENIZER, stops), []
    for token in TOKENIZER(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    found = [text.find(stop) for stop in stops if stop in text]
    result = "".join(pieces) + stream.finish()
    if found:
        assert stream.stopped
        # A token may complete two stop texts at once; then the first in the text counts.
        assert text.startswith(result)
        assert not any(stop in result for stop in stops)
        assert len(result) >= min(found)
    else:
        assert result == text


def test_an_incomplete_character_is_kept_back():
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER("😀")["input_ids"]
    assert len(ids) > 1
    assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "😀"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "�"


def sentencepiece_tokenizer():
    """The decoder of Llama 2's tokenizer, which strips the space at the start of a text."""
    words = ["<unk>", "<s>", "▁The", "▁river", "▁pub", "▁serves", "▁cheap", "▁food", "."]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3, 4], [2, 3, 4, 2, 3, 4, 2, 3, 4]])
def test_a_text_that_continues_a_prompt_has_the_space_between_them(prompt):
    tokenizer, answer = sentencepiece_tokenizer(), [5, 6, 7, 8]
    start, whole = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + answer)
    )
    stream, texts = TextStream(tokenizer, before=prompt), TokenTexts(tokenizer, prompt)
    text = "".join(map(stream.push, answer)) + stream.finish()
    assert start + text == whole
    shown = [texts.add(token) for token in answer]
    assert "".join(token for token, _ in shown).lstrip() == text.lstrip()
    assert [offset for _, offset in shown[1:]] == [text.index(word) for word in (" ch", " fo", ".")]


def test_a_text_of_its_own_starts_without_a_space():
    stream = TextStream(sentencepiece_tokenizer())
    assert "".join(map(stream.push, [5, 6])) == "serves cheap"


# --- the queue -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["\N{REPLACEMENT CHARACTER}", "special"])
def test_tokens_without_text_cost_the_same_for_ever(token):
    class Counting:
        longest = 0

        def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
            self.longest = max(self.longest, len(ids))
            return "" if token == "special" and skip_special_tokens else token * len(ids)

    tokenizer = Counting()
    stream, texts = TextStream(tokenizer), TokenTexts(tokenizer)
    pieces = [stream.push(5) for _ in range(500)] + [stream.finish()]
    for _ in range(500):
        texts.add(5)
    assert tokenizer.longest < 100
    assert "".join(pieces) == ("" if token == "special" else token * 500)


def test_keys_take_turns():
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    order = []
    while len(queue):
        item = next(queue.turns())
        queue.take(item)
        order.append(item)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_items_are_removed_wherever_they_wait():
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.put(item[0], item)
    assert sorted(queue.remove_where(lambda item: item.endswith("1"))) == ["a1", "b1"]
    assert list(queue) == ["a2"]
    assert len(queue) == 1
    with pytest.raises(ValueError, match="not the first"):
        queue.take("a3")


def test_an_item_that_is_cancelled_while_others_are_removed_stays():
    queue: FairQueue[str] = FairQueue()
    for item in ("a2", "b1"):
        queue.put(item[0], item)
    asked: list[str] = []
    assert queue.remove_where(lambda item: asked.append(item) or len(asked) > 1) == ["b1"]
    assert ([*queue], len(queue)) == (["a2"], 1)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("before", [(), (1, 2, 3)])
def test_offsets_are_those_of_the_text_also_after_a_special_token(before):
    """The decoder of Llama 2 strips the first blank of a text, also after a special token."""
    tokenizer = sentencepiece_tokenizer()
    texts, ids = TokenTexts(tokenizer, before), [5, 1, 6, 1, 7, 8]
    offsets = [texts.add(token)[1] for token in ids]
    known = decoded(tokenizer, before)
    ends = [len(decoded(tokenizer, [*before, *ids[:n]])) - len(known) for n in range(len(ids))]
    assert offsets == ends


def test_a_part_of_a_character_has_one_text():
    texts = TokenTexts(TOKENIZER)
    ids = TOKENIZER("a 😀é")["input_ids"]
    likely, added = zip(*[(texts.text(token), texts.add(token)[0]) for token in ids], strict=True)
    assert likely == added
    assert added[0] == "a"
    assert set(added[1:]) <= {" ", REPLACEMENT, f" {REPLACEMENT}"}
    assert added.count(REPLACEMENT) >= 3
