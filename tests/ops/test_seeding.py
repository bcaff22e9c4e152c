"""Seeded draws are reproducible and leave the global generators unchanged."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from lorakit.ops.seeding import seed_device, seeded

CPU = torch.device("cpu")


def draws(device: torch.device = CPU) -> list[float]:
    return torch.rand(3, device=device).tolist()


def test_draws_are_those_of_the_seed_and_the_global_generator_stays() -> None:
    torch.manual_seed(3)
    of_seed = draws()
    torch.manual_seed(0)
    expected = draws()
    torch.manual_seed(0)
    with seeded(3, [CPU, torch.device("meta")]):
        assert draws() == of_seed
    assert draws() == expected
    torch.manual_seed(0)
    with seeded(None):
        assert draws() == expected
    assert draws() != expected


class OneDevice:
    """The device module of a backend with a single device (mps)."""

    def __init__(self) -> None:
        self.index, self.states = 0, [7, 7]

    def get_rng_state(self) -> int:
        return self.states[self.index]

    def set_rng_state(self, state: int) -> None:
        self.states[self.index] = state

    manual_seed = set_rng_state


class SeveralDevices(OneDevice):
    """The device module of a backend with a current device (cuda, xpu)."""

    @contextmanager
    def device(self, device: torch.device):
        before, self.index = self.index, device.index
        yield
        self.index = before


@pytest.mark.parametrize(
    ("module", "name", "within"),
    [
        (OneDevice(), "mps", [3, 7]),
        (SeveralDevices(), "cuda:0", [3, 7]),
        (SeveralDevices(), "xpu:1", [7, 3]),
    ],
)
def test_the_device_in_use_alone_is_seeded(
    monkeypatch: pytest.MonkeyPatch, module: OneDevice, name: str, within: list[int]
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with seeded(3, [torch.device(name)] * 2):
        assert module.states == within
    with pytest.raises(ZeroDivisionError), seeded(3, [torch.device(name)]):
        raise ZeroDivisionError
    assert module.states == [7, 7]
    with seeded(3):
        assert module.states == [7, 7]


@pytest.mark.parametrize(("name", "after"), [("cuda:0", [3, 7]), ("cuda:1", [7, 3])])
def test_a_device_is_seeded_that_is_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, after: list[int]
) -> None:
    module = SeveralDevices()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    seed_device(3, torch.device(name))
    assert module.states == after


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to draw on")
def test_a_gpu() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(3)
    of_seed = draws(gpu)
    torch.manual_seed(0)
    expected = draws(gpu)
    torch.manual_seed(0)
    with seeded(3, [gpu]):
        assert draws(gpu) == of_seed
    with seeded(3):
        draws()
    assert draws(gpu) == expected
