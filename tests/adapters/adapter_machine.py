"""The operations on adapters, as rules that hypothesis runs in random sequences."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import own_loop
import torch
from effective_weights import (
    WIDTH,
    Method,
    PlainAdapter,
    SmallModel,
    Weights,
    random,
)
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from machine_state import (
    ANY_CHOICE,
    BATCH,
    CHOICE,
    IDS,
    LENGTH,
    METHODS,
    NAMES,
    REPEATS,
    ROWS,
    SPANS,
    UNUSED,
    USED,
    Choice,
    MachineState,
    OpenBlock,
    Pass,
    live_tensors,
    started,
    weights_of,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.adapters import attach, handle_of, load
from lorakit.methods.bitfit import BitFit


def through_pickle(model: SmallModel) -> SmallModel:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class AdapterMachine(MachineState):
    """Each rule makes one call, and records in the state what it must change."""

    # --- adding and removing ---------------------------------------------------------------------------

    @initialize(first=METHODS, second=METHODS)
    def start(self, first: Method, second: Method) -> None:
        self.attach_adapter("a", first)
        self.attach_adapter("b", second)

    @precondition(lambda self: self.unused() and self.merged is None)
    @rule(name=UNUSED, method=METHODS)
    def attach_adapter(self, name: str, method: Method) -> None:
        def call() -> object:
            return attach(self.model, method, name=name, dtype=torch.float64)

        if self.attempt(call, optional=bool(self.blocks)):
            self.added(name, PlainAdapter.drawn(method, self.generator))
            self.write(name)

    @precondition(lambda self: self.unmerged() and self.unused())
    @rule(name=USED, new=UNUSED, trainable=st.booleans())
    def save_and_load(self, name: str, new: str, trainable: bool) -> None:
        folder = self.handle.save(self.folder / "saved", name, overwrite=True)

        def call() -> object:
            return load(self.model, folder, name=new, trainable=trainable)

        if self.attempt(call, optional=bool(self.blocks)):
            self.added(new, self.adapters[name].changed(0.0, self.generator))

    def added(self, name: str, adapter: PlainAdapter) -> None:
        self.adapters[name] = adapter
        self.active = ((name, 1.0),)
        self.disturb_passes()

    def disturb_passes(self) -> None:
        for waiting in self.passes:
            waiting.disturbed = True

    def write(self, name: str) -> None:
        """Write the reference's tensors into the live adapter."""
        live, plain = live_tensors(self.handle, name), self.adapters[name].tensors
        assert live.keys() == plain.keys()
        with torch.no_grad():
            for key, parameter in live.items():
                assert parameter.shape == plain[key].shape
                parameter.copy_(plain[key])

    @precondition(MachineState.unmerged_outside)
    @rule(name=USED)
    def remove(self, name: str) -> None:
        self.handle.remove(name)
        self.removed({name})

    @precondition(lambda self: self.attached() and not self.blocks)
    @rule(name=st.sampled_from(NAMES), method=METHODS)
    def detach_and_attach(self, name: str, method: Method) -> None:
        self.handle.detach()
        self.merged = None
        self.removed(set(self.adapters))
        self.handle_and_base_are_as_recorded()
        self.outputs_follow_the_choice()
        self.attach_adapter(name, method)

    def removed(self, names: set[str]) -> None:
        for name in names:
            del self.adapters[name]
        self.active = tuple((name, w) for name, w in self.active if name in self.adapters)
        for waiting in self.passes:
            # Without the last adapter, the base's own tensors may require gradients again.
            waiting.disturbed |= not self.adapters or bool(names & waiting.names)
        if not self.adapters:
            self.identities = self.identities or self.base()

    # --- choosing --------------------------------------------------------------------------------------

    @precondition(MachineState.unmerged)
    @rule(choice=CHOICE)
    def activate(self, choice: Choice) -> None:
        if self.attempt(lambda: self.handle.activate(choice), optional=bool(self.blocks)):
            self.active = weights_of(choice)

    def rows(
        self, rows: Sequence[Choice], repeat: int
    ) -> tuple[contextlib.AbstractContextManager[None], tuple[Weights, ...]]:
        """Return the context manager of `per_sample`, and the choice of each token."""
        choices = tuple(weights_of(row) for row in rows for _ in range(repeat * LENGTH))
        return self.handle.per_sample(rows, repeat=repeat), choices

    @precondition(MachineState.unmerged)
    @rule(rows=ROWS, repeat=REPEATS)
    def enter_rows(self, rows: list[Choice], repeat: int) -> None:
        context, choices = self.rows(rows, repeat)
        context.__enter__()
        self.blocks.append(OpenBlock(context, choices))

    @precondition(MachineState.unmerged)
    @rule(spans=SPANS)
    def enter_spans(self, spans: list[tuple[Choice, int]]) -> None:
        """The last span is extended to a whole row."""
        *others, (last, length) = spans
        length += -sum(count for _, count in spans) % LENGTH
        context = self.handle.per_token([*others, (last, length)])
        context.__enter__()
        choices = (weights_of(c) for c, count in [*others, (last, length)] for _ in range(count))
        self.blocks.append(OpenBlock(context, tuple(choices)))

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self) -> None:
        self.blocks.pop().context.__exit__(None, None, None)

    @precondition(lambda self: self.idle() and self.unmerged_outside())
    @rule(rows=ROWS, repeat=REPEATS, batch=st.integers(1, 7))
    def wrong_number_of_rows(self, rows: list[Choice], repeat: int, batch: int) -> None:
        context, _ = self.rows(rows, repeat)
        if batch not in (len(rows), len(rows) * repeat):
            with context:
                self.assert_refused(lambda: self.model(IDS[:batch]))
        with self.handle.per_token([(rows[0], batch * LENGTH + 1)]):
            self.assert_refused(lambda: self.model(IDS[:batch]))

    @precondition(MachineState.idle)
    @rule(choice=ANY_CHOICE, name=USED)
    def invalid_calls(self, choice: Choice, name: str) -> None:
        """Each is refused and changes nothing."""
        handle = self.handle
        calls: list[Callable[[], object]] = [
            lambda: handle.activate("missing"),
            lambda: handle.merge("missing"),
            lambda: handle.remove("missing"),
            lambda: handle.save(self.folder / "missing", "missing"),
            lambda: handle.per_sample([None, "missing"]).__enter__(),
            lambda: handle.per_sample("ab").__enter__(),
            lambda: attach(self.model, BitFit(), name=name),
        ]
        if not self.reference.accepts(weights_of(choice)):
            calls += [lambda: handle.activate(choice), lambda: handle.merge(choice)]
            calls.append(lambda: handle.per_sample([name, choice]).__enter__())
        if self.merged is None:
            calls.append(handle.unmerge)
        else:
            calls += [
                lambda: handle.activate(name),
                lambda: handle.per_sample([name]).__enter__(),
                lambda: attach(self.model, BitFit(), name="new"),
            ]
        if self.blocks:
            calls.append(handle.detach)
        if self.blocks or self.merged is not None:
            calls += [lambda: handle.merge(name), lambda: handle.remove(name)]
        for call in calls:
            self.assert_refused(call)

    # --- computing -------------------------------------------------------------------------------------

    @precondition(MachineState.idle)
    @rule()
    def call_layers_alone(self) -> None:
        """A layer that is called outside of the model's forward pass follows the same choice, or refuses rows."""
        model = self.model

        @torch.no_grad()
        def call() -> None:
            self.check(model.scores(model.block(model.table(self.ids()))), self.choices())

        self.attempt(call, optional=bool(self.blocks))

    @precondition(MachineState.idle)
    @rule(name=USED)
    def train(self, name: str) -> None:
        """Change an adapter's tensors in place, as an optimizer does."""
        if self.merged is None:
            self.adapters[name] = self.adapters[name].changed(0.1, self.generator)
            self.write(name)

    @precondition(lambda self: self.attached() and len(self.passes) < 2)
    @rule(
        use_reentrant=st.sampled_from([False, True, None]),
        whole_model=st.booleans(),
        delay=st.integers(1, 4),
        other_thread=st.booleans(),
    )
    def start_pass(
        self, use_reentrant: bool | None, whole_model: bool, delay: int, other_thread: bool
    ) -> None:
        """Run a forward pass, with a checkpoint around the block or the model; backward comes later."""
        ids, choices = self.ids(), self.choices()
        probe = torch.zeros(*ids.shape, WIDTH, dtype=torch.float64, requires_grad=True)
        if whole_model and use_reentrant is not None:
            output = checkpoint(self.model, ids, probe, use_reentrant=use_reentrant)
        else:
            output = self.model(ids, probe, use_reentrant)
        assert isinstance(output, Tensor)
        self.check(output.detach(), choices)
        target = random(output.shape, self.generator)

        live, plain = [probe], [plain_probe := probe.detach().clone().requires_grad_()]
        if self.merged is None:  # a merged weight has no factors to train
            for name, adapter in self.adapters.items():
                for key, parameter in live_tensors(self.handle, name).items():
                    if parameter.requires_grad:
                        live.append(parameter)
                        plain.append(adapter.tensors[key])
        expected = (self.reference.forward(ids, choices, plain_probe).tanh() * target).sum()
        gradients = torch.autograd.grad(expected, plain, materialize_grads=True)
        self.passes.append(
            Pass(
                delay=delay,
                other_thread=other_thread,
                loss=(output.tanh() * target).sum(),
                gradients=list(zip(live, gradients, strict=True)),
                names=self.acting(),
                source=self.source(),
                disturbed=self.merged is not None,
            )
        )

    # --- merging, copying, moving ------------------------------------------------------------------------

    @precondition(MachineState.unmerged_outside)
    @rule(choice=CHOICE, training=st.booleans())
    def merge(self, choice: Choice, training: bool) -> None:
        """None merges the active adapters; with none active this is refused."""
        weights = self.active if choice is None else weights_of(choice)
        self.model.train(training)
        if self.attempt(lambda: self.handle.merge(choice), optional=not weights):
            assert weights
            self.merged = weights
            self.disturb_passes()

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self) -> None:
        assert self.merged is not None
        self.handle.unmerge()
        self.active, self.merged = self.merged, None

    @precondition(MachineState.attached)
    @rule(
        copied=st.sampled_from([copy.deepcopy, through_pickle, through_torch_save]),
        continue_with_copy=st.booleans(),
    )
    def copy_model(
        self, copied: Callable[[SmallModel], SmallModel], continue_with_copy: bool
    ) -> None:
        """Continue with the copy or the original, and overwrite the other one; blocks are the original's."""
        other = copied(self.model)
        while self.blocks:
            self.leave()
        with torch.no_grad():
            self.check(other(IDS[:BATCH]), self.everywhere())
        if self.passes:  # they belong to the original
            return
        if continue_with_copy:
            self.model, other, self.identities = other, self.model, None
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        adapters = handle_of(other)
        assert adapters is not None
        adapters.detach()

    @precondition(MachineState.idle)
    @rule()
    def round_to_float32(self) -> None:
        self.model.float()
        self.tolerance = 1e-4
        base, plain = self.reference.base, self.adapters
        self.reference.base = {name: tensor.float().double() for name, tensor in base.items()}
        plain.update({n: a.changed(None, self.generator) for n, a in plain.items()})
        self.outputs_follow_the_choice()
        self.model.to("cpu").double()
        # A merged weight has been rounded once more than the sum of the rounded factors.
        self.tolerance = 1e-10 if self.merged is None else 1e-5

    # --- threads and tasks -------------------------------------------------------------------------------

    @precondition(MachineState.unmerged)
    @rule(rows=ROWS, repeat=REPEATS)
    def rows_in_another_thread(self, rows: list[Choice], repeat: int) -> None:
        """A block holds in its own thread only, and another thread sees what `activate` has set."""
        opened, close = threading.Event(), threading.Event()
        context, choices = self.rows(rows, repeat)

        @torch.no_grad()
        def other_thread() -> tuple[Tensor, Tensor, Tensor]:
            before = self.model(IDS[:BATCH])
            with context:
                opened.set()
                assert close.wait(60)
                inside = self.model(IDS[: len(choices) // LENGTH])
            return before, inside, self.model(IDS[:BATCH])

        running = started(other_thread)
        try:
            assert opened.wait(60)
            self.outputs_follow_the_choice()
        finally:
            close.set()
            before, inside, after = running.result(60)
        self.check(inside, choices)
        self.check(before, self.everywhere())
        self.check(after, self.everywhere())

    @precondition(MachineState.unmerged_outside)
    @rule(rows=ROWS, repeat=REPEATS)
    def rows_in_another_task(self, rows: list[Choice], repeat: int) -> None:
        context, choices = self.rows(rows, repeat)

        async def other_task(opened: asyncio.Event, close: asyncio.Event) -> Tensor:
            with context:
                opened.set()
                await close.wait()
                with torch.no_grad():
                    return self.model(IDS[: len(choices) // LENGTH])

        async def both() -> Tensor:
            opened, close = asyncio.Event(), asyncio.Event()
            running = asyncio.create_task(other_task(opened, close))
            await opened.wait()
            self.outputs_follow_the_choice()
            close.set()
            return await running

        self.check(own_loop.run(both()), choices)
