"""The queue of the classifier."""

from __future__ import annotations

from engines import running
from leases import PlainLease, attach_some
from stores import open_base

from lorakit.serving.classifying import ClassifyingEngine
from lorakit.tasks import LabelledExample


def test_no_adapter_starves_the_others() -> None:
    base = open_base("bert")
    attach_some(base.model, "ab")
    text = LabelledExample(prompt="", completion="", input_ids=[5, 6], label=0)
    engine = ClassifyingEngine(base, running=2, queue=9)
    futures, order = [], []
    for name, count in (("a", 4), ("a", 4), ("b", 1)):
        lease = PlainLease(((name, 1.0),), base.tokenizer)
        future = engine.classify([text] * count, lease)
        future.add_done_callback(lambda _, name=name: order.append(name))
        futures.append(future)
    with running(engine):
        for future in futures:
            assert future.result(60).isfinite().all()
    assert order == ["b", "a", "a"]
    assert engine.steps == 5
