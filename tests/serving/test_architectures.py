"""Which architectures run on which engine, and that both compute what `generate` does."""

from __future__ import annotations

import pytest
import torch
import transformers
from batch_sensitive_models import READS_PADDING, spread
from engines import running, send
from leases import PlainLease, attach_some
from test_engines import GREEDY, TOKENIZER, alone, prompts
from tiny_models import ARCHITECTURES, ENCODER_DECODERS, RELATIVES, build

from lorakit.adapters import handle_of
from lorakit.errors import DataError
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
    engine = engine_for(model, TOKENIZER, running=64)
    assert engine.limits.running == 64
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
@pytest.mark.parametrize("arch", ["mixtral", "Qwen2Moe", "GptOss"])
def test_each_request_has_its_own_adapters_on_the_experts(arch):
    model = build_mixture(arch)
    attach_some(model, "ab", targets="all-linear")
    given = [p[:20] for p in prompts(4, seed=6)]
    blends = [(("a", 1.0),), (), (("b", 1.0),), (("a", 0.5), ("b", 0.5))]
    expected = [alone(model, p, b, 8) for p, b in zip(given, blends, strict=True)]
    assert len({*map(tuple, expected)}) == len(expected)
    with running(engine_for(model, TOKENIZER)) as engine:
        sent = [
            send(engine, p, PlainLease(b, TOKENIZER), 8, sampling=GREEDY)
            for p, b in zip(given, blends, strict=True)
        ]
        found = [answer.wait() for answer in sent]
    assert [answer.ids for answer in found] == [until_end(ids) for ids in expected]


def build_mixture(arch):
    """Return a tiny mixture of experts that generates."""
    config = (ARCHITECTURES | RELATIVES)[arch]()
    config.vocab_size, config.eos_token_id = len(TOKENIZER), None
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


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


@pytest.mark.parametrize("arch", ["llama", "bart"])
@pytest.mark.parametrize("rule", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
def test_the_base_bans_its_tokens_and_their_scores_stay_the_models(rule, arch):
    """Also a bad word of several tokens, in prompts of different lengths, and after a forced token."""
    model = build(arch, vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    attach_some(model, "a")
    given, own = [p[:20] for p in prompts(3)], model.generation_config
    own.forced_bos_token_id = 7 if arch == "bart" else None
    first, second, third = alone(model, given[0], (), 3)
    own.update(
        **{
            rule: [[first, second], [third]]
            if rule == "bad_words_ids"
            else [*{first, second} - {7}]
        }
    )
    expected = [alone(model, prompt, (), 6) for prompt in given]
    engine, lease = engine_for(model, TOKENIZER), PlainLease((), TOKENIZER)
    with running(engine):
        sent = [send(engine, p, lease, 6, sampling=GREEDY, top_logprobs=0) for p in given]
        answers = [answer.wait() for answer in sent]
        scores = engine.score([*given[0], *answers[0].ids], lease, start=len(given[0])).result(60)
    assert [answer.ids for answer in answers] == [until_end(ids) for ids in expected]
    assert answers[0].ids[:3] != [first, second, third]
    assert scores == pytest.approx([token.logprob for token in answers[0].tokens], abs=1e-4)


def test_rules_for_tokens_that_the_base_lacks_and_a_decoder_that_starts_with_bos():
    model = build("bart", vocab_size=len(TOKENIZER))
    attach_some(model, "a")
    own, lacking = model.generation_config, len(TOKENIZER)
    own.update(decoder_start_token_id=None, bos_token_id=2, eos_token_id=None)
    first, *_ = alone(model, prompts(1)[0][:20], (), 1)
    own.update(suppress_tokens=[first, lacking], begin_suppress_tokens=[lacking])
    own.update(bad_words_ids=[[5, lacking]])
    engine = engine_for(model, TOKENIZER)
    with running(engine):
        lease = PlainLease((), TOKENIZER)
        answer = send(engine, prompts(1)[0][:20], lease, 4, sampling=GREEDY).wait()
    assert len(answer.ids) == 4
    assert first not in answer.ids


_SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MASKED = {
    "a chunk": transformers.Llama4TextConfig(
        **_SIZES,
        intermediate_size_mlp=32,
        head_dim=8,
        attention_chunk_size=48,
        num_local_experts=2,
    ),
    "a window": transformers.PhimoeConfig(**_SIZES, num_local_experts=2, sliding_window=48),
    "a window of some layers": transformers.Qwen2MoeConfig(
        **_SIZES,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=2,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=48,
        max_window_layers=1,
    ),
}
"""Windows that the layers do not pass to the attention. They are longer than the prompts of the engine's trial."""


@pytest.mark.parametrize("name", MASKED)
def test_a_window_that_only_the_mask_has_is_kept(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MASKED[name]).eval()
    prompt = prompts(1, shortest=60)[0]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
    engine = engine_for(model, TOKENIZER)
    with running(engine):
        lease = PlainLease((), TOKENIZER)
        (token,) = send(engine, prompt, lease, 1, sampling=GREEDY, top_logprobs=0).wait().tokens
    assert token.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert engine.name == "batched"


@pytest.mark.parametrize("name", READS_PADDING)
def test_a_model_that_reads_padding_answers_each_prompt_as_alone(name):
    config, notice = READS_PADDING[name]
    model, lease = spread(config), PlainLease((), TOKENIZER)
    model.generation_config.eos_token_id = None
    given = [prompt[:n] for prompt, n in zip(prompts(3, shortest=12), (5, 12, 12), strict=True)]
    engine = engine_for(model, TOKENIZER)
    settings = {"sampling": GREEDY, "top_logprobs": 0}
    with running(engine):
        alone = [send(engine, prompt, lease, 6, **settings).wait() for prompt in given]
        before = engine.steps
        sent = engine.between_steps(
            lambda: [send(engine, prompt, lease, 6, **settings) for prompt in given]
        ).result(60)
        together = [answer.wait() for answer in sent]
    assert notice in engine.notice
    assert engine.steps - before == 6 * (3 if "alone" in notice else 2)
    for one, other in zip(alone, together, strict=True):
        assert other.ids == one.ids
        logprobs = ([token.logprob for token in answer.tokens] for answer in (one, other))
        assert next(logprobs) == pytest.approx(next(logprobs), abs=1e-4)


def test_a_window_that_no_layer_has_leaves_continuous_batching():
    settings = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}
    config = transformers.Qwen2Config(**_SIZES, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    engine = engine_for(model, TOKENIZER)
    assert (engine.name, engine.notice) == ("continuous", None)


def test_an_encoder_decoder_has_a_context_for_its_input_and_one_for_its_answer():
    """As in `lorakit generate`. The encoder also reads an end token."""
    model = build("bart", vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    attach_some(model, "a")
    engine = engine_for(model, TOKENIZER)
    context = engine.limits.context
    lease, longest = PlainLease((), TOKENIZER), [5, 6, 7] * context
    expected = [alone(model, longest[:n], (), context) for n in (context - 1, 3)]
    sent = [
        send(engine, longest[:n], lease, context, sampling=GREEDY, top_logprobs=0)
        for n in (context - 1, 3)
    ]
    for length, new in ((context, 1), (3, context + 1)):
        with pytest.raises(DataError, match="exceeds the context of 64"):
            send(engine, longest[:length], lease, new)
    with running(engine):
        answers = [answer.wait() for answer in sent]
        scores = engine.score([*longest[:3], *answers[1].ids], lease, start=3).result(60)
    assert [answer.ids for answer in answers] == [until_end(ids) for ids in expected]
    assert engine.steps <= context
    assert scores == pytest.approx([token.logprob for token in answers[1].tokens], abs=1e-4)
