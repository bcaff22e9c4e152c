"""`model.generate` of transformers in padded batches: the base alone, and PEFT in its two ways to serve adapters.

A batch takes the requests that wait, up to a limit, and pads their prompts on the left. It runs until its longest
answer is complete. Each answer counts as ended when its own last token is computed.

Modes: base (no adapters); mixed (`adapter_names`, one per row); switching (`set_adapter`, a batch has one adapter).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.serving_load import Answer, Batches, Request
from benchmarks.systems.serving import Setup
from lorakit.models.loading import load_base
from lorakit.models.processor import in_own_thread

BATCH = 32
NAMES = {
    "base": "transformers generate, static batches",
    "mixed": "PEFT adapter_names, static batches",
    "switching": "PEFT set_adapter, one adapter at a time",
}

Waiting = list[tuple[Request, Answer]]


def start(setup: Setup, *, mode: str, batch: int = BATCH) -> StaticBatches:
    """Load the base."""
    model = in_own_thread(lambda: load_base(setup.base, dtype=setup.dtype)).model  # type: ignore[arg-type]
    return StaticBatches(model, setup, mode, batch)


class StaticBatches(Batches):
    """Batches of one model, one after the other."""

    def __init__(self, model: PreTrainedModel, setup: Setup, mode: str, batch: int) -> None:
        self.name = NAMES[mode]
        self.mode = mode
        self._model: Any = model.requires_grad_(False)
        self._setup = setup
        self._batch = batch
        super().__init__()

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load the adapters that are not loaded yet."""
        in_own_thread(lambda: self._load(adapters))

    def _load(self, adapters: Sequence[str]) -> None:
        for name in adapters:
            path = self._setup.adapters / name
            if not isinstance(self._model, PeftModel):
                self._model = PeftModel.from_pretrained(
                    self._model, path, adapter_name=name, autocast_adapter_dtype=False
                )
                # Without this the base in mixed batches has the adapter's dtype, and other costs.
                self._model.eval()
            elif name not in self._model.peft_config:
                self._model.load_adapter(str(path), name, autocast_adapter_dtype=False)

    def take(self, waiting: Waiting) -> Waiting:
        """Take the oldest requests; in the mode switching those with the adapter of the oldest."""
        adapter = waiting[0][0].adapter
        fitting = [
            item for item in waiting if self.mode != "switching" or item[0].adapter == adapter
        ]
        batch = fitting[: self._batch]
        waiting[:] = [item for item in waiting if not any(item is taken for taken in batch)]
        return batch

    @torch.inference_mode()
    def compute(self, batch: Waiting) -> None:
        """Generate until the longest answer is complete."""
        options: dict[str, Any] = {}
        adapters = [request.adapter for request, _ in batch]
        if self.mode == "mixed" and any(adapters):
            options["adapter_names"] = [name or "__base__" for name in adapters]
        if self.mode == "switching" and adapters[0]:
            self._model.set_adapter(adapters[0])
        ids, mask = _padded([request.prompt for request, _ in batch])
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(request.tokens for request, _ in batch),
            eos_token_id=None,
            pad_token_id=0,
            streamer=_Streamer(batch),
            **options,
        )


def _padded(prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths as (rows, longest), padded on the left, and their mask."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


class _Streamer(BaseStreamer):
    """Reports the tokens of each step to the answers of a batch."""

    def __init__(self, batch: Waiting) -> None:
        self._batch = batch
        self._saw_prompts = False

    def put(self, value: Tensor) -> None:
        if not self._saw_prompts:  # generate puts the prompts first
            self._saw_prompts = True
            return
        for request, answer in self._batch:
            if len(answer.times) < request.tokens:
                answer.token()
                if len(answer.times) == request.tokens:
                    answer.end()

    def end(self) -> None:
        """Answers end with their last token."""
