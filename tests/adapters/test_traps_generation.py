"""generate and pipeline on a model whose adapters are attached, merged and detached."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, pipeline

from lorakit.adapters import Adapters, attach
from lorakit.methods.lora.method import LoRA

WAYS: dict[str, dict] = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}
BATCH = {
    "input_ids": torch.tensor([[0, 0, 5, 8, 13], [21, 34, 55, 89, 7]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict:
    return WAYS[request.param]


def generate(model: PreTrainedModel, way: dict, batch: dict[str, Tensor] = BATCH) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, **way, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)


def adapted(*names: str) -> tuple[PreTrainedModel, Adapters]:
    model = tiny_models.build("llama")
    for name in names:
        adapters = attach(model, LoRA(rank=2, alpha=3, targets="all-linear"), name=name, seed=1)
    for seed, name in enumerate(names):
        randomise(adapters, name, seed=seed)
    return model, adapters


def test_attached_merged_detached(way: dict) -> None:
    base = generate(tiny_models.build("llama"), way)
    model, adapters = adapted("a")
    actual = generate(model, way)
    assert not torch.equal(actual, base)
    # Expected output: the merged adapter, in a model without lorakit.
    plain, exported = adapted("a")
    exported.merge(keep_base=False)
    assert torch.equal(actual, generate(plain, way))
    adapters.merge()
    assert torch.equal(generate(model, way), actual)
    adapters.unmerge()
    adapters.activate(None)
    assert torch.equal(generate(model, way), base)
    adapters.activate("a")
    assert torch.equal(generate(model, way), actual)
    adapters.detach()
    assert torch.equal(generate(model, way), base)


@pytest.mark.parametrize("name", ["greedy", "without cache", "beam", "several beams"])
def test_each_row_by_its_own_adapter(name: str) -> None:
    """Beams and returned sequences repeat a row in place, and the copies need the same adapter."""
    way = WAYS[name]
    model, adapters = adapted("a", "b")
    rows: list[str | None] = ["b", None, "a"]
    batch = {key: value[[0, 1, 1]] for key, value in BATCH.items()}
    with adapters.per_sample(rows):
        actual = generate(model, way, batch)
    expected = []
    for i, row in enumerate(rows):
        adapters.activate(row)
        expected.append(
            generate(model, way, {key: value[i : i + 1] for key, value in batch.items()})
        )
    assert torch.equal(actual, torch.cat(expected))
    assert not torch.equal(expected[1], expected[2])  # the same prompt, with and without an adapter


def test_encoder_decoder_beams_by_row() -> None:
    """The encoder's batch has the rows, the decoder's batch their beams."""
    model = tiny_models.build("t5")
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="all-linear"), seed=1)
    randomise(adapters)
    way = {"num_beams": 2, "do_sample": False}
    with adapters.per_sample(["default", None]):
        actual = generate(model, way)
    expected = []
    for i, choice in enumerate(("default", None)):
        adapters.activate(choice)
        expected.append(generate(model, way, {k: v[i : i + 1] for k, v in BATCH.items()}))
    assert torch.equal(actual, torch.cat(expected))


# --- pipeline -------------------------------------------------------------------------------------


@pytest.fixture
def text_model() -> tuple[PreTrainedModel, object]:
    tokenizer = tiny_tokenizer()
    model = tiny_models.build("llama", vocab_size=len(tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def test_pipeline_attached_merged_detached(text_model: tuple[PreTrainedModel, object]) -> None:
    model, tokenizer = text_model
    prompts = ["The river pub", "A man is playing"]

    def answers() -> list[str]:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        results = pipe(prompts, do_sample=False, max_new_tokens=6)
        return [result[0]["generated_text"] for result in results]

    base = answers()
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="all-linear"), seed=1)
    randomise(adapters)
    actual = answers()
    assert actual != base
    assert all(text.startswith(prompt) for text, prompt in zip(actual, prompts, strict=True))
    adapters.merge()
    assert answers() == actual
    adapters.detach()
    assert answers() == base


def test_continuous_batching_uses_the_active_adapter() -> None:
    model, adapters = adapted("a")
    settings = GenerationConfig(max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)

    def generated() -> list[list[int]]:
        outputs = model.generate_batch([[21, 34, 55]], settings, continuous_batching_config=config)
        return [one.generated_tokens for one in outputs.values()]

    active = generated()
    adapters.activate(None)
    assert generated() != active
