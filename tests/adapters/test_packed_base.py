"""Adapters on a base that another library than bitsandbytes has quantised: exact unmerged, and a clear error else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packed_models
import pytest
import tiny_models
import torch
from packed_models import KINDS, packed_and_twin
from random_adapters import randomise
from tiny_models import logits
from transformers import Trainer, TrainingArguments

from lorakit.adapters import Adapters, attach, count_parameters, load
from lorakit.errors import AdapterStateError, BaseModelError, ConfigurationError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.quantising import quantise
from lorakit.training.sharding import require_shardable

ALL_LINEAR = LoRA(targets="all-linear", rank=2, dropout=0.0)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
"""Products in float32 of the same numbers; their scales are applied in another order."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(*models: Any, names: tuple[str, ...] = ("a",)) -> list[Adapters]:
    """Attach the same random adapters to each model."""
    handles = []
    for model in models:
        for seed, name in enumerate(names):
            adapters = attach(model, ALL_LINEAR, name=name, seed=seed)
            randomise(adapters, name, seed=seed)
        handles.append(adapters)
    return handles


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "phi3"])  # phi3 adapts slices of fused layers
def test_an_adapter_acts_as_on_the_unpacked_base(kind: str, arch: str) -> None:
    model, twin = packed_and_twin(kind, arch)
    before = logits(model)
    torch.testing.assert_close(before, logits(twin), **TOLERANCE)
    adapters, _ = adapted(model, twin)
    assert not torch.allclose(logits(model), before, **TOLERANCE)
    torch.testing.assert_close(logits(model), logits(twin), **TOLERANCE)
    adapters.detach()
    assert logits(model).equal(before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_unpacked_base(kind: str, checkpointing: bool) -> None:
    gradients = []
    for model in packed_and_twin(kind):
        (adapters,) = adapted(model)
        if checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        batch = tiny_models.example_batch("llama", model)
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    for mine, twins in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, twins, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rows_of_one_batch_use_different_adapters(kind: str) -> None:
    handles = adapted(*packed_and_twin(kind), names=("a", "b"))
    ids = torch.arange(3, 18).view(3, 5)
    outputs = []
    for adapters in handles:
        with adapters.per_sample(["a", None, "b"]):
            outputs.append(adapters.model(ids).logits)  # type: ignore[operator]
    torch.testing.assert_close(*outputs, **TOLERANCE)


def test_an_adapter_moves_between_the_packed_and_the_unpacked_base(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = packed_and_twin(kind)
    (adapters,) = adapted(model)
    adapters.save(tmp_path)
    expected = logits(model)
    adapters.detach()
    if kind == "CopiesIn":  # with ordinary tensors in the mapping the weights can be compared
        load(twin, tmp_path)
    else:
        load(model, tmp_path)
        assert logits(model).equal(expected)
        load(twin, tmp_path)
        assert "quantised weights and runs on float32 ones" in caplog.text
    torch.testing.assert_close(logits(twin), expected, **TOLERANCE)


def test_counts_are_those_of_the_unpacked_base(kind: str) -> None:
    model, twin = packed_and_twin(kind)
    assert count_parameters(model, ALL_LINEAR) == count_parameters(twin, ALL_LINEAR)


def test_the_trainer_trains_on_it(kind: str, tmp_path: Path) -> None:
    model, _ = packed_and_twin(kind)
    model.is_quantized = (
        True  # as transformers marks it; the Trainer then rejects a model without adapters
    )
    (adapters,) = adapted(model)
    before = [p.detach().clone() for p in adapters.trainable_parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 19).view(2, 8)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not any(b.equal(p) for b, p in zip(before, adapters.trainable_parameters(), strict=True))
    adapters.detach()
    assert model.is_quantized


# --- what is an error -----------------------------------------------------------------------------


def test_nothing_merges_into_it(kind: str, tmp_path: Path) -> None:
    model, _ = packed_and_twin(kind)
    (adapters,) = adapted(model)
    expected = logits(model)
    message = (
        rf"proj.weight' is quantised \({kind}\), and lorakit reads only the numbers of bitsandbytes"
    )
    for attempt in (
        adapters.merge,
        lambda: adapters.merge(keep_base=False),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: [*adapters.merged_weights()],
    ):
        with pytest.raises(AdapterStateError, match=message):
            attempt()
    assert logits(model).equal(expected)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}], ids=str)
def test_methods_that_read_the_weight_are_refused(kind: str, options: Any) -> None:
    model, _ = packed_and_twin(kind)
    before = logits(model)
    with pytest.raises(
        ConfigurationError, match=rf"dora and init='pissa' read .* quantised \({kind}\)"
    ):
        attach(model, LoRA(targets="attention.qv", **options))
    assert logits(model).equal(before)


@pytest.mark.parametrize(
    "method",
    [FullFineTuning(), FullFineTuning(top_layers=1), LoRA(train_modules="mlp"), BitFit()],
    ids=["full", "top layer", "train_modules", "bitfit"],
)
def test_its_layers_are_not_trained_in_full(kind: str, method: Any) -> None:
    arch = "qwen2" if isinstance(method, BitFit) else "llama"  # q, k and v have biases
    model, _ = packed_and_twin(kind, arch)
    if isinstance(method, BitFit) and kind in ("float8_e4m3fn", "Int8Tensor"):
        attach(model, method)  # the biases are ordinary parameters
        return
    for attempt in (attach, count_parameters):
        with pytest.raises(ConfigurationError, match=rf"belongs to a quantised layer \({kind}\)"):
            attempt(model, method)


@pytest.mark.parametrize(
    ("layer_class", "reason"),
    [
        (packed_models.InferenceOnly, "its output has no gradient"),
        (packed_models.RefusesTraining, "in training it raises NotImplementedError"),
    ],
)
def test_a_kernel_that_stops_gradients_is_found_before_training(
    layer_class: Any, reason: str, tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    packed_models.pack(model, packed_models.GroupedInt4)
    (adapters,) = adapted(model)
    adapters.save(tmp_path)
    expected = logits(model)
    other = tiny_models.build("llama")
    packed_models.pack(other, layer_class)
    with pytest.raises(
        AdapterStateError, match=rf"No gradient passes through '.*q_proj'.*{reason}"
    ):
        attach(other, ALL_LINEAR)
    load(other, tmp_path)  # for inference
    assert logits(other).equal(expected)


def test_it_is_not_quantised_again_or_sharded(kind: str) -> None:
    model, _ = packed_and_twin(kind)
    with pytest.raises(BaseModelError, match="quantised in its checkpoint already"):
        quantise(model, "nf4")
    with pytest.raises(ConfigurationError, match=f"is quantised to {kind}"):
        require_shardable(model, BaseConfig(name="x"))
