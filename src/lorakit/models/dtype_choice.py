"""Choose the compute dtype of `auto`: time products of the base's shapes in float32 and in bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.errors import BaseModelError, LorakitError
from lorakit.formatting import size
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import shape_of
from lorakit.models.devices import available_memory, device_exists, pick_device
from lorakit.models.dtypes import QUANTISATIONS, dtype_name, dtype_of_name, multiplies_bfloat16
from lorakit.models.measurements import keep_measurement, measurement_file, read_measurement
from lorakit.models.processor import limit_processor, processor_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MERGED = "lorakit_merged"
"""Key in the config.json of a merged model. `auto` keeps its dtype: rounding again would lose part of the adapter."""

LEAD = 1.1
"""bfloat16 must be faster by this factor. Below it, float32 is taken for its precision."""

BATCH_SIZE = 16
"""Examples of a batch if the caller does not know it."""

SECONDS = 0.2
"""Seconds of trial products, after one round that fills caches; up to four times as many until the rounds agree."""

MIN_ROUNDS, ROUNDS = 5, range(1, 65)
"""A round times every product once in each dtype."""

OPERATIONS = {"cpu": 5e8, "cuda": 1e12}
"""Maximum operations of a trial product. Larger ones are tried with fewer rows and narrower matrices."""

NEGLIGIBLE = 1e8
"""Operations of a block below which other work dominates; such a model computes in float32."""

_WIDTHS = (1024, 4096)
"""Hidden and inner width of a model that is not known."""

_INNER = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner")
"""Names of the inner width in configurations of transformers."""


@dataclass(frozen=True)
class DtypeChoice:
    """A compute dtype, and the reason for it."""

    dtype: torch.dtype
    reason: str
    saves_memory: bool = False
    """Whether float32 would be taken if it fitted into the free memory."""


@dataclass(frozen=True)
class Trial:
    """Rates of trial products in operations per second."""

    float32: float
    bfloat16: float
    steady: bool
    """Whether most rounds agree on the faster dtype."""

    @property
    def choice(self) -> DtypeChoice:
        """The dtype to compute in."""
        fast, slow = "bfloat16", "float32"
        if self.bfloat16 < LEAD * self.float32:
            fast, slow = slow, fast
        fast_rate, slow_rate = _rate(getattr(self, fast)), _rate(getattr(self, slow))
        reason = f"its products run at {fast_rate}, those of {slow} at {slow_rate}"
        if not self.steady:
            reason += ", on a machine whose speed varies, so it is measured again next time"
        return DtypeChoice(getattr(torch, fast), reason)


def compute_dtype(
    dtype: str | torch.dtype = "auto",
    device: torch.device | None = None,
) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        dtype: A name, or a dtype, which is returned unchanged. ``auto`` is the faster of float32 and bfloat16 for
            products of usual shapes; see `choose_dtype`. A quantised base computes in bfloat16 where the device
            multiplies it, to save memory.
        device: The device to compute on; None is the GPU if this machine has one, else the CPU.

    Raises:
        ConfigurationError: The name is not known.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    device = device or pick_device("auto")
    if dtype == "auto":
        return choose_dtype(device).dtype
    if dtype in QUANTISATIONS:
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return dtype_of_name(dtype)


def resolve_dtype(
    base: BaseConfig, *, batch_size: int = BATCH_SIZE, copies: int = 1
) -> tuple[BaseConfig, str]:
    """Return `base` with the name of a dtype in place of ``auto``, and the reason for it.

    The reason is empty for a dtype that the user chose. A device that this machine lacks counts as a GPU that
    multiplies bfloat16. `batch_size` and `copies` are those of `choose_dtype`.
    """
    if base.dtype != "auto":
        return base, ""
    try:
        device = pick_device(base.device)
    except LorakitError:  # a planned run on another machine
        device = torch.device(base.device)
    config = None
    if device_exists(device):
        with suppress(BaseModelError):  # loading it raises a better message
            config = shape_of(base).config
    choice = choose_dtype(device, config, batch_size=batch_size, copies=copies)
    return dataclasses.replace(base, dtype=dtype_name(choice.dtype)), choice.reason  # type: ignore[arg-type]


def choose_dtype(
    device: torch.device,
    config: PretrainedConfig | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    copies: int = 1,
) -> DtypeChoice:
    """Return bfloat16 if its products are at least `LEAD` times as fast as those of float32, else float32.

    A model that lorakit merged keeps its dtype. For others, products of a block are timed, forward and backward, in
    alternating rounds. The rates are cached per processor, number of threads, release of torch and shapes in the user's
    cache folder, unless they scatter.

    Where float32 does not fit into the free memory, a base with 16 bits per weight is bfloat16 whatever its speed.

    Args:
        device: Device to compute on.
        config: Configuration of the base; None tries products of usual shapes.
        batch_size: Examples of a batch, which determines the rows of the products.
        copies: Number of processes that load the base on this machine. On a CPU they share its memory.
    """
    choice = _fastest(device, config, batch_size)
    if choice.dtype != torch.float32 or config is None:
        return choice
    return _that_fits(device, config, copies) or choice


def _fastest(device: torch.device, config: PretrainedConfig | None, batch_size: int) -> DtypeChoice:
    """Return the dtype to compute in, whatever the memory."""
    if not multiplies_bfloat16(device):
        kind = {"cpu": "processor", "cuda": "GPU"}.get(device.type, f"{device.type} device")
        return DtypeChoice(torch.float32, f"this {kind} has no bfloat16 arithmetic")
    if not device_exists(device):
        return DtypeChoice(torch.bfloat16, "assumed for a device that this machine lacks")
    stored = getattr(config, "dtype", None)
    if getattr(config, MERGED, False) and stored in (torch.float32, torch.bfloat16):
        return DtypeChoice(stored, "the merged model is stored in it")
    widths = _widths(config) if config is not None else _WIDTHS
    # Few numbers of rows, so that runs share a trial.
    rows = (64 if batch_size < 4 else 512) * (1 if device.type == "cpu" else 8)
    if sum(2 * rows * a * b for a, b in _products(widths)) < NEGLIGIBLE:
        return DtypeChoice(torch.float32, "the products of this small model take little time")
    if device.type == "cpu":
        limit_processor()
    return _trial(device, widths, rows, torch.get_num_threads()).choice


def _that_fits(device: torch.device, config: PretrainedConfig, copies: int) -> DtypeChoice | None:
    """Return bfloat16 for a base with 16 bits per weight that does not fit into the free memory in float32, else None.

    float32 weights are a copy of twice the file's size. In bfloat16, a CPU maps a bfloat16 file and copies others.
    """
    stored, quantised = (getattr(config, name, None) for name in ("dtype", "quantization_config"))
    if stored not in (torch.bfloat16, torch.float16) or quantised:
        return None
    copies = copies if device.type == "cpu" else 1
    needed, free = 4 * _parameters(config) * copies, available_memory(device)
    if free is None or needed <= free:
        return None
    where = f" in {copies} processes" if copies > 1 else ""
    reason = f"float32 would need {size(needed)}{where}, and {size(free)} are free"
    return DtypeChoice(torch.bfloat16, reason, saves_memory=True)


def _parameters(config: PretrainedConfig) -> int:
    """Return the number of parameters of a model; 0 if transformers cannot build it without code from the hub."""
    import transformers

    try:
        build: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
            build = functools.partial(transformers.AutoModel.from_config, trust_remote_code=False)
        with torch.device("meta"):
            model = build(copy.deepcopy(config))
    # A configuration is untrusted input, and loading the model raises a better message.
    except Exception:
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def _trial(device: torch.device, widths: tuple[int, int], rows: int, threads: int) -> Trial:
    """Return the cached trial of this machine, or run it and cache it."""
    is_gpu = device.type == "cuda"
    identity = {
        "processor": torch.cuda.get_device_name(device) if is_gpu else processor_name(),
        "threads": threads,
        "torch": torch.__version__,
        "widths": widths,
        "rows": rows,
    }
    path = measurement_file("dtype", identity)
    kept = read_measurement(path, Trial)
    if kept is not None and 0 < kept.float32 < 1e18 and 0 < kept.bfloat16 < 1e18:
        return kept
    trial = _measure(device, widths, rows)
    if trial.steady:
        # Without a writable cache, each process measures for itself.
        with suppress(LorakitError):
            keep_measurement(path, trial, identity)
    return trial


def _measure(device: torch.device, widths: tuple[int, int], rows: int) -> Trial:
    """Time the products of a block in alternating rounds of float32 and bfloat16."""
    cap = OPERATIONS["cpu" if device.type == "cpu" else "cuda"]
    side = max(256, int((cap / 64) ** 0.5))  # so that 32 rows stay within the cap
    hidden, inner = (min(width, side) for width in widths)
    rows = max(32, min(rows, int(cap / (2 * hidden * inner))))
    products = _products((hidden, inner))
    pair = (torch.float32, torch.bfloat16)
    operands = {
        dtype: [_operands(a, b, rows, dtype, device) for a, b in products] for dtype in pair
    }
    for dtype in pair:
        _seconds(operands[dtype], device)
    rounds: list[dict[torch.dtype, float]] = []
    steady, began = False, time.perf_counter()
    for number in ROUNDS:
        order = pair if number % 2 else pair[::-1]
        rounds.append({dtype: _seconds(operands[dtype], device) for dtype in order})
        if number < MIN_ROUNDS:
            continue
        low, _, high = quantiles([r[torch.float32] / r[torch.bfloat16] for r in rounds], n=4)
        steady = (low >= LEAD) == (high >= LEAD)
        if time.perf_counter() - began > (SECONDS if steady else 4 * SECONDS):
            break
    work = 2 * sum(2 * rows * a * b for a, b in products)
    # Other processes only add time, so the fastest round is the closest to the machine's speed.
    seconds = {dtype: min(r[dtype] for r in rounds) for dtype in pair}
    return Trial(
        float32=work / seconds[torch.float32],
        bfloat16=work / seconds[torch.bfloat16],
        steady=steady,
    )


def _operands(
    fan_in: int, fan_out: int, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input, the weight and the output's gradient of a linear layer."""
    shapes = ((rows, fan_in), (fan_out, fan_in), (rows, fan_out))
    x, W, grad = (torch.full(shape, 0.5, dtype=dtype, device=device) for shape in shapes)
    return x, W, grad


def _seconds(operands: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> float:
    """Return the seconds of every layer's product and of the gradient of its input."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    with torch.no_grad():
        for x, W, grad in operands:
            F.linear(x, W)
            torch.mm(grad, W)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _products(widths: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the input and output widths of a block's large products."""
    hidden, inner = widths
    return (hidden, hidden), (hidden, inner), (inner, hidden)


def _widths(config: PretrainedConfig) -> tuple[int, int]:
    """Return the hidden and the inner width of a model; for unknown names, usual ones."""
    text = config.get_text_config(decoder=True)  # MusicGen has an encoder of text beside it
    hidden = _width(text, "hidden_size") or _WIDTHS[0]
    return hidden, _width(text, *_INNER) or 4 * hidden


def _width(config: PretrainedConfig, *names: str) -> int | None:
    """Return the first of these fields that is set. Of one width per layer (Gemma 3n), return the largest."""
    for name in names:
        # getattr rejects fields that differ between layers
        value = vars(config).get(config.attribute_map.get(name, name))
        if value:
            return max(value) if isinstance(value, list | tuple) else int(value)
    return None


def _rate(operations: float) -> str:
    giga = operations / 1e9
    return f"{giga / 1e3:,.0f} TFLOP/s" if giga >= 1e4 else f"{giga:,.0f} GFLOP/s"
