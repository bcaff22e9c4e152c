"""The processes of one run, which `torchrun` starts. Each computes a share of every step; the first writes all files.

A run without `torchrun` is one process, and every function here then returns its own values without communication.

Gradients are summed after the backward pass, without a wrapper around the model, so its module names and hooks stay.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from lorakit.configuration import differences
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.formatting import counted
from lorakit.models.devices import pick_device
from lorakit.training.process_failures import START_TIMEOUT, Peers, first_sentence, shared_store

T = TypeVar("T")

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that `torchrun` sets in addition to WORLD_SIZE."""

COMMAND = "torchrun --nproc-per-node 2 -m lorakit train"
REMEDY = f"Start several processes with {COMMAND}, or unset WORLD_SIZE to run one."


@dataclass(frozen=True)
class Processes:
    """The number of this process and the number of all processes of a run; by default a run of one process."""

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    """Exchanges values and tensors on the CPU; None for one process."""
    peers: Peers | None = None
    """Finds out which process has failed; None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run and prints its progress."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """The number of processes on this machine: all, if the launcher does not set it."""
        return _number("LOCAL_WORLD_SIZE", default=str(self.count)) if self.count > 1 else 1

    def set_stage(self, stage: str) -> None:
        """Set the stage of the run ("step 3") that error messages name."""
        if self.peers is not None:
            self.peers.stage = stage

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Raise an error that names the process that has failed, ended or hangs, if communication inside fails.

        Raises:
            LorakitError: A process does not take part.
        """
        if self.peers is None:
            yield
            return
        self.peers.reach()
        try:
            yield
        except RuntimeError as error:  # also torch's own classes of errors
            raise self.peers.error(error) from error

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with self.communication():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """Return the value of the first process."""
        box = [value]
        if self.count > 1:
            with self.communication():
                dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process, and return its result in all of them; the others wait.

        Raises:
            LorakitError: `work` raised one, in all processes.
        """
        result = None
        with self.together():
            if self.is_first:
                result = work()
        return cast(T, self.from_first(result))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a LorakitError of one process in all of them, so that no process waits for it.

        The processes must not communicate inside the block.
        """
        error = None
        try:
            yield
        except LorakitError as raised:
            error = raised
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                first, *lines = message.splitlines()
                raise LorakitError(f"Process {rank} of {self.count} failed: {first}", *lines)

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raise unless all processes have the `values` of the first.

        Raises:
            ConfigurationError: The values of a process differ, in all processes.
        """
        first, *others = self.gather(dict(values))
        for rank, theirs in enumerate(others, start=1):
            different = [
                f"{name} is {its!r} instead of {expected!r}"
                for name, expected, its in differences(first, theirs)
            ]
            if different:
                raise ConfigurationError(
                    f"Process {rank} of {self.count} differs from process 0: {'; '.join(different[:5])}. Give "
                    "all processes the same command, files and software."
                )

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace the values of `tensors` by those of the first process."""
        if self.count == 1:
            return
        with torch.no_grad(), self.communication():
            for tensor in tensors:
                contiguous = tensor.detach().contiguous()
                dist.broadcast(contiguous, src=0, group=self._group_for(tensor))
                tensor.copy_(contiguous)

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], numbers: Sequence[float]
    ) -> list[float]:
        """Replace the gradients by their sums over the processes, and return the sums of `numbers`.

        All processes get the same bits. A gradient that no process has stays None, as with one process.
        """
        if self.count == 1:
            return list(numbers)
        counts = [float(p.grad is not None) for p in parameters]
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        table = torch.tensor([*numbers, *counts], dtype=torch.float64, device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        *gradients, table = self._sums([*gradients, table])
        sums = table.tolist()
        sums, counts = sums[: len(numbers)], sums[len(numbers) :]
        for parameter, gradient, count in zip(parameters, gradients, counts, strict=True):
            parameter.grad = gradient if count else None
        return sums

    def _sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the processes, sent as one flat tensor for each dtype."""
        places: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(tensors):
            places.setdefault(tensor.dtype, []).append(place)
        flat = {
            dtype: torch.cat([tensors[place].flatten() for place in of_dtype])
            for dtype, of_dtype in places.items()
        }
        group = self._group_for(tensors[0])
        with self.communication():
            if group is None:
                dist.barrier(self.group)  # fails if a process has ended, which NCCL does not notice
            works = [
                dist.all_reduce(buffer, group=group, async_op=True) for buffer in flat.values()
            ]
            for work in works:
                assert work is not None  # only a process outside the group gets None
                work.wait()
        sums = list(tensors)
        for dtype, of_dtype in places.items():
            parts = flat[dtype].split([tensors[place].numel() for place in of_dtype])
            for place, part in zip(of_dtype, parts, strict=True):
                sums[place] = part.view(tensors[place].shape)
        return sums

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """Return the group that sends a tensor: None, the default group, for tensors on a GPU."""
        return self.group if tensor.device.type == "cpu" else None


def started_processes() -> Processes:
    """Return the processes that `torchrun` started, by its environment variables; without them, one process.

    Raises:
        ConfigurationError: The variables are incomplete or invalid.
    """
    count = _number("WORLD_SIZE", default="1")
    if count <= 1:
        return Processes()
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigurationError(
            f"The environment variable WORLD_SIZE is {count}, but {', '.join(missing)} is not set. {REMEDY}"
        )
    return Processes(rank=_number("RANK", below=count), count=count)


@contextmanager
def joined(device: str, timeout: datetime.timedelta = START_TIMEOUT) -> Iterator[Processes]:
    """Connect the processes that `torchrun` started, and choose the GPU of this process by ``base.device``.

    An error inside the block is the error of all processes, each of which names the one that raised it. `timeout` is
    the longest wait for the others.

    Raises:
        ConfigurationError: The environment or the devices do not allow several processes.
        LorakitError: The processes cannot reach each other.
    """
    processes = started_processes()
    if processes.count == 1:
        yield processes
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(
            f"base.device is {device!r}, but {processes.count} processes need one device each. Set it to auto, cpu or "
            "cuda: each process then takes its own GPU."
        )
    connects = not dist.is_initialized()  # false inside a script that has connected its processes
    try:
        store = shared_store()
        longest = max(timeout, START_TIMEOUT)
        backend = _agreed_backend(store, processes, device, longest)
        if connects:
            dist.init_process_group(
                backend,
                store=store,
                rank=processes.rank,
                world_size=processes.count,
                timeout=longest,
            )
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        peers = Peers(store, processes.rank, processes.count, timeout)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LorakitError(
            f"Process {processes.rank} of {processes.count} cannot reach the others at {address}: "
            f"{first_sentence(error)}. Start all of them with {COMMAND}. On several machines, set GLOO_SOCKET_IFNAME "
            "to the network card that connects them."
        ) from error
    try:
        yield replace(processes, group=group, peers=peers)
    except BaseException as error:
        peers.record(error)
        raise
    finally:
        peers.close()
        dist.destroy_process_group(None if connects else group)


def _backend(device: str) -> str:
    """Return the backend for the gradients, and make the GPU of this process the current one."""
    if device == "cpu" or not torch.cuda.is_available():
        pick_device(device)  # rejects `cuda`
        return "gloo"
    number, gpus = _number("LOCAL_RANK"), torch.cuda.device_count()
    if number >= gpus:
        raise ConfigurationError(
            f"base.device is {device!r}, and this machine has {counted(gpus, 'GPU')} for more processes. Start with "
            f"--nproc-per-node {gpus}, or set base.device to cpu."
        )
    torch.cuda.set_device(number)  # `cuda` without a number then means this GPU
    return "nccl"


def _agreed_backend(
    store: Store, processes: Processes, device: str, timeout: datetime.timedelta
) -> str:
    """Return the backend of all processes. One with another or none is an error in all: they would wait for it."""
    kinds = {"nccl": "a GPU", "gloo": "the CPU"}
    try:
        own = _backend(device)
    except (ConfigurationError, RuntimeError) as error:  # torch: the GPU cannot be used
        own = (str(error) or type(error).__name__).splitlines()[0]
    keys, read = ([f"{k}/{rank}" for rank in range(processes.count)] for k in ("backend", "read"))
    store.set(keys[processes.rank], own)
    store.wait(keys, timeout)
    outcomes = [outcome.decode() for outcome in store.multi_get(keys)]
    store.set(read[processes.rank], "")
    if processes.is_first:  # without torchrun, it holds the store that the others read
        store.wait(read, timeout)
    for rank, outcome in enumerate(outcomes):
        if outcome not in kinds:
            others = f"Process {rank} of {processes.count} failed: {outcome}"
            raise ConfigurationError(outcome if rank == processes.rank else others)
        if outcome != outcomes[0]:
            raise ConfigurationError(
                f"Process {rank} of {processes.count} computes on {kinds[outcome]}, and process 0 on "
                f"{kinds[outcomes[0]]}. Give all processes the same base.device. If it is the same, PyTorch finds no "
                "GPU in some: check the driver, the build of PyTorch and CUDA_VISIBLE_DEVICES there, or set "
                "base.device to cpu."
            )
    return own


def _number(variable: str, *, default: str | None = None, below: int | None = None) -> int:
    """Return the value of an environment variable that counts from 0."""
    text = os.environ.get(variable, default)
    if text is None or not text.isdecimal() or (below is not None and int(text) >= below):
        limit = "" if below is None else f" below {below}"
        raise ConfigurationError(
            f"The environment variable {variable} is {text!r}; torchrun sets it to a whole number{limit}. {REMEDY}"
        )
    return int(text)
