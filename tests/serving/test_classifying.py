"""The queue of the classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import fail_with_activations, running
from leases import PlainLease, attach_some
from stores import open_base

from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.engine import QueueFullError
from lorakit.serving.errors import EngineStoppedError
from lorakit.tasks import LabelledExample

TEXT = LabelledExample(prompt="", completion="", input_ids=[5, 6], label=0)


def test_no_adapter_starves_the_others() -> None:
    base = open_base("bert")
    attach_some(base.model, "ab")
    engine = ClassifyingEngine(base, running=2, queue=9)
    futures, order = [], []
    for name, count in (("a", 4), ("a", 4), ("b", 1)):
        lease = PlainLease(((name, 1.0),), base.tokenizer)
        future = engine.classify([TEXT] * count, lease)
        future.add_done_callback(lambda _, name=name: order.append(name))
        futures.append(future)
    with running(engine):
        for future in futures:
            assert future.result(60).isfinite().all()
    assert order == ["b", "a", "a"]
    assert engine.steps == 5


def test_a_cancelled_request_is_computed_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base("bert", "sequence-classification")
    engine = ClassifyingEngine(base, running=2, queue=9)
    lease = PlainLease((), base.text_tokenizer)
    cancelled, other = (engine.classify([TEXT] * count, lease) for count in (8, 1))
    compute = engine._compute

    def cancel_and_compute(batch: Any) -> None:
        cancelled.cancel()
        compute(batch)

    monkeypatch.setattr(engine, "_compute", cancel_and_compute)
    with running(engine):
        assert other.result(60).isfinite().all()
    assert cancelled.cancelled()
    assert engine.steps == 2


def test_a_request_that_is_cancelled_while_it_waits_leaves_its_place() -> None:
    base = open_base("bert", "sequence-classification")
    engine = ClassifyingEngine(base, running=2, queue=1)
    lease = PlainLease((), base.text_tokenizer)
    waiting = engine.classify([TEXT], lease)
    with pytest.raises(QueueFullError):
        engine.classify([TEXT], lease)
    waiting.cancel()
    assert engine.status().waiting == 0
    engine.classify([TEXT], lease)


def test_a_request_is_repeated_without_the_tensors_of_failed_passes() -> None:
    base = open_base("bert", "sequence-classification")
    engine = ClassifyingEngine(base, running=9, queue=9)
    living = fail_with_activations(base.model.classifier)
    lease = PlainLease((), base.text_tokenizer)
    futures = [engine.classify([TEXT], lease) for _ in range(3)]
    with running(engine):
        errors = [str(future.exception(60)) for future in futures]
    assert errors == ["broken layer"] * 3
    assert living == [0] * 4


def test_an_engine_whose_device_computes_nothing_any_more_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = open_base("bert", "sequence-classification")
    engine = ClassifyingEngine(base, running=9, queue=9)

    def fail(*_: Any) -> None:
        monkeypatch.setattr(type(base.model), "device", torch.device("meta"))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    base.model.classifier.register_forward_pre_hook(fail)
    futures = [engine.classify([TEXT], PlainLease((), base.text_tokenizer)) for _ in range(3)]
    with running(engine):
        errors = {type(future.exception(60)) for future in futures}
        engine._thread.join(5)
        assert not engine.status().is_alive
    assert errors == {EngineStoppedError}
