"""`attach` adds tensors to the model; `detach` restores the model bit by bit."""

from __future__ import annotations

import covering_array
import pytest
import tiny_models
import torch
from covering_array import Case, fresh_model
from layouts import LAYOUTS, WITHOUT_BIAS
from logits import assert_differ, randomise
from tiny_models import tensors_of
from torch import nn

from lorakit import FullFineTuning, LoRA, attach
from lorakit.errors import ConfigurationError, TargetError

CASES = covering_array.cases()
every_case = pytest.mark.parametrize("case", covering_array.few_cases(), ids=str)


def test_every_pair_of_settings_has_a_case():
    covered = set().union(*map(covering_array.pairs, CASES))
    refused = {
        (("dora", True), ("init", "pissa")),
        (("targets", "head"), ("train", "head")),
        (("arch", "mixtral"), ("targets", "mlp")),
        (("arch", "mixtral"), ("targets", "all-linear")),
        (("arch", "granite"), ("task", "classification")),
        *(
            (("arch", arch), ("bias", bias))
            for arch in WITHOUT_BIAS
            for bias in ("all", "lora_only")
        ),
    }
    assert covering_array.all_pairs() - covered == refused
    assert len(set(CASES)) == len(CASES)


# --- names ---------------------------------------------------------------------------------------


def trained_in_full(case: Case, model: nn.Module) -> set[str]:
    """Return the names of the base parameters that a case trains, from the definition of its options."""
    names = set()
    for path, module in model.named_modules():
        if any(f".{path}".endswith(f".{entry}") for entry in case.train_modules):
            names |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    if case.bias == "all":
        names |= {n for n, _ in model.named_parameters() if "bias" in n}  # PEFT's rule
    if case.bias == "lora_only":
        biases = {f"{path}.bias" for path in case.expected}
        names |= {n for n, _ in model.named_parameters() if n in biases}
    return names


@every_case
def test_only_the_adapter_is_trainable(case: Case):
    model = case.model()
    expected = trained_in_full(case, model)
    for path in case.expected:
        expected |= {f"{path}.adapters.default.lora_A", f"{path}.adapters.default.lora_B"}
        if case.dora:
            expected.add(f"{path}.adapters.default.magnitude")
    handle = attach(model, case.method())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {id(p) for p in handle.trainable_parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@every_case
def test_shapes_and_scaling_match_the_formula(case: Case):
    """Each projection, or slice of one, has r (in + out) parameters and the case's scaling."""
    model = case.model()
    handle = attach(model, case.method())
    for path, target in case.expected.items():
        layer, module = model.get_submodule(path), handle.modules()[path]
        weight = layer.weight
        transposed = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
        n_out, n_in = weight.shape[::-1] if transposed else (len(weight), weight[0].numel())
        rank = 3 if case.rank == "pattern" and path == min(case.expected) else 2
        alpha = 5.0 if path.endswith(tuple(case.alpha_pattern)) and case.alpha_pattern else 3.0
        assert module.scaling == alpha / (rank if case.scaling == "standard" else rank**0.5)
        rows = sum(map(len, target.slices)) or n_out
        assert module.lora_A.numel() == max(1, len(target.slices)) * rank * n_in
        assert module.lora_B.numel() == rows * rank
        assert module.magnitude is None or module.magnitude.shape == (rows,)
        assert (module.magnitude is not None) == case.dora


# --- nothing else changes ------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict:
    """Return all state of a model that another library or the user could observe."""
    state = {}
    for path, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if "hooks" not in key}
        hooks = {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}
        state[path] = (
            type(module),
            list(attributes),
            list(module._modules),
            hooks,
            module.training,
        )
    return state


def tensors(model: nn.Module) -> dict[str, tuple]:
    """Return identity, address, requires_grad and dtype of each tensor by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (id(t), t.data_ptr(), t.requires_grad, t.dtype) for name, t in named}


def half_frozen(case: Case) -> nn.Module:
    """Return the case's model with every second parameter frozen, to check that the flags are restored."""
    model = case.model()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return model


@every_case
def test_keys_and_types_stay_after_attach(case: Case):
    model = case.model()
    keys, types = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    attach(model, case.method())
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert {n: type(m) for n, m in model.named_modules() if ".adapters" not in n} == types


@every_case
@torch.no_grad()
def test_base_and_detached_model_are_bit_identical(case: Case):
    model = half_frozen(case)
    batch = case.batch(model)
    state = tensors_of(model)
    logits, seen, known = model(**batch).logits, snapshot(model), tensors(model)

    handle = attach(model, case.method())
    randomise(handle.trainable_parameters(), seed=1)
    assert_differ(model(**batch).logits, logits)
    handle.activate(None)
    assert torch.equal(model(**batch).logits, logits)
    handle.activate("default")
    handle.detach()

    assert torch.equal(model(**batch).logits, logits)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert tensors(model) == known
    assert snapshot(model) == seen
    assert handle.names == ()


@pytest.mark.parametrize("arch", LAYOUTS)
@torch.no_grad()
def test_detach_after_full_fine_tuning_and_a_merge(arch: str):
    """A trained or a merged tensor has replaced every base tensor."""
    model = fresh_model(arch, tiny_models.natural_head(arch))
    batch = tiny_models.example_batch(arch, model)
    logits, seen, known = model(**batch).logits, snapshot(model), tensors(model)
    handle = attach(model, FullFineTuning(), name="full")
    randomise(handle.trainable_parameters("full"), seed=1)
    attach(model, LoRA(rank=2, alpha=3.0), name="lora")
    randomise(handle.trainable_parameters("lora"), seed=1)
    handle.activate("full")
    assert_differ(model(**batch).logits, logits)
    handle.merge("lora")
    assert_differ(model(**batch).logits, logits)
    handle.detach()
    assert torch.equal(model(**batch).logits, logits)
    assert tensors(model) == known
    assert snapshot(model) == seen


def test_a_failed_attach_leaves_nothing_behind():
    model = fresh_model("llama", "causal-lm")
    seen, known = snapshot(model), tensors(model)
    with pytest.raises(TargetError, match="lm_heed"):
        attach(model, LoRA(rank=2, targets=("attention.qv", "lm_heed")))
    with pytest.raises(ConfigurationError, match="exceeds the width"):
        attach(model, LoRA(rank=33, targets="attention.q"))
    with pytest.raises(TargetError, match="no module of the model"):
        attach(model, LoRA(rank=2, train_modules="scorr"))
    assert tensors(model) == known
    assert snapshot(model) == seen


def test_a_suffix_that_matches_a_layer_of_the_new_head():
    model = tiny_models.build("roberta", "sequence-classification")
    names = r"such as intermediate\.dense, output\.dense, or"
    with pytest.raises(
        TargetError, match=rf"adapts 'classifier\.dense', and 'classifier' .* {names}"
    ):
        attach(model, LoRA(rank=2, targets="dense", train_modules="classifier"))


# --- rejected pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "settings", "error", "says"),
    [
        ("bert", {"dora": True, "init": "pissa"}, ConfigurationError, "exclude each other"),
        ("llama", {"targets": "head", "train_modules": "lm_head"}, TargetError, "adapts 'lm_head'"),
        ("mixtral", {"targets": "mlp"}, TargetError, "stacked weights"),
        ("mixtral", {"targets": "all-linear", "dropout": 0.5}, ConfigurationError, "dropout"),
        ("t5", {"bias": "lora_only"}, ConfigurationError, "have none"),
        *(
            (arch, {"bias": bias}, ConfigurationError, "ha(s|ve) none")
            for arch in WITHOUT_BIAS
            for bias in ("all", "lora_only")
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_rejected_pairs(arch: str, settings: dict, error: type[Exception], says: str):
    model = fresh_model(arch, tiny_models.natural_head(arch))
    with pytest.raises(error, match=says):
        attach(model, LoRA(rank=2, **settings))
