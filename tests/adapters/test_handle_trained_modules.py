"""Trained base tensors: copies replace the base's tensors, and detach restores these bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import assert_same_tensors, logits, tensors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach, handle_of, load
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

TIED = ("gpt2", "t5", "bart")
METHODS: dict[str, tuple[str, Method]] = {
    **{f"full {arch}": (arch, FullFineTuning()) for arch in (*TIED, "llama", "bert", "vit")},
    "top layer": ("gpt2", FullFineTuning(top_layers=1)),
    "tied table in full": ("gpt2", LoRA(rank=2, train_modules="wte")),
    "tied head in full": ("gpt2", LoRA(rank=2, train_modules="lm_head")),
    "biases": ("bart", LoRA(rank=2, bias="all")),
    "biases of adapted layers": ("bert", LoRA(rank=2, bias="lora_only")),
    "norms": ("llama", LoRA(rank=2, train_modules=("input_layernorm", "norm"))),
}


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Method]:
    arch, method = METHODS[request.param]
    return tiny_models.build(arch), method


def objects(model: nn.Module) -> dict[str, int]:
    """Tensor id by name; tied names share an id."""
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def test_the_base_comes_back(case: tuple[PreTrainedModel, Method]) -> None:
    model, method = case
    flags = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(i % 3 != 0)
        flags[name] = parameter.requires_grad
    base, before, identities = logits(model), tensors_of(model), objects(model)

    adapters = attach(model, method)
    torch.testing.assert_close(logits(model), base)  # it starts as the base
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=0.1)
    logits_now = model(**tiny_models.example_batch(model.config.model_type, model)).logits
    logits_now.square().sum().backward()
    assert all(p.grad is not None for p in adapters.trainable_parameters() if p.numel() > 1)
    optimizer.step()
    randomise(adapters, scale=0.1)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2

    adapters.activate(None)
    assert torch.equal(logits(model), base)
    adapters.activate("default")
    assert torch.equal(logits(model), adapted)
    adapters.merge()
    torch.testing.assert_close(logits(model), adapted, atol=2e-4, rtol=0)
    adapters.unmerge()
    assert torch.equal(logits(model), adapted)
    adapters.detach()
    assert torch.equal(logits(model), base)
    assert_same_tensors(tensors_of(model), before)
    assert objects(model) == identities
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arch", TIED)
def test_a_tied_tensor_gets_the_gradients_of_all_its_places(arch: str) -> None:
    model = tiny_models.build(arch)
    batch = tiny_models.example_batch(arch, model)
    names = [n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight]
    (expected,) = torch.autograd.grad(
        model(**batch).logits.tanh().sum(), [model.get_parameter(names[0])]
    )
    adapters = attach(model, FullFineTuning())
    model(**batch).logits.tanh().sum().backward()
    table = model.get_input_embeddings().weight
    assert any(table is p for p in adapters.trainable_parameters())
    torch.testing.assert_close(table.grad, expected)


def test_file_round_trip(case: tuple[PreTrainedModel, Method], tmp_path: Path) -> None:
    model, method = case
    base = logits(model)
    adapters = attach(model, method)
    randomise(adapters, scale=0.1)
    adapted = logits(model)
    adapters.save(tmp_path / "adapter")
    adapters.detach()
    loaded = load(model, tmp_path / "adapter", name="loaded")
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    loaded.activate(None)
    assert torch.equal(logits(model), base)
    loaded.detach()
    assert torch.equal(logits(model), base)


# --- several over one base ------------------------------------------------------------------------


def two_classifiers(tmp_path: Path) -> tuple[PreTrainedModel, Adapters, dict[str | None, Tensor]]:
    """Two adapters with different heads, loaded onto one model, and the output of each alone."""
    alone: dict[str | None, Tensor] = {}
    for seed, name in enumerate(("topic", "tone")):
        model = tiny_models.build("roberta", head="sequence-classification")
        alone[None] = logits(model)
        adapters = attach(model, LoRA(rank=2, alpha=3, train_modules="classifier"), name=name)
        randomise(adapters, seed=seed)
        alone[name] = logits(model)
        adapters.save(tmp_path / name)
    model = tiny_models.build("roberta", head="sequence-classification")
    for name in ("topic", "tone"):
        adapters = load(model, tmp_path / name)
    assert adapters.names == ("topic", "tone")
    return model, adapters, alone


def test_each_classifier_has_its_own_head(tmp_path: Path) -> None:
    model, adapters, alone = two_classifiers(tmp_path)
    assert (alone["topic"] - alone["tone"]).abs().max() > 1e-2
    for choice in ("topic", None, "tone", "topic"):
        adapters.activate(choice)
        torch.testing.assert_close(logits(model), alone[choice])
    adapters.remove("topic")
    adapters.activate("tone")
    torch.testing.assert_close(logits(model), alone["tone"])
    adapters.detach()
    assert torch.equal(logits(model), alone[None])


def test_rows_with_heads_of_their_own(tmp_path: Path) -> None:
    model, adapters, alone = two_classifiers(tmp_path)
    for rows in (["topic", "tone"], ["tone", None], [None, "topic"], ["tone", "tone"]):
        with adapters.per_sample(rows):
            actual = logits(model)
        expected = torch.stack([alone[row][i] for i, row in enumerate(rows)])
        torch.testing.assert_close(actual, expected)


def test_gradients_reach_each_rows_head(tmp_path: Path) -> None:
    model = tiny_models.build("roberta", head="sequence-classification")
    for name in ("topic", "tone"):
        adapters = attach(model, LoRA(rank=2, alpha=3, train_modules="classifier"), name=name)
    randomise(adapters)
    batch = tiny_models.example_batch("roberta", model)
    with adapters.per_sample(["tone", "topic"]):
        together = model(**batch).logits.tanh()
    together.sum().backward()
    for i, name in enumerate(("tone", "topic")):
        adapters.activate(name)
        value = model(**batch).logits.tanh()[i].sum()
        parameters = adapters.trainable_parameters(name)
        expected = torch.autograd.grad(value, parameters)
        assert min(gradient.abs().max() for gradient in expected) > 1e-6
        torch.testing.assert_close(
            [p.grad for p in parameters], list(expected), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("arch", "head", "method"),
    [("vit", None, FullFineTuning()), ("bert", "masked-lm", BitFit())],
    ids=["embeddings of an image", "head of a masked language model"],
)
def test_rows_of_a_module_that_holds_adapted_layers(
    arch: str, head: str | None, method: Method, checkpointing: bool
) -> None:
    """It has trained parameters itself, and so have layers inside it."""
    model = tiny_models.build(arch, head)
    adapters = attach(model, method, name="a")
    randomise(adapters)
    batch = tiny_models.example_batch(arch, model)
    batch = {name: torch.cat([value, value.flip(0)]) for name, value in batch.items()}
    separate = {}
    for choice in ("a", None):
        adapters.activate(choice)
        separate[choice] = model(**batch).logits
    parameters = adapters.trainable_parameters()
    for rows in (["a", None], ["a", None, "a", None], [None, None, "a", None]):
        repeat = 4 // len(rows)
        every = [row for row in rows for _ in range(repeat)]
        expected = torch.stack([separate[row][i] for i, row in enumerate(every)])
        with adapters.per_sample(rows, repeat=repeat):
            actual = (
                checkpoint(lambda: model(**batch).logits, use_reentrant=False)
                if checkpointing
                else model(**batch).logits
            )
            gradients = torch.autograd.grad(actual.tanh().sum(), parameters)
        torch.testing.assert_close(actual, expected)
        expected_gradients = torch.autograd.grad(
            expected.tanh().sum(), parameters, retain_graph=True
        )
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


def test_copies_over_a_bfloat16_base() -> None:
    """They have its dtype, and become float32 masters under autocast."""
    model = tiny_models.build("llama").to(torch.bfloat16)
    adapters = attach(model, LoRA(rank=2, train_modules="lm_head"))
    batch = tiny_models.example_batch("llama", model)
    logits(model)
    head = model.lm_head.weight
    assert head.dtype == torch.bfloat16
    for parameter in adapters.trainable_parameters():
        assert (parameter.dtype == torch.float32) == (parameter is not head)
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).logits.float().tanh().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapters.trainable_parameters())
    assert head is model.lm_head.weight
    assert head.grad.any()
    adapters.activate(None)
    assert model.lm_head.weight.dtype == torch.bfloat16
    logits(model)


def test_full_fine_tuning_beside_lora() -> None:
    """One adapter trains the weights, the other adds a delta: each uses the base, never the other adapter."""
    model = tiny_models.build("gpt2")
    base = logits(model)
    adapters = attach(model, FullFineTuning(), name="full")
    randomise(adapters, scale=0.1)
    full = logits(model)
    attach(model, LoRA(rank=2, init="pissa"), name="lora")
    torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=0)  # starts from the base
    randomise(adapters, "lora")
    lora = logits(model)
    plain = tiny_models.build("gpt2")
    other = attach(plain, LoRA(rank=2, init="pissa"), name="lora")
    randomise(other)
    torch.testing.assert_close(lora, logits(plain))
    for choice, expected in (("full", full), ("lora", lora), (None, base), ("full", full)):
        adapters.activate(choice)
        assert torch.equal(logits(model), expected)
    adapters.merge("full")
    torch.testing.assert_close(logits(model), full)
    adapters.unmerge()
    adapters.remove("full")
    adapters.activate("lora")
    assert torch.equal(logits(model), lora)
    adapters.remove("lora")
    assert handle_of(model) is None
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only", "targets": "decoder"}])
def test_a_tied_bias_is_trained_under_the_name_that_the_model_reads(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """BERT ties cls.predictions.bias to cls.predictions.decoder.bias, which alone is read."""
    model = tiny_models.build("bert", "masked-lm")
    batch = {"input_ids": torch.tensor([[5, 8, 13]])}
    base = model(**batch).logits
    adapters = attach(model, LoRA(rank=2, **settings))  # type: ignore[arg-type]
    copies = adapters._get(None).trained_tensors().values()
    (copy,) = (copy for copy in copies if len(copy) == model.config.vocab_size)
    with torch.no_grad():
        copy += 1
    torch.testing.assert_close(model(**batch).logits, base + 1)
    adapters.save(tmp_path / "saved")
    adapters.detach()
    assert torch.equal(model(**batch).logits, base)
    load(model, tmp_path / "saved")
    torch.testing.assert_close(model(**batch).logits, base + 1)
