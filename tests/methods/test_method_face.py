"""The interface that all methods share: attach, count, save, load, activate, copy, detach."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from method_cases import CASES, COMPILED, QUICK, Case, seen
from random_adapters import randomise
from tiny_models import tensors_of
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from lorakit import Adapters, attach, count_parameters, load
from lorakit.errors import AdapterStateError
from lorakit.models.tree import is_of_adapter


def only(*archs: str) -> list:
    return marked(name for name, case in CASES.items() if case.arch in archs)


def marked(names: Iterable[str]) -> list:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.fixture(params=marked(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def adapted(case: Case, **settings) -> tuple[PreTrainedModel, Adapters]:
    """The case's model with its method attached and its tensors randomised."""
    model = case.model(**settings)
    adapters = attach(model, case.method, seed=1)
    randomise(adapters, scale=0.1)
    return model, adapters


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_the_base_comes_back(case: Case) -> None:
    model = case.model()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = tensors_of(model)
    types = {path: type(module) for path, module in model.named_modules()}
    plain = case.plain_batch(model)
    base = seen(model, plain)

    adapters = attach(model, case.method, seed=1)
    assert {p: type(m) for p, m in model.named_modules() if not is_of_adapter(f"{p}.")} == types
    assert [key for key in model.state_dict() if not is_of_adapter(key)] == list(before)
    randomise(adapters, scale=0.1)
    actual = seen(model, case.batch(model))
    adapters.activate(None)
    assert torch.equal(seen(model, plain), base)
    adapters.activate("default")
    assert torch.equal(seen(model, case.batch(model)), actual)
    adapters.detach()
    assert torch.equal(seen(model, plain), base)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_adapter_acts_and_all_of_it_is_trained(case: Case) -> None:
    model, adapters = adapted(case)
    trainable = {id(p) for p in adapters.trainable_parameters()}
    assert trainable == {id(p) for p in model.parameters() if p.requires_grad}
    before = seen(model, case.batch(model))
    model(**case.batch(model)).logits.tanh().sum().backward()
    gradients = [p.grad for p in adapters.trainable_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    randomise(adapters, scale=0.3, seed=1)
    assert (seen(model, case.batch(model)) - before).abs().max() > 1e-2


def test_counting_builds_nothing(case: Case) -> None:
    with torch.device("meta"):
        shapes = case.model()
    counts = count_parameters(shapes, case.method)
    _, adapters = adapted(case)
    assert counts == adapters.summary().counts
    assert counts.trainable == sum(p.numel() for p in adapters.trainable_parameters())
    assert type(case.method).__name__ in str(adapters.summary())


def test_file_round_trip(case: Case, tmp_path: Path) -> None:
    model, adapters = adapted(case)
    expected = seen(model, case.batch(model))
    tensors = trained(model)
    adapters.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"lorakit.json", "lorakit_model.safetensors", "README.md"}

    other = case.model()
    loaded = load(other, tmp_path / "saved", name="default", trainable=True)
    assert loaded.method() == case.method
    assert loaded.summary().counts == adapters.summary().counts
    assert trained(other).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in trained(other).items())
    assert torch.equal(seen(other, case.batch(other)), expected)
    loaded.save(tmp_path / "again")
    first, second = (
        json.loads((tmp_path / folder / "lorakit.json").read_text())
        for folder in ("saved", "again")
    )
    assert first["files"] == second["files"]

    third = case.model()
    with pytest.raises(AdapterStateError, match=r"'again' is frozen.* load it with trainable=True"):
        load(third, tmp_path / "again").trainable_parameters()
    assert torch.equal(seen(third, case.batch(third)), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_whole_and_independent(case: Case, copied) -> None:
    model, adapters = adapted(case)
    expected = seen(model, case.batch(model))
    twin = copied(model)
    randomise(adapters, scale=0.3, seed=1)
    assert torch.equal(seen(twin, case.batch(twin)), expected)
    assert not torch.equal(seen(model, case.batch(model)), expected)


def test_a_weight_other_than_one_is_refused(case: Case) -> None:
    model, adapters = adapted(case)
    attach(model, case.method, name="other")
    for choice in ({"default": 0.5}, {"default": 1.0, "other": 1.0}):
        with pytest.raises(AdapterStateError, match="not linear in a weight"):
            adapters.activate(choice)
    adapters.activate({"default": 1.0})
    expected = seen(model, case.batch(model))
    adapters.activate("default")
    assert torch.equal(seen(model, case.batch(model)), expected)


def test_merge_is_exact_or_refused(case: Case) -> None:
    model, adapters = adapted(case)
    expected = seen(model, case.batch(model))
    if case.merges:
        adapters.merge()
        assert torch.equal(seen(model, case.batch(model)), expected)
        adapters.unmerge()
    else:
        with pytest.raises(AdapterStateError, match="cannot be merged"):
            adapters.merge()
        assert adapters.merged == {}
    assert adapters.active == {"default": 1.0}
    assert torch.equal(seen(model, case.batch(model)), expected)


def test_save_pretrained_never_gives_the_bare_base(case: Case, tmp_path: Path) -> None:
    model, _ = adapted(case)
    expected = seen(model, case.batch(model))
    model.save_pretrained(tmp_path)
    if case.merges:
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(seen(loaded, case.batch(loaded)), expected)
    else:
        for loader in (type(model), AutoModel):
            with pytest.raises(ValueError, match=r"'default' is no part of the weights"):
                loader.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks", "backend"), COMPILED)
def test_a_compiled_model_follows(name: str, blocks: int, backend: str) -> None:
    case = CASES[name]
    torch._dynamo.reset()
    model = case.model(num_hidden_layers=blocks).requires_grad_(False)
    compiled = torch.compile(model, backend=backend)
    base = seen(compiled, case.plain_batch(model))
    adapters = attach(model, case.method, seed=1)
    randomise(adapters, scale=0.1)
    for choice, batch in (("default", case.batch(model)), (None, case.plain_batch(model))) * 2:
        adapters.activate(choice)
        expected = seen(model, batch)
        torch.testing.assert_close(seen(compiled, batch), expected)
    torch.testing.assert_close(expected, base)
    adapters.activate("default")
    parameters = adapters.trainable_parameters()
    gradients = [
        torch.autograd.grad(m(**case.batch(model)).logits.tanh().sum(), parameters)
        for m in (model, compiled)
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", only("gpt2", "llama", "bert"))
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    case = CASES[name]
    model, adapters = adapted(case)
    model.train()
    model.config.use_cache = False

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)  # dropout of the base
        loss = model(**case.batch(model)).logits.tanh().sum()
        # Another pass, with virtual tokens at other positions, before the blocks are recomputed.
        seen(model, {k: torch.cat([x[:, :2], x], 1) for k, x in case.batch(model).items()})
        return list(torch.autograd.grad(loss, adapters.trainable_parameters()))

    expected = gradients()
    # Renamed within transformers 5.
    rename = "activation_checkpointing_enable"
    (getattr(model, rename, None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", only("gpt2", "llama", "t5", "gpt-neox"))
def test_generation_with_and_without_a_cache(name: str) -> None:
    case = CASES[name]
    model, adapters = adapted(case)

    def generate(batch: dict[str, Tensor], **way) -> tuple[Tensor, Tensor]:
        prompt = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
        way = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, **way}
        record = {"return_dict_in_generate": True, "output_logits": True}
        result = model.generate(**prompt, **way, **record, pad_token_id=0)
        return result.sequences, torch.stack(result.logits)

    for beams in (1, 3):
        ids, logits = generate(case.batch(model), num_beams=beams)
        again, expected = generate(case.batch(model), num_beams=beams, use_cache=False)
        assert torch.equal(ids, again)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    adapters.activate(None)
    _, base = generate(case.plain_batch(model), num_beams=3)
    assert (base - logits).abs().max() > 1e-2
