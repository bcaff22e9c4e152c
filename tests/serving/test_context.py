"""How many tokens a request may have, and that no request of that length changes another's answer."""

from __future__ import annotations

import pytest
import torch
from batch_sensitive_models import SHORT, longrope_model
from engines import running, send
from leases import PlainLease
from stores import open_base
from test_engines import GREEDY, TOKENIZER, make
from tiny_models import build
from tiny_tokenizer import tiny_tokenizer

from lorakit.errors import DataError
from lorakit.serving.choosing import engine_for
from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.context import UNSTATED


@pytest.mark.parametrize("kind", ["continuous", "batched"])
def test_a_long_request_changes_no_other_answer_under_longrope(kind) -> None:
    prompt, lease = [5, 6, 7, 8, 9], PlainLease((), TOKENIZER)
    model = longrope_model()
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    engine = make(kind, model)
    other = send(engine, [4] * (engine.limits.context - 8), lease, 8, sampling=GREEDY)
    sent = send(engine, prompt, lease, 8, sampling=GREEDY)
    with running(engine):
        assert sent.wait().ids == expected[0, 5:].tolist()
        assert other.wait().end.reason == "length"


@pytest.mark.parametrize("kind", ["continuous", "batched"])
def test_longrope_limits_the_context_to_its_short_factors(kind) -> None:
    engine = make(kind, longrope_model())
    assert engine.limits.context == SHORT
    assert "at most 64 of the 256 tokens" in engine.notice


@pytest.mark.parametrize("arch", ["t5", "bloom"])
def test_a_model_that_states_no_context_has_a_bounded_one(arch) -> None:
    model, short = build(arch, vocab_size=len(TOKENIZER)), tiny_tokenizer()
    short.model_max_length = 512
    assert engine_for(model, TOKENIZER).limits.context == UNSTATED
    assert engine_for(model, short).limits.context == 512
    assert engine_for(model, short, prompt_tokens=100).limits.context == 512
    engine = engine_for(model, short, prompt_tokens=600)
    assert engine.limits.context == 601
    assert "states no context, so requests have at most 601 tokens" in engine.notice
    with pytest.raises(DataError, match="exceeds the context of 601"):
        send(engine, [5] * 601, PlainLease((), TOKENIZER), 1)


def test_a_classifier_that_states_no_context_has_a_bounded_one() -> None:
    base = open_base("deberta-v2", position_biased_input=False)
    engine = ClassifyingEngine(base, running=4, queue=4)
    assert engine.limits.context == UNSTATED
    assert "states no context" in engine.notice
    assert ClassifyingEngine(base, running=4, queue=4, prompt_tokens=5000).limits.context == 5001
