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
from safetensors import safe_open
from tiny_models import logits
from torch import nn
from transformers import Trainer, TrainingArguments

from lorakit.adapters import Adapters, attach, count_parameters, load
from lorakit.errors import (
    AdapterStateError,
    BaseModelError,
    ConfigurationError,
    TargetError,
)
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


def test_an_adapter_moves_between_the_packed_and_the_unpacked_base(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = packed_and_twin(kind)
    (adapters,) = adapted(model)
    adapters.save(tmp_path)
    expected = logits(model)
    adapters.detach()
    load(model, tmp_path)
    assert logits(model).equal(expected)
    if kind != "Int8Tensor":  # which does not tell the tensors inside it
        assert not caplog.text
    load(twin, tmp_path)
    assert "quantised weights and runs on float32 ones" in caplog.text
    torch.testing.assert_close(logits(twin), expected, **TOLERANCE)


def test_counts_are_those_of_the_unpacked_base(kind: str) -> None:
    model, twin = packed_and_twin(kind)
    assert count_parameters(model, ALL_LINEAR) == count_parameters(twin, ALL_LINEAR)


def trainer(model: Any, folder: Path) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 35).view(4, 8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_the_trainer_resumes_from_a_checkpoint_without_the_packed_numbers(
    kind: str, tmp_path: Path
) -> None:
    model, _ = packed_and_twin(kind)
    model.is_quantized = True  # as transformers does; the Trainer rejects such a model
    (adapters,) = adapted(model)
    new = logits(model)
    trainer(model, tmp_path).train()
    trained = logits(model)
    assert not trained.equal(new)
    adapters.detach()
    assert model.is_quantized

    folder = tmp_path / "checkpoint-1"
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.mlp.up_proj.adapters.a.lora_A" in keys
    assert all(".adapters." in key for key in keys)
    with pytest.raises(Exception, match="its numbers are not written"):
        type(model).from_pretrained(folder)

    again, _ = packed_and_twin(kind)
    adapted(again)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(folder))
    assert logits(again).equal(trained)


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
        lambda: [*adapters.merged_weights()],
    ):
        with pytest.raises(AdapterStateError, match=message):
            attempt()
    assert logits(model).equal(expected)
    with pytest.raises(AdapterStateError, match="The pushed folder would not load"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_it_is_not_cast(kind: str) -> None:
    model, _ = packed_and_twin(kind)
    model.hf_quantizer = object()
    (adapters,) = adapted(model)
    for cast in (model.half, model.float):
        with pytest.raises(AdapterStateError, match="cannot be cast to another dtype"):
            cast()
    del model.hf_quantizer
    adapters.detach()
    assert model.float() is model


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}], ids=str)
def test_methods_that_read_the_weight_are_refused(kind: str, options: Any) -> None:
    model, _ = packed_and_twin(kind)
    before = logits(model)
    with pytest.raises(
        ConfigurationError, match=rf"(dora reads|pissa' read) the weight .* quantised \({kind}\)"
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
        (packed_models.InferenceOnlyWithoutError, "its output has no gradient"),
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
        AdapterStateError, match=rf"No gradient passes through '.*k_proj'.*{reason}"
    ):
        attach(other, ALL_LINEAR)
    with pytest.raises(AdapterStateError, match="No gradient passes through"):
        load(other, tmp_path, trainable=True)
    load(other, tmp_path).detach()  # for inference
    attach(other, LoRA(targets="head")).detach()  # below which nothing is trained
    load(other, tmp_path)
    assert logits(other).equal(expected)


def test_it_is_not_quantised_again_or_sharded(kind: str) -> None:
    model, _ = packed_and_twin(kind)
    with pytest.raises(BaseModelError, match="quantised in its checkpoint already"):
        quantise(model, "nf4")
    with pytest.raises(ConfigurationError, match=f"is quantised to {kind}"):
        require_shardable(model, BaseConfig(name="x"))


def test_parameters_that_a_library_manages_are_refused(tmp_path: Path) -> None:
    """Its mapping would write a merged or trained weight into the base's."""
    adapters = attach(tiny_models.build("llama"), ALL_LINEAR)
    adapters.save(tmp_path)
    for change in (
        lambda model: packed_models.pack(model, packed_models.with_managed_parameters),
        lambda model: setattr(model, "ct_decompress_hook", None),
    ):
        model = tiny_models.build("llama")
        change(model)
        for attempt in (
            lambda m=model: attach(m, ALL_LINEAR),
            lambda m=model: load(m, tmp_path),
        ):
            with pytest.raises(
                AdapterStateError, match="CompressedTensorsConfig\\(dequantize=True"
            ):
                attempt()


def test_experts_in_tensors_of_a_library_are_refused() -> None:
    model = tiny_models.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    levels = torch.ones(experts.down_proj.shape, dtype=torch.int8)
    packed = packed_models.Int8Tensor(levels, torch.ones(1))
    experts.down_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(TargetError, match="in a form that cannot be adapted: quantised"):
        attach(model, LoRA(targets="experts"))
