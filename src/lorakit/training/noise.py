"""Random numbers in training. Dropout depends on the seed, the step and the example alone.

So a step has the same result on any number of processes, however it is cut into batches, padded or packed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.compute.objective import Batch, LanguageModellingLoss, tolerance
from lorakit.data.batches import IGNORED
from lorakit.errors import ConfigurationError
from lorakit.models.compiling import compiled_blocks_idle
from lorakit.models.sharding import local_part, pop_reached
from lorakit.ops.dropout import CPU, Draw, Keys, token_words
from lorakit.ops.keyed_dropout import keyed
from lorakit.ops.seeding import in_one_thread, seed_device, seeded
from lorakit.ops.streams import mixed
from lorakit.tasks import Example
from lorakit.training.job import TRAINED, Job

LABELS = 2**24
"""Position of the first label in the key of an example, beyond all positions of its inputs."""

BLOCK = 256
"""Tokens of a packed row whose keys are computed together."""

DROPPED_TABLES = ("deberta", "deberta-v2")
"""Architectures with dropout on a table of positions (rows, F), which has the same mask in every batch. Its number of
rows may equal that of a batch's tokens."""


@contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators inside the block, and restore afterwards all that training seeds for its batches.

    These are the global generators of Python, NumPy, PyTorch's CPU and `device`.

    Raises:
        LorakitError: Another thread of the process trains or plans.
    """
    with in_one_thread():
        of_python, of_numpy = random.getstate(), np.random.get_state()
        try:
            with seeded(seed, [device]):
                yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def keyed_noise(job: Job, batch: Batch, step: int, number: int = 0) -> Iterator[None]:
    """Draw the random numbers of a batch's forward and backward pass from the seed, the step and its examples.

    All batches of a step start with the same states of the random generators. Compiled blocks draw masks by place, so
    with them the states depend on `number`, the place of the batch in this process's share of the step.
    """
    compiled = job.config.compile
    text = f"noise, seed {job.config.seed}, step {step}, batch {number if compiled else 0}"
    _seed(text, job.device)
    if compiled:
        yield
    else:
        with keyed(batch_keys(job, batch)):
            yield


def batch_keys(job: Job, batch: Batch) -> Keys:
    """Return the keys of a batch's tokens.

    In a causal language model, the key of a token is a hash of the tokens up to it, so packed examples that share a
    prefix agree. In other models it is a hash of the whole example and the position.
    """
    ids = batch["input_ids"]
    rows, width = ids.shape
    if isinstance(job.objective, LanguageModellingLoss):
        packed_at = batch.get("position_ids")
        causal = cache(lambda: _causal_keys(ids, packed_at, batch["attention_mask"]))
        return Keys(
            rows,
            lambda length: causal() if length == width else None,
            flat_lengths=(width,),
            positions=packed_at,
        )
    example = cache(lambda: _example_keys(batch))
    labels = batch["labels"].shape[1:]  # of an encoder-decoder
    return Keys(
        rows,
        cache(lambda length: mixed(example()[:, None] + _words(ids.new_zeros(length)))),
        flat_lengths=() if job.model.config.model_type in DROPPED_TABLES else (width, *labels),
    )


def _causal_keys(ids: Tensor, packed_at: Tensor | None, mask: Tensor) -> Tensor:
    """Return a hash of each token and those that it attends to, (R, T)."""
    if packed_at is None:
        return mixed(_words(ids).cumsum(1))
    words = token_words(ids, packed_at)[:, None]
    # By blocks of queries: the products have eight times the size of the mask.
    sums = [(part * words).sum(-1) for part in mask[:, 0].split(BLOCK, 1)]
    return mixed(torch.cat(sums, 1))


def _example_keys(batch: Batch) -> Tensor:
    """Return a hash of each example, with its labels in an encoder-decoder, (B,)."""
    keys = (_words(batch["input_ids"]) * batch["attention_mask"]).sum(1)
    labels = batch["labels"]
    if labels.ndim == 2:
        keys = keys + (_words(labels, LABELS) * (labels != IGNORED)).sum(1)
    return keys


def _words(ids: Tensor, first: int = 0) -> Tensor:
    """Return a hash of each token and its position in its row."""
    return token_words(ids, torch.arange(first, first + ids.shape[-1], device=ids.device))


def _seed(text: str, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`; models may use those of Python and NumPy too."""
    seed = random.Random(text).getrandbits(32)
    for each in {torch.device("cpu"), device}:
        seed_device(seed, each)
    random.seed(seed)
    np.random.seed(seed)


def require_keyed_noise(job: Job) -> None:
    """Reject a model whose random numbers would depend on the number of processes, if the run has several.

    Computes two examples, and compares the states of the generators with those after the draws of keyed dropout. If
    the model has drawn other numbers, the gradient of both examples must equal the sum of their gradients.

    Raises:
        ConfigurationError: The adapter or the base has noise that is not keyed, or it is compiled and has dropout.
    """
    count = job.processes.count
    if count == 1:
        return
    first = job.train[:50]
    examples = [max(first, key=len), min(first, key=len)]
    batch = job.collate(examples)
    _seed("noise", job.device)
    with (
        compiled_blocks_idle(job.model),
        keyed(keys := batch_keys(job, batch)),
        job.autocast(),
        torch.no_grad(),
    ):
        job.objective.loss_sum(job.model, batch)
    states = _random_states()
    _seed("noise", job.device)
    for _ in range(keys.draws):
        Draw(0.5, CPU)
    only_keyed = states == _random_states()
    if only_keyed and not keys.draws:
        return
    if job.config.compile:
        raise ConfigurationError(
            f"compile is true and {_source(job)}. In compiled blocks, random numbers would depend on the number of "
            f"processes, here {count}. Set compile to false or the dropout to 0, or train with one process."
        )
    if not (only_keyed and not keys.unknown) and _depends_on_batch(job, examples):
        shapes = ", ".join(str(tuple(shape)) for shape in sorted(keys.unknown)[:3])
        where = f" for tensors of shape {shapes}" if shapes else " outside torch.nn.Dropout"
        raise ConfigurationError(
            f"The model draws random numbers{where}: {_source(job)}. These random numbers would depend on the number "
            f"of processes, here {count}. Set its rate to 0, or train with one process."
        )


def _depends_on_batch(job: Job, examples: Sequence[Example]) -> bool:
    """Return whether the gradient of examples differs from the sum of their gradients, beyond rounding."""
    together = _gradient(job, examples)
    apart = sum(_gradient(job, [example]) for example in examples)
    return not (together - apart).norm() <= 5 * tolerance(job.model) * together.norm()


def _gradient(job: Job, examples: Sequence[Example]) -> Tensor:
    """Return the gradient of all trained parameters, in float32; of sharded ones, the part of this process."""
    parameters, batch = list(job.parameters.values()), job.collate(examples)
    with keyed_noise(job, batch, step=0):
        with job.autocast():
            loss = job.objective.loss_sum(job.model, batch)
        loss.backward()
    gradients = [
        local_part(p.grad if p.grad is not None else torch.zeros_like(p)) for p in parameters
    ]
    for parameter in parameters:
        parameter.grad = None
        pop_reached(parameter)
    return torch.cat([gradient.float().flatten() for gradient in gradients])


def _random_states() -> list[Any]:
    """Return the states of all generators."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states: Any = np.random.get_state(legacy=False)
    numpy = states["state"]
    return [
        *(state.tolist() for state in (torch.get_rng_state(), *gpus)),
        random.getstate(),
        (numpy["key"].tolist(), numpy["pos"]),
    ]


def _source(job: Job) -> str:
    """Return where noise comes from: the adapter's dropout, or the settings of the base."""
    modules = job.adapters.modules(TRAINED).values()
    rates = {rate for module in modules if (rate := getattr(module, "dropout", 0.0))}
    settings = job.model.config.get_text_config().to_dict()
    of_base = ", ".join(
        f"{name} {value}"
        for name, value in settings.items()
        if "drop" in name and isinstance(value, float) and value > 0
    )
    if rates and not of_base:
        return f"lora.dropout is {max(rates)}"
    return f"the base '{job.base.source.name}' has noise ({of_base or 'not among its settings'})"
