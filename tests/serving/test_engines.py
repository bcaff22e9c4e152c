"""Both engines give each request what its adapters alone give, whatever else is in the batch."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from engines import fail_with_activations, running, send
from leases import PlainLease, attach_some
from tiny_models import build
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoConfig, MptConfig

from lorakit.adapters import handle_of
from lorakit.errors import DataError
from lorakit.evaluation.prompt_batches import only_settings
from lorakit.serving import continuous, threaded_engine
from lorakit.serving.batched import BatchedEngine
from lorakit.serving.continuous import PAGE, ContinuousEngine
from lorakit.serving.engine import End, GenerationRequest, Piece, QueueFullError, Sampling
from lorakit.serving.errors import EngineStoppedError
from lorakit.serving.sampling import Chooser, choose

GREEDY = Sampling(temperature=0)
TOKENIZER = tiny_tokenizer()
CHOICES = [
    (),
    (("a", 1.0),),
    (("b", 1.0),),
    (("c", 1.0),),
    (("a", 0.5), ("b", 0.75)),
    (("b", 1.0),),
]


def model_with_adapters(arch="llama", **settings):
    model = build(arch, vocab_size=len(TOKENIZER), max_position_embeddings=256, **settings)
    model.generation_config.eos_token_id = None
    attach_some(model)
    return model


def make(kind, model, **settings):
    return {"continuous": ContinuousEngine, "batched": BatchedEngine}[kind](
        model, TOKENIZER, **settings
    )


def prompts(count, *, shortest=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, shortest + 45, (count,), generator=generator).tolist()
    return [torch.randint(4, len(TOKENIZER), (n,), generator=generator).tolist() for n in lengths]


def alone(model, prompt, blend, count):
    """The greedy continuation of `generate` with one adapter activated."""
    handle = handle_of(model)
    handle.activate(dict(blend) or None)
    is_encoder_decoder = model.config.is_encoder_decoder
    end = [TOKENIZER.eos_token_id] if is_encoder_decoder else []  # as in training
    ids = model.generate(
        torch.tensor([[*prompt, *end]]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    handle.activate(None)
    return ids[0, 1 if is_encoder_decoder else len(prompt) :].tolist()


@pytest.fixture(params=["continuous", "batched"])
def kind(request):
    return request.param


def test_every_request_gets_what_its_adapters_alone_give(kind):
    model = model_with_adapters()
    expected = [alone(model, p, blend, 12) for p, blend in zip(prompts(6), CHOICES, strict=True)]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    with running(make(kind, model)) as engine:
        sent = [
            send(engine, p, PlainLease(blend, TOKENIZER), 12, sampling=GREEDY)
            for p, blend in zip(prompts(6), CHOICES, strict=True)
        ]
        found = [answer.wait() for answer in sent]
    assert [answer.ids for answer in found] == expected
    assert [answer.end.reason for answer in found] == ["length"] * 6
    assert [answer.text for answer in found] == [
        TOKENIZER.decode(ids, skip_special_tokens=True) for ids in expected
    ]


def test_requests_that_join_later_change_no_answer(monkeypatch):
    monkeypatch.setattr(continuous, "STEP_TOKENS", 16)
    model = model_with_adapters()
    given = prompts(12, seed=1)
    expected = [alone(model, p, CHOICES[i % 6], 4 + i) for i, p in enumerate(given)]
    with running(ContinuousEngine(model, TOKENIZER, running=4)) as engine:
        sent = []
        for i, prompt in enumerate(given):
            sent.append(
                send(engine, prompt, PlainLease(CHOICES[i % 6], TOKENIZER), 4 + i, sampling=GREEDY)
            )
            sent[-1].next()  # the others go on meanwhile
        assert [answer.wait().ids for answer in sent] == expected


def test_a_prefix_is_reused_under_the_same_adapters_only():
    model = model_with_adapters()
    prompt = prompts(1, shortest=3 * PAGE + 1)[0]
    expected = [alone(model, prompt, blend, 6) for blend in CHOICES[:5]]
    with running(ContinuousEngine(model, TOKENIZER)) as engine:
        for _ in range(2):
            found = [
                send(engine, prompt, PlainLease(blend, TOKENIZER), 6, sampling=GREEDY).wait()
                for blend in CHOICES[:5]
            ]
            assert [answer.ids for answer in found] == expected
    assert all(answer.end.cached_tokens == (len(prompt) - 1) // PAGE * PAGE for answer in found)


def test_equal_prompts_that_arrive_together_are_computed_once():
    model = model_with_adapters()
    prompt = prompts(1, shortest=3 * PAGE + 1)[0]
    with running(ContinuousEngine(model, TOKENIZER)) as engine:
        blocker = engine.between_steps(
            lambda: [
                send(engine, prompt, PlainLease((("a", 1.0),), TOKENIZER), 6, sampling=GREEDY)
                for _ in range(3)
            ]
        )
        found = [answer.wait() for answer in blocker.result(60)]
    assert [answer.end.cached_tokens for answer in found] == [
        0,
        *[(len(prompt) - 1) // PAGE * PAGE] * 2,
    ]
    assert len({tuple(answer.ids) for answer in found}) == 1


ON_HEAD = {
    "factors": {"targets": ["q_proj", "lm_head"]},
    "trained": {"targets": "attention.qv", "train_modules": ["lm_head"]},
}


@pytest.mark.parametrize("settings", ON_HEAD.values(), ids=ON_HEAD)
def test_a_batch_with_an_adapter_of_the_head_is_computed_once(settings, caplog):
    """Prompts have several tokens, of which the head computes one."""
    model = build("llama", vocab_size=len(TOKENIZER), tie_word_embeddings=False)
    model.generation_config.eos_token_id = None
    attach_some(model, "ab", **settings)
    attach_some(model, "c")
    given, blends = prompts(4), [(("a", 1.0),), (("b", 1.0),), (("c", 1.0),), ()]
    expected = [alone(model, p, blend, 6) for p, blend in zip(given, blends, strict=True)]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    engine = ContinuousEngine(model, TOKENIZER)
    passes.clear()
    sent = [
        send(engine, p, PlainLease(blend, TOKENIZER), 6, sampling=GREEDY)
        for p, blend in zip(given, blends, strict=True)
    ]
    with running(engine):
        assert [answer.wait().ids for answer in sent] == expected
    assert len(passes) == engine.steps == 6
    assert caplog.messages == []


def test_nan_of_one_adapter_fails_its_requests_alone(kind):
    model = model_with_adapters()
    handle = handle_of(model)
    with torch.no_grad():
        next(iter(handle.modules("b").values())).lora_B.fill_(torch.nan)
    given = prompts(4, seed=2)
    blends = [(("a", 1.0),), (("b", 1.0),), (), (("c", 1.0),)]
    expected = [
        None if i == 1 else alone(model, p, b, 8)
        for i, (p, b) in enumerate(zip(given, blends, strict=True))
    ]
    with running(make(kind, model)) as engine:
        for _ in range(2):  # the second time with pages that had held NaN
            sent = [
                send(engine, p, PlainLease(b, TOKENIZER), 8, sampling=GREEDY)
                for p, b in zip(given, blends, strict=True)
            ]
            found = [answer.wait() for answer in sent]
            assert [a.ids if a.end.reason == "length" else None for a in found] == expected
            assert "NaN" in str(found[1].end.error)
            assert "adapter b" in str(found[1].end.error)


def test_an_error_in_a_layer_fails_its_request_alone(kind, caplog):
    model = model_with_adapters()
    handle = handle_of(model)
    given = prompts(3, seed=3)
    expected = [alone(model, p, CHOICES[i], 5) for i, p in enumerate(given)]

    def refuse(module, x, y, weight=1.0):
        raise RuntimeError("broken adapter")

    broken = next(iter(handle.modules("b").values()))
    broken.low_rank = lambda: None  # through `adapt`
    broken.adapt = refuse
    with running(make(kind, model)) as engine:
        sent = [
            send(engine, p, PlainLease(CHOICES[i], TOKENIZER), 5, sampling=GREEDY)
            for i, p in enumerate(given)
        ]
        found = [answer.wait() for answer in sent]
    assert [a.ids for a in found[:2]] == expected[:2]
    assert found[2].end.reason == "error"
    assert (kind == "continuous") == any("one by one" in text for text in caplog.messages)
    assert "broken adapter" in str(found[2].end.error)


def test_a_request_is_repeated_without_the_tensors_of_failed_passes(kind):
    """A GPU has no memory for both. The receivers still hold the errors of the requests before."""
    engine = make(kind, model_with_adapters())
    living = fail_with_activations(engine.model.lm_head)
    sent = [send(engine, prompt, PlainLease((), TOKENIZER), 3) for prompt in prompts(3)]
    with running(engine):
        ends = [answer.wait().end for answer in sent]
    assert [str(end.error) for end in ends] == ["broken layer"] * 3
    assert living == [0] * 4


@pytest.mark.parametrize("others", [0, 2])
def test_a_token_is_chosen_again_with_the_same_draw_after_memory_ran_out(kind, others, monkeypatch):
    """A choice needs more memory than a decoding step of the model, if the vocabulary is large."""
    model = model_with_adapters()
    given, lease = prompts(3), PlainLease((), TOKENIZER)
    settings = [{"sampling": Sampling(temperature=1.5, seed=i)} for i in range(1 + others)]
    engine = make(kind, model)

    def send_all():
        return [send(engine, p, lease, 6, **s) for p, s in zip(given, settings, strict=False)]

    def answers():
        """All start in one step."""
        return [answer.wait() for answer in engine.between_steps(send_all).result(60)]

    def fail_after_the_draws(*args):
        with monkeypatch.context() as patch:
            patch.setattr(Chooser, "advance", fail)
            return choose(*args)

    def fail(_):
        monkeypatch.setattr(threaded_engine, "choose", choose)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.")

    with running(engine):
        expected = [answer.ids for answer in answers()]
        monkeypatch.setattr(threaded_engine, "choose", fail_after_the_draws)
        found = answers()
        if not others:
            assert isinstance(found[0].end.error, torch.OutOfMemoryError)
            found = answers()
        assert [answer.ids for answer in found] == expected


@pytest.mark.parametrize("during", ["a step", "an action"])
def test_an_engine_whose_device_computes_nothing_any_more_ends(kind, during, monkeypatch):
    model = model_with_adapters()
    engine = make(kind, model)

    def fail(*_):
        monkeypatch.setattr(type(model), "device", torch.device("meta"))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    lease = PlainLease((), TOKENIZER)
    model.lm_head.register_forward_pre_hook(fail)
    if during == "an action":
        engine.score([5, 6], lease)
    sent = [send(engine, prompt, lease, 3) for prompt in prompts(3)]
    with running(engine):
        ends = [answer.wait().end for answer in sent]
        engine._thread.join(5)
        assert not engine.status().is_alive
    assert {type(end.error) for end in ends} == {EngineStoppedError}


class BrokenTokenizer:
    eos_token_id = None

    def decode(self, ids, **options):
        raise RuntimeError("broken tokenizer")


def test_an_error_of_a_tokenizer_fails_its_request_alone(kind):
    model = model_with_adapters()
    given = prompts(2, seed=3)
    expected = alone(model, given[0], (), 5)
    with running(make(kind, model)) as engine:
        good = send(engine, given[0], PlainLease((), TOKENIZER), 5, sampling=GREEDY)
        bad = send(engine, given[1], PlainLease((), BrokenTokenizer()), 5, sampling=GREEDY)
        assert good.wait().ids == expected
        assert "broken tokenizer" in str(bad.wait().end.error)


def test_a_seed_gives_the_same_answer_in_any_batch(kind):
    model = model_with_adapters()
    given = prompts(5, seed=4)
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=30, seed=7)
    with running(make(kind, model)) as engine:
        one = send(
            engine, given[0], PlainLease(CHOICES[1], TOKENIZER), 10, sampling=sampling
        ).wait()
        sent = [
            send(
                engine,
                p,
                PlainLease(CHOICES[i % 3], TOKENIZER),
                10,
                sampling=sampling if i == 1 else Sampling(seed=i),
            )
            for i, p in enumerate([given[1], given[0], *given[2:]])
        ]
        found = [answer.wait() for answer in sent]
    assert found[1].ids == one.ids
    assert found[0].ids != one.ids


def test_log_probabilities_are_those_of_the_model(kind):
    model = model_with_adapters()
    prompt = prompts(1)[0]
    with running(make(kind, model)) as engine:
        lease = PlainLease(CHOICES[1], TOKENIZER)
        found = send(engine, prompt, lease, 6, sampling=GREEDY, top_logprobs=3).wait()
        scores = engine.score([*prompt, *found.ids], lease, start=len(prompt)).result(60)
    assert [t.logprob for t in found.tokens] == pytest.approx(scores, abs=1e-4)
    for token in found.tokens:
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)  # greedy
        assert token.top[0][1] >= token.top[1][1] >= token.top[2][1]


def test_scores_are_computed_in_parts_and_not_of_a_prompt(kind, monkeypatch):
    """All of a long text would take gigabytes of memory for the vocabulary."""
    monkeypatch.setattr(continuous, "SCORED_ROWS", 32)
    model, rows = model_with_adapters(), []
    tokens = prompts(1, shortest=100)[0]
    handle_of(model).activate("a")
    with torch.no_grad():
        scores = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    handle_of(model).activate(None)
    expected = scores.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    with running(make(kind, model)) as engine:
        for count in (len(tokens) - 1, 70, 3, 0):
            rows.clear()
            lease = PlainLease((("a", 1.0),), TOKENIZER)
            found = engine.score(tokens, lease, start=len(tokens) - count).result(60)
            assert found == pytest.approx(expected[len(expected) - count :], abs=1e-4)
            assert max(rows, default=0) <= (32 if kind == "continuous" else count + 1)


def test_stop_texts_and_stop_ids_end_an_answer(kind):
    model = model_with_adapters()
    prompt = prompts(1)[0]
    lease = PlainLease((), TOKENIZER)
    with running(make(kind, model)) as engine:
        whole = send(engine, prompt, lease, 20, sampling=GREEDY).wait()
        middle = len(whole.text) // 2
        stop = whole.text[middle : middle + 3]
        assert stop
        cut = send(engine, prompt, lease, 20, sampling=GREEDY, stop=(stop,)).wait()
        by_id = send(
            engine, prompt, lease, 20, sampling=GREEDY, stop_ids=frozenset({whole.ids[4]})
        ).wait()
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.end.reason == by_id.end.reason == "stop"
    assert by_id.ids == whole.ids[: whole.ids.index(whole.ids[4]) + 1]


def test_the_end_token_of_an_adapters_own_tokenizer_ends_its_answers(kind):
    model = model_with_adapters()
    prompt, own = prompts(1)[0], tiny_tokenizer()
    with running(make(kind, model)) as engine:
        base = send(engine, prompt, PlainLease((), TOKENIZER), 8, sampling=GREEDY).wait()
        own.eos_token = own.convert_ids_to_tokens(base.ids[4])
        found = send(engine, prompt, PlainLease((), own), 8, sampling=GREEDY).wait()
    assert found.ids == base.ids[: base.ids.index(base.ids[4]) + 1]
    assert (base.end.reason, found.end.reason) == ("length", "stop")


def test_a_request_that_waits_for_a_batch_ends_at_the_models_own_end_tokens(kind):
    """The batched engine replaces the model's generation configuration while a batch runs."""
    model = model_with_adapters()
    prompt = prompts(1)[0]
    with running(make(kind, model)) as engine:
        whole = send(engine, prompt, PlainLease((), TOKENIZER), 8, sampling=GREEDY).wait()
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, whole.ids[4]]
    engine = make(kind, model)
    with only_settings(model, GenerationConfig()):
        waiting = send(engine, prompt, PlainLease((), TOKENIZER), 8, sampling=GREEDY)
    with running(engine):
        assert waiting.wait().ids == whole.ids[: whole.ids.index(whole.ids[4]) + 1]


def test_a_cancelled_request_ends_and_the_others_go_on(kind):
    model = model_with_adapters()
    given = prompts(2)
    expected = alone(model, given[1], (), 60)
    with running(make(kind, model)) as engine:
        sent = [send(engine, p, PlainLease((), TOKENIZER), 60, sampling=GREEDY) for p in given]
        assert isinstance(sent[0].next(), Piece)
        sent[0].ticket.cancel()
        assert sent[0].wait().end.reason == "cancelled"
        assert len(sent[0].ids) < 60
        assert sent[1].wait().ids == expected
        assert engine.status().running == 0


def test_no_adapter_starves_the_others():
    model = model_with_adapters()
    prompt, order = prompts(1)[0], []
    with running(ContinuousEngine(model, TOKENIZER, running=1)) as engine:

        def deliver(i):
            return lambda event: order.append(i) if isinstance(event, End) else None

        def fill():
            for i, name in enumerate("aaaab"):
                lease = PlainLease(((name, 1.0),), TOKENIZER)
                engine.submit(
                    GenerationRequest(prompt=prompt, lease=lease, max_tokens=2), deliver(i)
                )

        engine.between_steps(fill).result(60)
        send(engine, prompt, PlainLease((("a", 1.0),), TOKENIZER), 2).wait()
    assert order == [0, 4, 1, 2, 3]


def test_the_queue_is_bounded():
    model = model_with_adapters()
    with running(ContinuousEngine(model, TOKENIZER, running=1, queue=2)) as engine:

        def fill():
            for _ in range(2):
                send(engine, [5, 6], PlainLease((), TOKENIZER), 4)
            with pytest.raises(QueueFullError, match="2 requests wait"):
                send(engine, [5, 6], PlainLease((), TOKENIZER), 4)

        engine.between_steps(fill).result(60)


def test_all_answers_of_a_request_find_room_in_the_queue(kind):
    engine = make(kind, model_with_adapters(), running=1, queue=2)
    one, other = (PlainLease((("a", 1.0),), TOKENIZER) for _ in range(2))
    sent = [send(engine, [5, 6], one, 2, sampling=GREEDY) for _ in range(5)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        send(engine, [5, 6], other, 2)
    with running(engine):
        assert {len(answer.wait().ids) for answer in sent} == {2}


SHORT = {
    "gpt-neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=40,
    ),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=40),
}


@pytest.mark.parametrize("arch", SHORT)
def test_a_batch_stays_within_the_context(arch):
    """Alone, each of these requests fits; together, the long prompt would get as many tokens as the short one."""
    SHORT[arch].vocab_size = len(TOKENIZER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHORT[arch]).eval()
    model.generation_config.eos_token_id = None
    attach_some(model, targets="all-linear")
    context = 40
    given = [([5] * (context - 4), 4), ([6, 7], context - 8), ([8, 9], 3)]
    expected = [alone(model, prompt, (("a", 1.0),), count) for prompt, count in given]
    engine = BatchedEngine(model, TOKENIZER)
    assert engine.limits.context == context
    lease = PlainLease((("a", 1.0),), TOKENIZER)
    sent = [send(engine, p, lease, count, sampling=GREEDY) for p, count in given]
    with running(engine):
        found = [answer.wait() for answer in sent]
    assert [answer.end.error for answer in found] == [None] * 3
    assert [answer.ids for answer in found] == expected


def test_a_request_beyond_the_context_is_refused(kind):
    model = model_with_adapters()
    with running(make(kind, model)) as engine:
        with pytest.raises(DataError, match="exceeds the context of 256"):
            send(engine, [5] * 250, PlainLease((), TOKENIZER), 7)
        with pytest.raises(DataError, match="empty"):
            send(engine, [], PlainLease((), TOKENIZER), 7)


def test_a_token_without_an_embedding_is_refused(kind):
    with running(make(kind, model_with_adapters())) as engine:
        with pytest.raises(DataError, match="token id 320, and the base has 320 tokens"):
            send(engine, [5, len(TOKENIZER)], PlainLease((), TOKENIZER))
        assert send(engine, [5, len(TOKENIZER) - 1], PlainLease((), TOKENIZER)).wait().tokens


def test_a_small_cache_serves_one_request_after_the_other():
    model = model_with_adapters()
    given = prompts(6, seed=5)
    expected = [alone(model, p, CHOICES[i], 10) for i, p in enumerate(given)]
    # 2 layers x keys and values x 2 heads of width 8 in float32: 256 bytes for a token
    with running(ContinuousEngine(model, TOKENIZER, cache_bytes=256 * 96)) as engine:
        sent = [
            send(engine, p, PlainLease(CHOICES[i], TOKENIZER), 10, sampling=GREEDY)
            for i, p in enumerate(given)
        ]
        assert [answer.wait().ids for answer in sent] == expected
        assert engine._pool.available == engine._pool.count


def test_closing_ends_every_request_with_an_error(kind):
    model = model_with_adapters()
    engine = make(kind, model)
    with running(engine):
        sent = [send(engine, [5, 6, 7], PlainLease((), TOKENIZER), 200) for _ in range(3)]
        sent[0].next()
    ends = [answer.wait().end for answer in sent]
    assert all(end.reason in ("error", "length") for end in ends)
    assert any("shut down" in str(end.error) for end in ends)
    assert not engine.status().is_alive
    with pytest.raises(EngineStoppedError, match="shutting down"):
        send(engine, [5], PlainLease((), TOKENIZER), 3)


def test_a_score_is_not_followed_by_a_wait(kind, monkeypatch):
    monkeypatch.setattr(threaded_engine, "FOLLOWED", 60)
    with running(make(kind, model_with_adapters())) as engine:
        first, second = (
            engine.score([5, 6, 7], PlainLease((), TOKENIZER)).result(20) for _ in range(2)
        )
    assert first == second


def test_a_cancelled_request_does_not_wait_for_its_turn(kind):
    """Its place in the queue, its lease and its key's tokens are free before the running request ends."""
    model = model_with_adapters()
    with running(make(kind, model, running=1)) as engine:
        first = send(engine, [5, 6, 7], PlainLease((), TOKENIZER), 200, sampling=GREEDY)
        first.next()
        second = send(engine, [5, 6, 7], PlainLease((), TOKENIZER), 3)
        second.ticket.cancel()
        assert second.wait().end.reason == "cancelled"
        assert engine.status().running == 1
        first.ticket.cancel()


def test_a_dead_thread_is_reported(kind, monkeypatch, caplog):
    model = model_with_adapters()
    engine = make(kind, model)
    monkeypatch.setattr(engine, "_advance", lambda: 1 / 0)
    with running(engine):
        engine._thread.join(60)
        assert not engine.status().is_alive
        assert "ZeroDivisionError" in caplog.text
        lease = PlainLease((), TOKENIZER)
        for attempt in (lambda: send(engine, [5], lease, 3), lambda: engine.score([5, 6], lease)):
            with pytest.raises(EngineStoppedError, match="has failed") as raised:
                attempt()
            assert "ZeroDivisionError" not in str(raised.value)  # clients read it


def test_adapters_change_between_steps():
    model = model_with_adapters()
    handle = handle_of(model)
    prompt = prompts(1)[0]
    expected = alone(model, prompt, (("a", 1.0),), 60)
    with running(ContinuousEngine(model, TOKENIZER)) as engine:
        sent = send(engine, prompt, PlainLease((("a", 1.0),), TOKENIZER), 60, sampling=GREEDY)
        sent.next()
        engine.between_steps(lambda: handle.remove("b")).result(60)
        engine.between_steps(lambda: attach_some(model, "d")).result(60)
        assert sent.wait().ids == expected
        found = send(
            engine, prompt, PlainLease((("d", 1.0),), TOKENIZER), 8, sampling=GREEDY
        ).wait()
    assert found.ids == alone(model, prompt, (("d", 1.0),), 8)


class ActionError(Exception):
    pass


@pytest.mark.parametrize("error", [ActionError, torch.OutOfMemoryError])
def test_a_failed_action_leaves_no_tensor_behind(error, monkeypatch):
    tensors, freed = [], []
    monkeypatch.setattr(threaded_engine, "free_memory", lambda: freed.append(True))

    def fail():
        tensor = torch.zeros(2)
        tensors.append(weakref.ref(tensor))
        raise error("CUDA out of memory.")

    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        gc.disable()
        try:
            failure = engine.between_steps(fail).exception(60)
            assert tensors[0]() is None
            failure = weakref.ref(failure)
            engine.between_steps(lambda: None).result(60)  # the first is over
            assert failure() is None
        finally:
            gc.enable()
    assert bool(freed) == (error is torch.OutOfMemoryError)


def test_the_step_after_an_action_waits_for_the_request_that_needed_it(monkeypatch):
    monkeypatch.setattr(threaded_engine, "FOLLOWED", 30.0)
    given = prompts(2)
    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        sent = send(engine, given[0], PlainLease((), TOKENIZER), 150, sampling=GREEDY)
        sent.next()
        steps = engine.between_steps(lambda: engine.steps).result(60)
        time.sleep(0.1)
        assert engine.steps == steps
        send(engine, given[1], PlainLease((("a", 1.0),), TOKENIZER), 1, sampling=GREEDY).wait()
        sent.wait()
