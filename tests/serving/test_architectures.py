"""Which architectures run on which engine, and that both compute what `generate` does."""

from __future__ import annotations

import pytest
from engines import running, send
from leases import PlainLease, attach_some
from test_engines import GREEDY, TOKENIZER, alone, prompts
from tiny_models import ENCODER_DECODERS, build

from lorakit.adapters import handle_of
from lorakit.serving.choosing import engine_for

CONTINUOUS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gpt2",
    "opt",
    "gpt-neox",
    "gemma3",
    "smollm3",
    "granite",
]
BATCHED = ["gemma2", "bloom", "t5", "bart"]


def until_end(ids):
    end = TOKENIZER.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*CONTINUOUS, *BATCHED])
def test_the_answers_are_those_of_generate(arch):
    model = build(arch, vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    attach_some(model, "ab")
    handle = handle_of(model)
    given = [p[:20] for p in prompts(3, seed=6)]
    blends = [(), (("a", 1.0),), (("b", 1.0),)]
    expected = [alone(model, p, b, 10) for p, b in zip(given, blends, strict=True)]
    engine = engine_for(model, TOKENIZER)
    assert engine.name == ("continuous" if arch in CONTINUOUS else "batched"), engine.notice
    with running(engine):
        sent = [
            send(engine, p, PlainLease(b, TOKENIZER), 10, sampling=GREEDY)
            for p, b in zip(given, blends, strict=True)
        ]
        found = [answer.wait() for answer in sent]
    assert [answer.ids for answer in found] == [until_end(ids) for ids in expected]
    assert handle.active == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"forced_bos_token_id": 7}, {"repetition_penalty": 5.0}], ids=str
)
@pytest.mark.parametrize("arch", ENCODER_DECODERS)
def test_an_encoder_decoder_scores_the_tokens_that_it_has_chosen(arch, settings):
    model = build(arch, vocab_size=len(TOKENIZER))
    model.generation_config.update(**settings)
    attach_some(model, "a")
    lease = PlainLease((("a", 1.0),), TOKENIZER)
    prompt = prompts(1, seed=6)[0][:20]
    engine = engine_for(model, TOKENIZER)
    with running(engine):
        answer = send(engine, prompt, lease, 10, sampling=GREEDY, top_logprobs=0).wait()
        scores, base = (
            engine.score([*prompt, *answer.ids], one, start=len(prompt)).result(60)
            for one in (lease, PlainLease((), TOKENIZER))
        )
    assert (answer.ids[0] == 7) == ("forced_bos_token_id" in settings)
    assert scores == pytest.approx([token.logprob for token in answer.tokens], abs=1e-4)
    assert scores != pytest.approx(base, abs=1e-2)
