"""Verification finds answers of other adapters than those of the receipt, and no others."""

from __future__ import annotations

import dataclasses
import logging
import time
from types import SimpleNamespace

import pytest
import torch
from engines import running, send
from leases import PlainLease
from test_engines import CHOICES, TOKENIZER, model_with_adapters, prompts

from lorakit.serving import continuous
from lorakit.serving.continuous import PAGE, ContinuousEngine
from lorakit.serving.engine import Receipt, Sampling
from lorakit.serving.verification import Verdict, Verifier, bound_for


@pytest.fixture
def verdicts():
    return []


def verified(engine, verdicts, share=1.0, seed=None, **settings):
    """An object for `send` that submits requests as the server does."""

    def report(receipt, verdict):
        assert verdict is None or verdict.receipt == receipt
        verdicts.append(verdict)

    verifier = Verifier(engine, share, report=report, **settings)
    verifier._random.seed(seed)
    return SimpleNamespace(submit=lambda *arguments: engine.submit(*verifier.watch(*arguments)))


def wait_for(verdicts, count):
    end = time.monotonic() + 60
    while len(verdicts) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return verdicts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_agrees_and_another_adapter_does_not(dtype):
    """On SmolLM2-135M right answers differ by up to 0.09, and those of another adapter by 0.25 and more."""

    def agrees(difference):
        alone, served = (-1.0, -2.0), (-1.0 + difference, -2.0 - difference)
        return Verdict(Receipt("base", ()), served, alone, bound_for(dtype)).agrees

    assert agrees(0.09)
    assert not agrees(0.25)


def test_right_answers_agree(verdicts):
    given = prompts(6, shortest=2 * PAGE)
    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        sent = [
            send(
                verified(engine, verdicts),
                p,
                PlainLease(CHOICES[i], TOKENIZER),
                8,
                sampling=Sampling(seed=i),
            )
            for i, p in enumerate(given)
        ]
        for answer in sent:
            answer.wait()
        assert all(verdict.agrees for verdict in wait_for(verdicts, 6))
    leases = [answer.ticket.request.lease for answer in sent]
    assert [[shared.released for shared in lease.shared] for lease in leases] == [[1]] * 6


def test_a_prefix_reused_across_adapters_is_found(verdicts, monkeypatch, caplog):
    monkeypatch.setattr(continuous, "salt_of", lambda lease: "the same for all")
    prompt = prompts(1, shortest=3 * PAGE)[0]
    with (
        running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine,
        caplog.at_level(logging.ERROR),
    ):
        for blend in CHOICES[:3]:
            send(verified(engine, verdicts), prompt, PlainLease(blend, TOKENIZER), 8).wait()
        assert [verdict.agrees for verdict in wait_for(verdicts, 3)] == [True, False, False]
    assert "does not agree with its receipt base=base;a=a" in caplog.text


def test_an_answer_of_another_adapter_is_found(verdicts):
    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        submit = engine.submit

        def confuse(request, deliver):
            other = PlainLease((("b", 1.0),), TOKENIZER)
            return submit(dataclasses.replace(request, lease=other), deliver)

        engine.submit = confuse
        send(
            verified(engine, verdicts), prompts(1)[0], PlainLease((("a", 1.0),), TOKENIZER), 8
        ).wait()
        assert not wait_for(verdicts, 1)[0].agrees


def test_a_share_is_replayed(verdicts):
    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        some = verified(engine, verdicts, share=0.25, seed=1)
        sent = [send(some, [5, 6, 7], PlainLease((), TOKENIZER), 2) for _ in range(80)]
        for answer in sent:
            answer.wait()
        engine.between_steps(lambda: None).result(60)
    assert 8 <= len(verdicts) <= 32


def test_an_answer_that_is_not_replayed_is_reported(verdicts, caplog):
    with running(ContinuousEngine(model_with_adapters(), TOKENIZER)) as engine:
        busy = verified(engine, verdicts, pending=0)
        send(busy, [5, 6, 7], PlainLease((), TOKENIZER), 2).wait()
        assert wait_for(verdicts, 1) == [None]
        engine.score = lambda *_, **__: engine.between_steps(lambda: 1 / 0)
        for count in (2, 3):
            only_one = verified(engine, verdicts, pending=1)
            send(only_one, [5, 6, 7], PlainLease((), TOKENIZER), 2).wait()
            assert wait_for(verdicts, count) == [None] * count
    assert "An answer could not be replayed: division by zero" in caplog.text
