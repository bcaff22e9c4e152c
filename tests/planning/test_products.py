"""The matrix products of a step are recorded and timed."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.planning import products
from lorakit.planning.ledger import Ledger, Work
from lorakit.planning.machine import Machine
from lorakit.planning.products import CALLS, Operand, Product, time_products
from lorakit.planning.shape import new_mode

CPU = torch.device("cpu")
MACHINE = Machine(products=1e9, traffic=1e8, draws=1e6, call=0.0, origin="made up")


def square(width: int, count: int = 2) -> Product:
    """Return a product of `count` square float32 matrices."""
    operand = Operand((width, width), (width, 1), torch.float32)
    return Product("mm", (operand,) * count, 2 * width**3, 3 * 4 * width**2)


def recorded(compute) -> Work:
    with new_mode():
        inputs = [torch.empty(2, 24, 16), torch.empty(32, 16), torch.empty(24, 32)]
        ledger = Ledger(inputs)
        with ledger:
            compute(*inputs)
    return ledger.segments[-1].work


@pytest.mark.parametrize(
    ("compute", "name", "shapes", "operations"),
    [
        (lambda x, W, y: x[0] @ W.T, "mm", [(24, 16), (16, 32)], 2 * 24 * 16 * 32),
        (lambda x, W, y: torch.mm(x[0], W.T, out=y), "mm", [(24, 16), (16, 32)], 2 * 24 * 16 * 32),
        (lambda x, W, y: torch.addmm(y, x[0], W.T), "addmm", [(24, 32), (24, 16), (16, 32)], 24576),
        (lambda x, W, y: y.addmm_(x[0], W.T), "addmm_", [(24, 32), (24, 16), (16, 32)], 24576),
        (
            lambda x, W, y: torch.bmm(x, x.mT),
            "bmm",
            [(2, 24, 16), (2, 16, 24)],
            2 * 2 * 24 * 16 * 24,
        ),
    ],
)
def test_a_product_is_recorded_with_its_layout(compute, name, shapes, operations):
    work = recorded(compute)
    ((product, count),) = work.products.items()
    assert (product.name, count, product.operations) == (name, 1, operations)
    assert [operand.shape for operand in product.operands] == shapes
    assert work.operations == operations
    assert work.traffic == 0
    made = [operand.make(CPU) for operand in product.operands]
    assert made[-1].stride() == (1, 16) or name == "bmm"
    CALLS[name](*made)


def test_fused_attention_is_counted_forward_and_backward():
    with new_mode():
        query, key, value = (torch.empty(1, n, 8, 4, requires_grad=True) for n in (4, 2, 2))
        ledger = Ledger([query, key, value])
        with ledger:
            many = [x.repeat_interleave(2, 1) for x in (key, value)]
            torch.nn.functional.scaled_dot_product_attention(query, *many).sum().backward()
    (segment,) = ledger.segments
    assert segment.work.operations == 7 * 2 * 4 * 8 * 8 * 4  # two products forward, five backward
    assert segment.widest == 0


def test_work_repeats():
    work = recorded(lambda x, W, y: x[0] @ W.T)
    work += work.times(3)
    assert list(work.products.values()) == [4]
    assert work.operations == 4 * 2 * 24 * 16 * 32


@pytest.mark.parametrize(
    ("shape", "stride", "nbytes"),
    [
        ((8, 4), (4, 1), 8 * 4 * 4),
        ((4, 8), (1, 4), 8 * 4 * 4),
        ((8, 4), (0, 1), 4 * 4),  # one row, expanded to eight
        ((8, 4), (400, 1), (7 * 400 + 4) * 4),  # some columns of a wider matrix
    ],
)
def test_an_operand_is_created_with_its_layout(shape, stride, nbytes):
    operand = Operand(shape, stride, torch.float32)
    made = operand.make(CPU)
    assert (tuple(made.shape), made.stride()) == (shape, stride)
    assert made.untyped_storage().nbytes() == operand.nbytes == nbytes
    assert (made == 0.5).all()


def test_the_slowest_products_are_timed():
    counts = {square(128): 10, square(64): 1, square(8): 1, square(256): 1}
    timings = time_products([counts], CPU, lambda p: p.operations * 1e-12)
    assert set(timings.seconds) == {square(128), square(256)}
    assert all(0 < seconds < 1 for seconds in timings.seconds.values())
    assert timings.note == ""


def test_a_product_of_two_steps_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(products, "_time_product", lambda p, *_: timed.append(p) or 1.0)
    time_products([{square(64): 1}, {square(64): 2, square(32): 9}], CPU, lambda p: 1e-3)
    assert sorted(timed, key=lambda p: p.operations) == [square(32), square(64)]


@pytest.mark.parametrize(
    ("name", "shapes", "cut"),
    [
        ("mm", [(1024, 8), (8, 4)], [(256, 8), (8, 4)]),
        ("addmm", [(4,), (1024, 8), (8, 4)], [(4,), (256, 8), (8, 4)]),
        ("addmm_", [(1024, 4), (1024, 8), (8, 4)], [(256, 4), (256, 8), (8, 4)]),
    ],
)
def test_a_long_product_is_timed_with_fewer_rows(monkeypatch, name, shapes, cut):
    """It is estimated to take four times `SECONDS`."""
    calls = []
    monkeypatch.setattr(products, "timed", lambda *_, operands, **__: calls.append(operands) or 0.5)
    operands = tuple(Operand(shape, torch.empty(shape).stride(), torch.float32) for shape in shapes)
    long = Product(name, operands, 1.0, 1)
    timings = time_products([{long: 1}], CPU, lambda p: 4 * products.SECONDS)
    assert timings.seconds == {long: 4 * 0.5}
    assert "fewer rows, extrapolated" in timings.note
    made = next(calls[0])
    assert [tuple(x.shape) for x in made] == cut
    CALLS[name](*made)


def test_a_long_batched_product_is_timed_whole(monkeypatch):
    monkeypatch.setattr(products, "timed", lambda *_, **__: 0.5)
    operand = Operand((1024, 2, 2), (4, 2, 1), torch.float32)
    long = Product("bmm", (operand, operand), 1.0, 1)
    timings = time_products([{long: 1}], CPU, lambda p: 4 * products.SECONDS)
    assert timings == products.Timings({long: 0.5})


def test_products_beyond_the_time_limit_are_left_over(monkeypatch):
    monkeypatch.setattr(products, "LIMIT", -1.0)
    timings = time_products([{square(64): 1}], CPU, lambda p: 0.01)
    assert timings.seconds == {}
    assert timings.note == "1 of 1 products not timed, to save time"


def test_the_number_of_timed_products_is_limited(monkeypatch):
    monkeypatch.setattr(products, "MOST", 2)
    counts = {square(width): 1 for width in (32, 33, 34)}
    timings = time_products([counts], CPU, lambda p: 0.01).seconds
    assert len(timings) == 2
    assert set(timings) <= set(counts)


def test_unknown_long_and_large_products_are_not_timed(monkeypatch):
    other = Product("convolution", (), 1e9, 0)
    nothing = products.Timings({})
    assert time_products([{other: 1}], CPU, lambda p: 0.01) == nothing
    assert time_products([{square(64): 1}], CPU, lambda p: 2 * products.LONGEST) == nothing
    monkeypatch.setattr(products, "LARGEST_BYTES", 1000)
    assert time_products([{square(64): 1}], CPU, lambda p: 0.01) == nothing
    assert time_products([{}], CPU, lambda p: 0.01) == nothing


def test_an_estimate_is_limited_by_arithmetic_or_memory():
    wide, thin = square(1000), Product("mm", (), 1e6, 10**9)
    assert MACHINE.estimate(wide) == pytest.approx(2.0)
    assert MACHINE.estimate(thin) == pytest.approx(10.0)


def test_the_seconds_of_a_step():
    wide, thin = square(1000), Product("mm", (), 1e6, 10**9)
    work = Work(traffic=1e8, drawn=3e6)
    work.products.update({wide: 2, thin: 1})
    assert MACHINE.seconds(work) == pytest.approx(2 * 2 + 10 + 1 + 3)
    assert MACHINE.seconds(work, {wide: 0.5}) == pytest.approx(2 * 0.5 + 10 + 1 + 3)
    assert math.isclose(MACHINE.seconds(work, {wide: 0.5, thin: 0.0}), 2 * 0.5 + 1 + 3)
