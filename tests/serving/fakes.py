"""A small engine, store and classifier, whose answers and faults tests choose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

from lorakit.errors import LorakitError
from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.engine import (
    End,
    EngineStatus,
    Event,
    GenerationRequest,
    Limits,
    Piece,
    QueueFullError,
    Receipt,
    Token,
)
from lorakit.serving.errors import UnknownAdapterError

TEXT = " The river pub serves cheap food."
DIGESTS = {"sql": "a" * 64, "e2e": "b" * 64, "mrpc": "c" * 64, "stsb": "d" * 64}
BASE_DIGEST = "f" * 64


class FakeLease:
    def __init__(self, store: FakeStore, choice: Any) -> None:
        weights = (
            {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
        )
        self.blend = tuple((f"{name}@{DIGESTS.get(name, name)}", w) for name, w in weights.items())
        self.receipt = Receipt(
            BASE_DIGEST, tuple((name, DIGESTS.get(name, name), w) for name, w in weights.items())
        )
        self.tokenizer = store.tokenizer
        self.releases = 0
        record = store.records.get(str(choice), {})
        self.labels = tuple(record.get("labels", ()))
        self.outputs = record.get("outputs")
        self.task = record.get("task")

    def release(self) -> None:
        self.releases += 1


class FakeStore:
    def __init__(self, records: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.tokenizer = tiny_tokenizer()
        self.records = dict(
            records or {"e2e": {"task": "completion"}, "sql": {"task": "completion"}}
        )
        self.leases: list[FakeLease] = []
        self.fails: Exception | None = None
        self.hold: threading.Event | None = None
        self.pinned: frozenset[str] = frozenset()

    def are_pinned(self, names: Any) -> bool:
        return self.pinned.issuperset(names)

    def names(self) -> list[str]:
        return sorted(self.records)

    def acquire(self, choice: Any) -> FakeLease:
        if self.hold is not None:
            self.hold.wait(10)
        if self.fails is not None:
            raise self.fails
        names = [] if choice is None else [choice] if isinstance(choice, str) else list(choice)
        for name in names:
            if name not in self.records:
                raise UnknownAdapterError(f"No adapter is named '{name}'. Known: secret.")
        lease = FakeLease(self, choice)
        self.leases.append(lease)
        return lease

    def add(self, name: str, path: Any, *, replace: bool, allows: Callable[[str], bool]) -> None:
        if self.fails is not None:
            raise self.fails
        if "/" in str(path) or not allows(path):
            raise LorakitError(f"'{path}' is outside the folder of adapters.")
        self.records[name] = {"task": "completion", "path": f"/adapters/{path}"}

    def remove(self, name: str) -> None:
        if name not in self.records:
            raise UnknownAdapterError(f"There is no adapter '{name}'. Known: secret.")
        del self.records[name]

    def describe(self, name: str) -> dict[str, Any]:
        return {"path": f"/private/adapters/{name}", "rank": 8, **self.records[name]}

    def describe_base(self) -> dict[str, Any]:
        return {"digest": BASE_DIGEST, "kind": "text", "chat": True, "dtype": "float32"}

    def report(self, name: str) -> Path | None:
        return self.records[name].get("report")

    def stats(self) -> Any:
        return SimpleNamespace(loaded=2, bytes=1000, budget=2000, loads=3, evictions=1, leases=0)

    @property
    def all_released_once(self) -> bool:
        return all(lease.releases == 1 for lease in self.leases)


@dataclass
class FakeTicket:
    request: GenerationRequest
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Answers each request in a thread of its own, token by token."""

    name, notice = "fake", None

    def __init__(self, *, context: int = 256, queue: int = 8) -> None:
        self.limits = Limits(context=context, queue=queue, running=4)
        self.tickets: list[FakeTicket] = []
        self.text: Callable[[GenerationRequest], str] = lambda request: TEXT
        self.pause: threading.Event | None = None
        """Each answer waits for it after its first token."""
        self.is_full = False
        self.fails_after: int | None = None
        """Tokens before the answer ends with `error`."""
        self.error: Exception = LorakitError("The logits are not finite.")
        self.refuses: Exception | None = None
        self.is_alive = True
        self.scored: list[tuple[list[int], FakeLease, int]] = []
        """Arguments of each call of `score`."""
        self.scores: list[Future[list[float]]] = []
        """Their results; the tests set them if `holds_scores`."""
        self.holds_scores = False

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], Any]) -> FakeTicket:
        if self.refuses is not None:
            raise self.refuses
        if self.is_full:
            raise QueueFullError
        ticket = FakeTicket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket, deliver), daemon=True).start()
        return ticket

    def _answer(self, ticket: FakeTicket, deliver: Callable[[Event], Any]) -> None:
        request, count = ticket.request, 0
        tokenizer = request.lease.tokenizer
        ids = tokenizer(self.text(request), add_special_tokens=False)["input_ids"]
        for token in ids[: request.max_tokens]:
            if ticket.cancelled.is_set():
                return deliver(End("cancelled", count))
            if self.fails_after == count:
                return deliver(End("error", count, error=self.error))
            wants = request.top_logprobs
            top = tuple((i, -float(i)) for i in range(10, 10 + (wants or 0)))
            own = Token(token, None if wants is None else -0.5, top)
            deliver(Piece(tokenizer.decode([token]), (own,)))
            count += 1
            if self.pause is not None:
                while not self.pause.wait(0.01) and not ticket.cancelled.is_set():
                    pass
        reason = (
            "cancelled"
            if ticket.cancelled.is_set()
            else "stop"
            if len(ids) <= request.max_tokens
            else "length"
        )
        deliver(End(reason, count, cached_tokens=min(2, len(request.prompt))))
        return None

    def score(self, tokens: Sequence[int], lease: Any, *, start: int = 1) -> Future[list[float]]:
        if self.refuses is not None:
            raise self.refuses
        assert lease.releases == 0
        self.scored.append((list(tokens), lease, start))
        self.scores.append(future := Future())
        if not self.holds_scores:
            threading.Timer(0.01, future.set_result, [score_of(tokens[start:])]).start()
        return future

    def status(self) -> EngineStatus:
        return EngineStatus(self.is_alive, 1, 2, 0.5, 10, 20)


def score_of(tokens: Sequence[int]) -> list[float]:
    """Return what `FakeEngine.score` finds for tokens."""
    return [-(token % 8) / 8 for token in tokens]


class FakeClassifier(FakeEngine, ClassifyingEngine):
    """The first output of each row is its number of tokens, the others are 0. Texts are those of `FakeEngine`."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.outputs = outputs

    def classify(self, examples: Sequence[Any], lease: Any) -> Future[torch.Tensor]:
        if self.refuses is not None:
            raise self.refuses
        logits = torch.zeros(len(examples), self.outputs)
        logits[:, 0] = torch.tensor([float(len(e)) for e in examples])
        future: Future[torch.Tensor] = Future()
        threading.Timer(0.01, future.set_result, [logits]).start()
        return future


def classifying_store() -> FakeStore:
    store = FakeStore(
        {
            "mrpc": {"task": "mrpc", "labels": ["not_equivalent", "equivalent"], "outputs": 2},
            "reviews": {"task": "classification", "labels": ["bad", "good"], "outputs": 2},
            "stsb": {"task": "stsb", "labels": [], "outputs": 1},
            "sql": {"task": "completion"},
        }
    )
    store.tokenizer = tiny_encoder_tokenizer()
    return store
