"""`auto` is the dtype whose products are faster on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenConfig,
    PretrainedConfig,
)

from lorakit.models import dtype_choice, dtypes
from lorakit.models.base_config import BaseConfig
from lorakit.models.devices import available_memory
from lorakit.models.dtype_choice import choose_dtype, compute_dtype, resolve_dtype
from lorakit.models.loading import load_base

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, on a CPU that lists bfloat16 arithmetic."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(dtype_choice, "SECONDS", 0.0)  # the minimum number of rounds
    dtype_choice._trial.cache_clear()
    yield tmp_path
    dtype_choice._trial.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.dtype]]:
    """Replace the timer: bfloat16 takes 1 second and float32 `lead`, or each of several in turn."""

    def set_lead(*leads: float) -> list[torch.dtype]:
        calls: list[torch.dtype] = []
        next_lead = cycle(leads)

        def seconds(operands: list[tuple[Tensor, Tensor, Tensor]], _: torch.device) -> float:
            calls.append(operands[0][0].dtype)
            return next(next_lead) if calls[-1] == torch.float32 else 1.0

        monkeypatch.setattr(dtype_choice, "_seconds", seconds)
        return calls

    return set_lead


@pytest.mark.parametrize(
    ("lead", "expected"),
    [(6.0, "bfloat16"), (1.11, "bfloat16"), (1.09, "float32"), (0.53, "float32")],
)
def test_the_faster_dtype_with_a_tenth_of_lead(
    machine: Callable[..., list[torch.dtype]], lead: float, expected: str
) -> None:
    machine(lead)
    choice = choose_dtype(CPU)
    assert str(choice.dtype) == f"torch.{expected}"
    assert choice.reason.startswith("its products run at")
    base, reason = resolve_dtype(BaseConfig(name="no-such-model"))
    assert (base.dtype, reason) == (expected, choice.reason)


def test_rounds_alternate(machine: Callable[..., list[torch.dtype]]) -> None:
    calls = machine(2.0)
    choose_dtype(CPU)
    rounds = list(zip(calls[2::2], calls[3::2], strict=True))
    assert len(rounds) == dtype_choice.MIN_ROUNDS
    assert all(set(pair) == {torch.float32, torch.bfloat16} for pair in rounds)
    assert rounds[0] != rounds[1]


def test_a_steady_trial_is_kept(machine: Callable[..., list[torch.dtype]], cache: Path) -> None:
    machine(3.0)
    assert compute_dtype("auto", CPU) == torch.bfloat16
    assert [path.name[:6] for path in cache.iterdir()] == ["dtype-"]
    dtype_choice._trial.cache_clear()  # as in another process
    calls = machine(0.5)
    assert compute_dtype("auto", CPU) == torch.bfloat16
    assert calls == []
    choose_dtype(CPU, batch_size=1)  # other products
    assert calls


def test_scattering_rounds_are_not_kept(
    machine: Callable[..., list[torch.dtype]], cache: Path
) -> None:
    machine(0.5, 3.0)
    assert "whose speed varies" in choose_dtype(CPU).reason
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", '{"trial": {"float32": -1}}'])
def test_a_damaged_entry_is_measured_again(
    machine: Callable[..., list[torch.dtype]], cache: Path, content: str
) -> None:
    machine(3.0)
    compute_dtype("auto", CPU)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    dtype_choice._trial.cache_clear()
    calls = machine(0.5)
    assert compute_dtype("auto", CPU) == torch.float32
    assert calls


def test_an_impossible_rate_is_measured_again(
    machine: Callable[..., list[torch.dtype]], cache: Path
) -> None:
    machine(3.0)
    compute_dtype("auto", CPU)
    (entry,) = cache.iterdir()
    record = json.loads(entry.read_text())
    entry.write_text(json.dumps({**record, "trial": {**record["trial"], "float32": -1.0}}))
    dtype_choice._trial.cache_clear()
    calls = machine(0.5)
    assert compute_dtype("auto", CPU) == torch.float32
    assert calls


def test_a_small_model_needs_no_trial(machine: Callable[..., list[torch.dtype]]) -> None:
    calls = machine(3.0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64)
    assert choose_dtype(CPU, config).dtype == torch.float32
    assert calls == []
    assert choose_dtype(CPU, LlamaConfig()).dtype == torch.bfloat16


def test_a_merged_model_keeps_its_dtype(machine: Callable[..., list[torch.dtype]]) -> None:
    calls = machine(3.0)
    config = LlamaConfig(dtype="float32", **{dtype_choice.MERGED: True})
    assert choose_dtype(CPU, config).dtype == torch.float32
    assert calls == []


def test_products_have_the_shapes_of_the_base_and_a_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def seconds(operands: list[tuple[Tensor, Tensor, Tensor]], _: torch.device) -> float:
        seen.append([tuple(W.shape) for _, W, _ in operands])
        rows = {x.shape[0] for x, _, _ in operands}
        work = max(2 * n * W.numel() for n in rows for _, W, _ in operands)
        assert work <= 1.1 * dtype_choice.OPERATIONS["cpu"]
        return 1.0

    monkeypatch.setattr(dtype_choice, "_seconds", seconds)
    choose_dtype(CPU, LlamaConfig(hidden_size=576, intermediate_size=1536))
    assert seen[0] == [(576, 576), (1536, 576), (576, 1536)]
    choose_dtype(CPU, LlamaConfig(hidden_size=16384, intermediate_size=65536))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_embd=96, n_inner=None), (96, 384)),  # its names are mapped
        (Gemma3nTextConfig(hidden_size=32, intermediate_size=[64] * 34 + [48]), (32, 64)),
        (LlamaConfig(per_layer_config={0: {"intermediate_size": 64}}), (4096, 11008)),
        (MusicgenConfig(text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"},
                        decoder={"hidden_size": 48, "ffn_dim": 80}), (48, 80)),
        (PretrainedConfig(), (1024, 4096)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_widths_of_unusual_configurations(
    config: PretrainedConfig, expected: tuple[int, int]
) -> None:
    assert dtype_choice._widths(config) == expected


def test_no_trial_without_bfloat16_arithmetic(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., list[torch.dtype]]
) -> None:
    calls = machine(3.0)
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: False)
    for name in ("auto", "nf4"):
        assert compute_dtype(name, CPU) == torch.float32
    assert calls == []


@pytest.mark.parametrize(
    ("gpu", "device", "expected"),
    [
        ((7, 5), "cuda:0", torch.float32),
        ((7, 5), "cuda:1", torch.bfloat16),  # a planned device that does not exist
        (None, "cuda", torch.bfloat16),
        (None, "mps", torch.float32),
    ],
)
def test_devices_without_a_choice(
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[..., list[torch.dtype]],
    gpu: tuple[int, int] | None,
    device: str,
    expected: torch.dtype,
) -> None:
    calls = machine(3.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if gpu else 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    for name in ("auto", "int8"):
        assert compute_dtype(name, torch.device(device)) == expected
    assert compute_dtype("float32", torch.device(device)) == torch.float32
    assert calls == []


def test_the_trial_times_real_products(cache: Path) -> None:
    trial = dtype_choice._measure(CPU, (64, 128), 64)
    assert trial.float32 > 1e6
    assert trial.bfloat16 > 1e6


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
    ],
)
def test_bfloat16_arithmetic_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    uncached = dtypes._cpu_multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", uncached)
    assert dtypes.multiplies_bfloat16(CPU) is expected


# --- memory ---------------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
TINY |= {"num_attention_heads": 4, "architectures": ["LlamaForCausalLM"]}
NEEDED = 4 * (99 * 32 * 2 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32)
"""Bytes of its embedding, head, attention, MLP and norms in float32."""


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Replace the bytes of memory that are free."""
    return lambda count: monkeypatch.setattr(dtype_choice, "available_memory", lambda _: count)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_base_of_16_bits_that_does_not_fit_in_float32_is_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    free: Callable[[int | None], None],
    machine: Callable[..., list[torch.dtype]],
    stored: str,
    multiplies: bool,
) -> None:
    machine(0.5)
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(dtype_choice, "NEGLIGIBLE", 0)
    config = LlamaConfig(**TINY, dtype=stored)
    free(NEEDED - 1)
    choice = choose_dtype(CPU, config)
    assert choice.dtype == torch.bfloat16
    assert choice.reason == "float32 would need 66.7 kB, and 66.7 kB are free"
    assert choice.saves_memory
    for fits in (NEEDED, None):  # None: a device whose memory is not known
        free(fits)
        choice = choose_dtype(CPU, config)
        assert choice.dtype == torch.float32
        assert not choice.saves_memory


def test_every_process_of_a_machine_loads_the_base(free: Callable[[int | None], None]) -> None:
    config = LlamaConfig(**TINY, dtype="bfloat16")
    free(2 * NEEDED - 1)
    choice = choose_dtype(CPU, config, copies=2)
    assert choice.dtype == torch.bfloat16
    assert "133 kB in 2 processes" in choice.reason
    free(2 * NEEDED)
    assert choose_dtype(CPU, config, copies=2).dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": None},
        {"dtype": "bfloat16", "quantization_config": {"load_in_4bit": True}},
        {"dtype": "bfloat16", "hidden_act": "none"},  # cannot be built
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_bases_are_float32_whatever_the_memory(
    free: Callable[[int | None], None], settings: dict[str, object]
) -> None:
    free(0)
    assert choose_dtype(CPU, LlamaConfig(**TINY | settings)).dtype == torch.float32


def test_a_base_whose_class_is_not_named(free: Callable[[int | None], None]) -> None:
    free(NEEDED - 4 * 99 * 32 - 1)  # without a head
    config = LlamaConfig(**TINY | {"dtype": "bfloat16", "architectures": None})
    assert choose_dtype(CPU, config).dtype == torch.bfloat16


def test_loading_and_training_say_that_float32_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, free: Callable[[int | None], None], tmp_path: Path
) -> None:
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: False)
    LlamaForCausalLM(LlamaConfig(**TINY)).bfloat16().save_pretrained(tmp_path)
    free(1000)
    reason = "float32 would need 66.7 kB, and 1 kB are free"
    base, why = resolve_dtype(BaseConfig(name=str(tmp_path), device="cpu"))
    assert (base.dtype, why) == ("bfloat16", reason)
    loaded = load_base(tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    assert f"The dtype is bfloat16: {reason}." in loaded.notices
    chosen = load_base(tmp_path, dtype="float32")
    assert chosen.model.dtype == torch.float32
    assert not any(reason in notice for notice in chosen.notices)


def test_free_memory_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert available_memory(torch.device("cuda:1")) == 130
    assert available_memory(torch.device("mps")) is None
    assert 0 < (available_memory(CPU) or 0) < psutil.virtual_memory().total
