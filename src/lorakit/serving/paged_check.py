"""Find out whether a model can be computed over pages, by computing a few tokens both ways."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorakit.compute.agreement import largest_rounding, relative_difference
from lorakit.compute.batching import attention_windows, context_length
from lorakit.compute.mode import evaluating
from lorakit.evaluation.prompt_cache import ARGUMENT
from lorakit.serving.paged_attention import (
    NAME,
    PagedStorage,
    Part,
    Step,
    UnsupportedModelError,
    compute,
)

LENGTHS = (21, 9, 34)
"""Tokens of the requests of the check: some end within a page."""


def checked_storage(model: PreTrainedModel, cache_bytes: int, size: int) -> PagedStorage:
    """Return the storage of a paged cache for a model, after a check that the model computes the same with it.

    Args:
        model: A causal language model.
        cache_bytes: Memory for keys and values.
        size: Tokens of a page.

    Raises:
        UnsupportedModelError: The model cannot be computed over pages. The message ends a sentence.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(f"its attention is {model.config._attn_implementation!r}")
    arguments = inspect.signature(model.forward).parameters
    missing = [n for n in ("position_ids", "logits_to_keep") if n not in arguments]
    if missing:
        raise UnsupportedModelError(f"its forward method does not take {' and '.join(missing)}")
    with evaluating(model):
        layers, heads, width = _shape(model)
    dtype = model.dtype
    bytes_per_page = 2 * layers * size * heads * width * dtype.itemsize
    pages = cache_bytes // bytes_per_page
    least = sum(-(-length // size) for length in LENGTHS)
    if pages < least:
        raise UnsupportedModelError(
            f"the cache of {cache_bytes:,} bytes holds {pages * size} tokens, and {least * size} are needed"
        )
    make = (size, layers, heads, width, dtype, model.device)
    with evaluating(model):
        _check(model, PagedStorage(least, *make))
    return PagedStorage(pages, *make)


def _shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return the number of layers, of key heads, and the width of a head, from a forward pass of one token."""
    try:
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=ids, use_cache=True, **{ARGUMENT: cache})
        shapes = {(*layer.keys.shape, layer.values.shape) for layer in cache.layers}  # type: ignore[union-attr]
    except Exception as error:  # any model of any library
        raise UnsupportedModelError(f"its keys and values cannot be read ({error})") from error
    if len(shapes) != 1 or len(first := next(iter(shapes))) != 5 or first[:4] != tuple(first[4]):
        raise UnsupportedModelError("its layers have keys or values of different shapes")
    return len(cache.layers), int(first[1]), int(first[3])


def _check(model: PreTrainedModel, storage: PagedStorage) -> None:
    """Compute prompts in two chunks and a next token, together and each alone without pages."""
    stock = model.config._attn_implementation or "sdpa"
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    try:
        ids = (torch.tensor([prompt], device=model.device) for prompt in prompts)
        expected = torch.stack([model(input_ids=i, use_cache=False).logits[0, -1] for i in ids])
        model.set_attn_implementation(NAME)
        found, windows = _over_pages(model, storage, prompts)
    except UnsupportedModelError:
        raise
    except Exception as error:  # any model of any library
        raise UnsupportedModelError(f"a trial failed ({type(error).__name__}: {error})") from error
    finally:
        model.set_attn_implementation(stock)
    _require_windows(model, windows)
    difference = relative_difference(found, expected)
    if not difference <= largest_rounding(model.dtype):
        raise UnsupportedModelError(
            f"its scores over pages differ from its own by {difference:.1%}, so its attention is of another kind"
        )


def _over_pages(
    model: PreTrainedModel, storage: PagedStorage, prompts: Sequence[list[int]]
) -> tuple[Tensor, set[int | None]]:
    """Return the scores after each prompt (N, V), and the windows of the layers.

    The scores are computed in three steps: half of each prompt, all but one token, the last token.
    """
    numbers = iter(range(1, storage.pages + 1))
    pages = [[next(numbers) for _ in range(-(-len(p) // storage.size))] for p in prompts]
    past = [0] * len(prompts)
    scores, windows = torch.empty(0), set[int | None]()
    for stops in zip(*((len(p) // 2, len(p) - 1, len(p)) for p in prompts), strict=True):
        parts = [
            Part(prompt[start:stop], start, own)
            for prompt, start, stop, own in zip(prompts, past, stops, pages, strict=True)
        ]
        step = Step(storage, parts, model.device)
        scores = compute(model, step)
        windows |= step.windows
        past = list(stops)
    return scores, windows


def _require_windows(model: PreTrainedModel, windows: set[int | None]) -> None:
    """Reject a model whose masks hide keys that its layers would see over pages.

    Such keys are farther away than the trial's prompts are long, so its scores do not show them. Masks are not built
    for this attention: it needs the window as an argument. `windows` are those that the layers passed to it.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if unknown := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(f"it has layers with {', '.join(unknown)}")
    context = context_length(model)
    hidden = attention_windows(model) - windows
    if used := [window for window in hidden if context is None or window < context]:
        raise UnsupportedModelError(
            f"its sliding window of {min(used):,} tokens is in its masks alone"
        )
