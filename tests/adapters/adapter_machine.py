"""Random sequences of adapter operations on one model, each followed by a comparison with `EffectiveWeights`."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from effective_weights import (
    LAYERS,
    WIDTH,
    EffectiveWeights,
    Method,
    PlainAdapter,
    SmallModel,
    Weights,
    pause_in_block,
    random,
)
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lorakit.adapters import Adapters, attach, handle_of, load
from lorakit.errors import AdapterStateError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.lora.method import LoRA

BY_TOKEN = hasattr(Adapters, "per_token")
"""Whether choices are local to a thread, can repeat, weight rows, and go by token."""

LENGTH = 4
IDS = torch.randint(7, (12, LENGTH), generator=torch.Generator().manual_seed(0))
BATCH = 3

Choice = str | dict[str, float] | None
T = TypeVar("T")

NAMES = st.sampled_from(["a", "b", "c"])
CHOICES = (
    st.none()
    | NAMES
    | st.dictionaries(NAMES, st.sampled_from([1.0, 0.5, -1.5]), min_size=1, max_size=2)
)
ROWS = st.lists(CHOICES if BY_TOKEN else st.none() | NAMES, min_size=1, max_size=3)
SPANS = st.lists(st.tuples(CHOICES, st.integers(1, 2 * LENGTH)), min_size=1, max_size=4)
REPEATS = st.sampled_from([1, 1, 2]) if BY_TOKEN else st.just(1)


def _lora(paths: Sequence[str], **options: Any) -> st.SearchStrategy[Method]:
    return st.builds(
        LoRA,
        rank=st.integers(1, 3),
        alpha=st.sampled_from([1.0, -2.0, 3.5]),
        scaling=st.sampled_from(["standard", "rslora"]),
        targets=st.lists(st.sampled_from(paths), min_size=1, unique=True).map(tuple),
        **{name: st.just(value) for name, value in options.items()},
    )


LINEARS = ("block.up", "block.down", "scores")
METHODS = (
    _lora(tuple(LAYERS))
    | _lora(tuple(LAYERS))
    | _lora(LINEARS, bias="lora_only")
    | _lora(("table", "block.up", "block.down"), train_modules=("scores",))
    | _lora(LINEARS, dora=True)
    | st.just(BitFit())
)


@dataclass
class Block:
    """An open `per_sample` or `per_token` block."""

    context: contextlib.AbstractContextManager[None]
    choices: tuple[Weights, ...]
    """The choice of each token of a batch."""


@dataclass
class Pass:
    """A forward pass that waits for its backward pass, and the gradients that this must give."""

    loss: Tensor
    expected: list[tuple[Tensor, Tensor]]
    names: set[str]
    """The adapters that acted in it."""
    source: object
    """Where it found its choice (`AdapterMachine.source`)."""
    removed: bool = False
    """Whether one of its adapters has left the model."""


def through_pickle(model: SmallModel) -> SmallModel:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: SmallModel) -> SmallModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def weights_of(choice: Choice) -> Weights:
    if choice is None:
        return ()
    return ((choice, 1.0),) if isinstance(choice, str) else tuple(choice.items())


def started(function: Callable[[], T]) -> Future[T]:
    """Run a function in a new thread."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return what `detach` must restore: types, attributes, number of hooks, keys and requires_grad flags."""
    found: dict[str, object] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules():
        hooks = {name: len(value) for name, value in vars(module).items() if "hooks" in name}
        found[path] = (type(module), list(vars(module)), hooks)
    found.update((name, p.requires_grad) for name, p in model.named_parameters())
    return found


def live_tensors(adapters: Adapters, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's tensors by the keys of `PlainAdapter`."""
    short = {"lora_A": "A", "lora_B": "B"}
    return {
        f"{path}.{short.get(key, key.removeprefix('trained.'))}": parameter
        for path, module in adapters.modules(name).items()
        for key, parameter in module.named_parameters()
    }


class AdapterMachine(RuleBasedStateMachine):
    """A model with adapters, the reference, and the choice that the model must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.files = 0
        self.generator = torch.Generator().manual_seed(0)
        self.model = SmallModel(0)
        self.model.scores.bias.requires_grad_(False)
        self.fresh = fingerprint(self.model)
        self.reference = EffectiveWeights({n: p.detach().clone() for n, p in self.base().items()})
        self.identities: dict[str, nn.Parameter] | None = self.base()
        self.active: Weights = ()
        self.merged: Weights | None = None
        self.blocks: list[Block] = []
        self.passes: list[Pass] = []
        self.tolerance = 1e-10

    def base(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if ".adapters." not in n}

    @property
    def handle(self) -> Adapters:
        adapters = handle_of(self.model)
        assert adapters is not None
        return adapters

    @property
    def adapters(self) -> dict[str, PlainAdapter]:
        return self.reference.adapters

    @property
    def source(self) -> object:
        """What the next forward pass will find: the merged adapters, the innermost block or the active ones."""
        return self.merged, self.blocks[-1].choices if self.blocks else self.active

    def attached(self) -> bool:
        return bool(self.adapters)

    def idle(self) -> bool:
        """Whether no pass waits for its backward pass, so that values may change."""
        return not self.passes

    def can_start_pass(self) -> bool:
        return len(self.passes) < 2

    def by_token(self) -> bool:
        return BY_TOKEN and self.attached()

    # --- comparing -----------------------------------------------------------------------------------

    def choices(self) -> tuple[Weights, ...]:
        """Return the choice of each token in this thread's next forward pass."""
        return self.blocks[-1].choices if self.blocks else self.everywhere()

    def everywhere(self) -> tuple[Weights, ...]:
        """Return the choice of each token of a pass outside of every block."""
        choice = self.active if self.merged is None else self.merged
        return (choice,) * BATCH * LENGTH

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(IDS[: len(self.choices()) // LENGTH])

    def check(self, actual: Tensor, choices: tuple[Weights, ...]) -> None:
        with torch.no_grad():
            expected = self.reference.forward(IDS[: len(choices) // LENGTH], choices, None)
        torch.testing.assert_close(
            actual, expected, rtol=self.tolerance, atol=self.tolerance, check_dtype=False
        )

    def attempt(self, allowed: bool | None, call: Callable[[], object]) -> bool:
        """Call, and return whether it was done. It must be refused unless allowed; None permits both."""
        try:
            call()
        except AdapterStateError:
            assert not allowed, "refused without a reason"
            return False
        assert allowed is not False, "not refused"
        return True

    @invariant()
    def outputs_follow_the_choice(self) -> None:
        self.check(self.forward(), self.choices())

    @invariant()
    def handle_and_base_are_as_recorded(self) -> None:
        if not self.adapters:
            assert handle_of(self.model) is None
            assert fingerprint(self.model) == self.fresh
        else:
            assert set(self.handle.names) == set(self.adapters)
            assert self.handle.merged == dict(self.merged or ())
            if not self.blocks:
                assert self.handle.active == ({} if self.merged else dict(self.active))
        if self.merged is not None:
            return
        trained = {key for name, _ in self.active for key in self.adapters[name].trained}
        for name, parameter in self.base().items():
            if name in trained and not self.blocks:
                continue
            assert name in trained or torch.equal(parameter, self.reference.base[name]), name
            if self.identities is not None and name not in trained:
                assert parameter is self.identities[name], name

    # --- adding and removing ---------------------------------------------------------------------------

    @initialize(first=METHODS, second=METHODS)
    def start(self, first: Method, second: Method) -> None:
        self.attach_adapter("a", first)
        self.attach_adapter("b", second)

    @rule(name=NAMES, method=METHODS)
    def attach_adapter(self, name: str, method: Method) -> None:
        allowed = name not in self.adapters and self.merged is None
        done = self.attempt(
            None if allowed and self.blocks else allowed,
            lambda: attach(self.model, method, name=name, dtype=torch.float64),
        )
        if done:
            self.added(name, PlainAdapter.drawn(method, self.generator))
            self.write(name)

    def added(self, name: str, adapter: PlainAdapter) -> None:
        self.adapters[name] = adapter
        self.active = ((name, 1.0),)

    def write(self, name: str) -> None:
        """Write the reference's tensors into the live adapter."""
        live, plain = live_tensors(self.handle, name), self.adapters[name].tensors
        assert live.keys() == plain.keys()
        with torch.no_grad():
            for key, parameter in live.items():
                assert parameter.shape == plain[key].shape
                parameter.copy_(plain[key])

    @precondition(attached)
    @rule(name=NAMES, new=NAMES, trainable=st.booleans())
    def save_and_load(self, name: str, new: str, trainable: bool) -> None:
        self.files += 1
        folder = self.folder / str(self.files)
        if not self.attempt(name in self.adapters, lambda: self.handle.save(folder, name)):
            return
        allowed = new not in self.adapters and self.merged is None
        done = self.attempt(
            None if allowed and self.blocks else allowed,
            lambda: load(self.model, folder, name=new, trainable=trainable),
        )
        if done:
            self.added(new, self.adapters[name].changed(0.0, self.generator))

    @precondition(attached)
    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        allowed = name in self.adapters and self.merged is None and not self.blocks
        if self.attempt(allowed, lambda: self.handle.remove(name)):
            self.removed({name})

    @precondition(attached)
    @rule()
    def detach(self) -> None:
        if self.attempt(not self.blocks, self.handle.detach):
            self.merged = None
            self.removed(set(self.adapters))

    def removed(self, names: set[str]) -> None:
        for name in names:
            del self.adapters[name]
        if names & {name for name, _ in self.active}:
            self.active = ()
        for waiting in self.passes:
            waiting.removed |= bool(names & waiting.names)
        if not self.adapters:
            self.active = ()
            self.identities = self.identities or self.base()

    # --- choosing --------------------------------------------------------------------------------------

    @precondition(attached)
    @rule(choice=CHOICES)
    def activate(self, choice: Choice) -> None:
        allowed = self.reference.accepts(weights_of(choice)) and self.merged is None
        done = self.attempt(
            None if allowed and self.blocks else allowed, lambda: self.handle.activate(choice)
        )
        if done:
            self.active = weights_of(choice)

    def enter(
        self,
        context: contextlib.AbstractContextManager[None],
        choices: Sequence[Weights],
        optional: bool,
    ) -> None:
        """Enter a block; `optional` also permits a refusal."""
        allowed = self.merged is None and all(map(self.reference.accepts, choices))
        if self.attempt(None if allowed and optional else allowed, context.__enter__):
            self.blocks.append(Block(context, tuple(choices)))

    def rows(
        self, rows: Sequence[Choice], repeat: int
    ) -> tuple[contextlib.AbstractContextManager[None], list[Weights]]:
        """Return the context manager of `per_sample`, and the choice of each token."""
        options = {"repeat": repeat} if BY_TOKEN else {}
        choices = [weights_of(row) for row in rows for _ in range(repeat * LENGTH)]
        return self.handle.per_sample(rows, **options), choices

    @precondition(attached)
    @rule(rows=ROWS, repeat=REPEATS)
    def enter_rows(self, rows: list[Choice], repeat: int) -> None:
        context, choices = self.rows(rows, repeat)
        self.enter(context, choices, optional=bool(self.blocks) and not BY_TOKEN)

    @precondition(by_token)
    @rule(spans=SPANS)
    def enter_spans(self, spans: list[tuple[Choice, int]]) -> None:
        """The last span is cut or extended to whole rows."""
        count = sum(length for _, length in spans)
        *others, (last, length) = spans
        spans = [*others, (last, length + -count % LENGTH)]
        choices = [weights_of(choice) for choice, length in spans for _ in range(length)]
        context = self.handle.per_token(spans)  # type: ignore[attr-defined]
        self.enter(context, choices, optional=False)

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self) -> None:
        self.blocks.pop().context.__exit__(None, None, None)

    @precondition(attached)
    @rule(rows=ROWS, repeat=REPEATS, batch=st.integers(1, 7))
    def wrong_number_of_rows(self, rows: list[Choice], repeat: int, batch: int) -> None:
        count = len(rows) * repeat
        context, choices = self.rows(rows, repeat)
        refused = self.merged is not None or not all(map(self.reference.accepts, choices))
        multiple = batch % count == 0 and not BY_TOKEN
        if refused or batch == count or multiple or self.blocks:
            return
        with context:
            self.attempt(False, lambda: self.model(IDS[:batch]))

    @precondition(attached)
    @rule(call=st.sampled_from(["activate", "per_sample", "merge", "remove", "save", "empty", "text"]))
    def invalid_call(self, call: str) -> None:
        handle = self.handle
        calls: dict[str, Callable[[], object]] = {
            "activate": lambda: handle.activate("missing"),
            "per_sample": lambda: handle.per_sample([None, "missing"]).__enter__(),
            "merge": lambda: handle.merge("missing"),
            "remove": lambda: handle.remove("missing"),
            "save": lambda: handle.save(self.folder / "missing", "missing"),
            "empty": lambda: handle.per_sample([]).__enter__(),
            "text": lambda: handle.per_sample("ab").__enter__(),
        }
        self.attempt(False, calls[call])

    @rule()
    def layers_called_alone(self) -> None:
        """A layer that is called outside of the model's forward pass follows the same choice."""
        ids, model = IDS[: len(self.choices()) // LENGTH], self.model
        with torch.no_grad():
            self.check(model.scores(model.block(model.table(ids))), self.choices())

    # --- merging, copying, moving ------------------------------------------------------------------------

    @precondition(attached)
    @rule(choice=CHOICES, training=st.booleans())
    def merge(self, choice: Choice, training: bool) -> None:
        weights = self.active if choice is None else weights_of(choice)
        accepted = weights and self.merged is None and self.reference.accepts(weights)
        self.model.train(training)
        if self.attempt(bool(accepted) and not self.blocks, lambda: self.handle.merge(choice)):
            self.merged = weights

    @precondition(attached)
    @rule()
    def unmerge(self) -> None:
        if self.attempt(self.merged is not None, self.handle.unmerge):
            assert self.merged is not None
            self.active, self.merged = self.merged, None

    @rule(
        copied=st.sampled_from([copy.deepcopy, through_pickle, through_torch_save]),
        continue_with_copy=st.booleans(),
    )
    def copy_model(self, copied: Callable[[SmallModel], SmallModel], continue_with_copy: bool) -> None:
        """Continue with the copy or the original, and overwrite the other one; blocks are the original's."""
        other = copied(self.model)
        while self.blocks:
            self.leave()
        with torch.no_grad():
            self.check(other(IDS[:BATCH]), self.everywhere())
        if self.passes:
            return
        if continue_with_copy:
            self.model, other, self.identities = other, self.model, None
            if not self.adapters:
                self.identities = self.base()
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        if (adapters := handle_of(other)) is not None:
            adapters.detach()

    @precondition(idle)
    @rule()
    def round_to_float32(self) -> None:
        merged = self.merged is not None
        self.model.float()
        self.tolerance = 1e-4
        base, plain = self.reference.base, self.adapters
        self.reference.base = {name: tensor.float().double() for name, tensor in base.items()}
        plain.update({n: a.changed(None, self.generator) for n, a in plain.items()})
        self.outputs_follow_the_choice()
        self.model.to("cpu").double()
        # A merged weight has been rounded once more than the sum of the rounded factors.
        self.tolerance = 1e-5 if merged else 1e-10

    @precondition(lambda self: self.idle() and self.adapters and self.merged is None)
    @rule(name=NAMES)
    def train(self, name: str) -> None:
        """Change an adapter's tensors in place, as an optimizer does."""
        if name in self.adapters:
            self.adapters[name] = self.adapters[name].changed(0.1, self.generator)
            self.write(name)

    # --- backward passes -----------------------------------------------------------------------------------

    @precondition(lambda self: self.adapters and self.can_start_pass())
    @rule(
        use_reentrant=st.sampled_from([None, False, True]),
        whole_model=st.booleans(),
    )
    def start_pass(self, use_reentrant: bool | None, whole_model: bool) -> None:
        """Run a forward pass, with a checkpoint around the block or the model, for a later backward pass."""
        choices = self.choices()
        ids = IDS[: len(choices) // LENGTH]
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
        expected = self.reference.forward(ids, choices, plain_probe)
        gradients = torch.autograd.grad((expected.tanh() * target).sum(), plain, materialize_grads=True)
        names = {name for choice in choices for name, _ in choice}
        pairs = list(zip(live, gradients, strict=True))
        self.passes.append(Pass((output.tanh() * target).sum(), pairs, names, self.source))

    @precondition(lambda self: self.passes)
    @rule(index=st.integers(0, 1), other_thread=st.booleans())
    def backward(self, index: int, other_thread: bool) -> None:
        """The gradients are those of the forward pass's choice; an error needs a reason."""
        waiting = self.passes.pop(index % len(self.passes))
        for parameter, _ in waiting.expected:
            parameter.grad = None
        try:
            if other_thread:
                started(waiting.loss.backward).result(60)
            else:
                waiting.loss.backward()
        except (AdapterStateError, CheckpointError):
            assert self.may_refuse(waiting), "backward refused without a reason"
        else:
            for parameter, expected in waiting.expected:
                actual = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(
                    actual, expected, rtol=self.tolerance, atol=self.tolerance
                )
        finally:
            for parameter, _ in waiting.expected:
                parameter.grad = None

    def may_refuse(self, waiting: Pass) -> bool:
        """Whether the recomputation of a pass may raise an error.

        Its tensors have left the model, merged weights have come or gone, or tensors trained in full have been swapped.
        """
        if waiting.removed or self.merged is not None or waiting.source[0] is not None:  # type: ignore[index]
            return True
        now = {name for choice in self.choices() for name, _ in choice}
        swapped = any(self.adapters[name].trained for name in now | waiting.names)
        return swapped and self.source != waiting.source

    # --- threads -------------------------------------------------------------------------------------------

    @precondition(by_token)
    @rule(rows=ROWS, repeat=REPEATS)
    def rows_in_another_thread(self, rows: list[Choice], repeat: int) -> None:
        """A block holds in its own thread only."""
        opened, close = threading.Event(), threading.Event()
        context, choices = self.rows(rows, repeat)
        if self.merged is not None or not all(map(self.reference.accepts, choices)):
            return

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
            here = self.forward()
        finally:
            close.set()
            before, inside, after = running.result(60)
        self.check(here, self.choices())
        self.check(inside, tuple(choices))
        self.check(before, self.everywhere())
        self.check(after, self.everywhere())

    @precondition(by_token)
    @rule(call=st.sampled_from(["activate", "merge", "unmerge", "remove", "detach"]), name=NAMES)
    def change_during_a_pass(self, call: str, name: str) -> None:
        """No choice changes while a forward pass of another thread is between two layers."""
        handle = self.handle
        entered, go_on = threading.Event(), threading.Event()

        def pause() -> None:
            entered.set()
            assert go_on.wait(60)

        @torch.no_grad()
        def other_thread() -> Tensor:
            pause_in_block(pause)
            return self.model(IDS[:BATCH])

        running = started(other_thread)
        try:
            assert entered.wait(60)
            arguments = () if call in ("unmerge", "detach") else (name,)
            self.attempt(False, lambda: getattr(handle, call)(*arguments))
        finally:
            go_on.set()
            output = running.result(60)
        self.check(output, self.everywhere())

    def teardown(self) -> None:
        while self.blocks:
            self.blocks.pop().context.__exit__(None, None, None)
        shutil.rmtree(self.folder)
