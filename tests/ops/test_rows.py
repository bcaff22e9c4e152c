"""Compare gathering and scattering rows with plain indexing."""

import torch

from lorakit.ops.rows import put_rows, rounded_rows, take_rows

AT = torch.tensor([4, 0, 3])


def test_rows_are_those_of_indexing_and_stand_among_zeros():
    x = torch.randn(5, 2, 3)
    assert torch.equal(take_rows(x, AT), x[AT])
    back = put_rows(x[AT], AT, 5)
    assert torch.equal(back[AT], x[AT])
    assert torch.equal(back[[1, 2]], torch.zeros(2, 2, 3))


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(take_rows, (x, AT))
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(put_rows, (rows, AT, 5))


def test_numbers_of_rows_are_rounded_up():
    assert [rounded_rows(n) for n in (0, 1, 15, 16, 17, 33, 100, 257, 5000)] == [
        *(0, 1, 15, 16, 18, 36, 104, 288, 5024)
    ]
    assert all(n <= rounded_rows(n) <= 1.125 * n for n in range(1, 3000))
    assert len({rounded_rows(n) for n in range(1, 1025)}) < 80
