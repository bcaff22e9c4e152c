"""An adapter on an input embedding that shares its table with the output head."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import logits
from torch import Tensor
from transformers import MobileBertConfig, MobileBertForMaskedLM, PreTrainedModel

from lorakit.adapters import Adapters, attach, handle_of
from lorakit.errors import AdapterStateError, ConfigurationError, TargetError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

ARCHITECTURES = ("gpt2", "llama", "gemma2", "opt", "bart", "t5")
"""With a plain table, a scaled one (gemma2, bart), and tables of encoder and decoder (bart, t5)."""


def build(arch: str) -> PreTrainedModel:
    model = tiny_models.build(arch, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def adapt(model: PreTrainedModel, **options) -> Adapters:
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="embedding", **options))
    randomise(adapters, scale=0.1)
    return adapters


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="eager")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_head_is_left_alone(arch: str) -> None:
    model = build(arch)
    head, hidden = model.get_output_embeddings(), torch.randn(2, 3, 32)
    base, base_head = logits(model), head(hidden)
    adapters = adapt(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    assert torch.equal(head(hidden), base_head)
    adapters.merge()
    assert_close(logits(model), adapted)
    assert torch.equal(head(hidden), base_head)
    adapters.unmerge()
    assert_close(logits(model), adapted)
    assert head.weight is model.get_input_embeddings().weight
    adapters.detach()
    assert torch.equal(logits(model), base)
    assert head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_tie_head_acts_on_the_head_too(arch: str) -> None:
    model = build(arch)
    head, table, hidden = (
        model.get_output_embeddings(),
        model.get_input_embeddings(),
        torch.randn(2, 3, 32),
    )
    base = logits(model)
    adapters = adapt(model, tie_head=True)
    path = next(path for path, module in model.named_modules() if module is table)
    A, B = (adapters.modules()[path].get_parameter(f"lora_{side}") for side in "AB")
    changed = table.weight + 1.5 * (B @ A).T
    assert (changed - table.weight).abs().max() > 1e-2
    assert_close(head(hidden), hidden @ changed.T)

    adapted = logits(model)
    adapters.merge()
    assert_close(head(hidden), hidden @ changed.T)
    assert_close(logits(model), adapted)
    adapters.detach()
    assert torch.equal(logits(model), base)
    assert head.weight is table.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "tie_head"),
    [*((arch, False) for arch in ARCHITECTURES), ("gpt2", True), ("llama", True), ("gemma2", True)],
)
@pytest.mark.parametrize("state", ["active", "merged", "exported"])
def test_saved_model_computes_the_same(
    arch: str, tie_head: bool, state: str, tmp_path: Path
) -> None:
    model = build(arch)
    base = logits(model)
    adapters = adapt(model, tie_head=tie_head)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    if state == "merged":
        adapters.merge()
    elif state == "exported":
        adapters.merge(keep_base=False)
        assert handle_of(model) is None
        assert model.config.tie_word_embeddings is False or tie_head or arch in ("bart", "t5")
        assert_close(logits(model), adapted)
    loaded = reloaded(model, tmp_path)
    assert_close(logits(loaded), adapted)
    if state != "exported":  # the live model's configuration is still the base's
        assert model.config.tie_word_embeddings is True
        adapters.detach()
        assert torch.equal(logits(model), base)
        assert_close(logits(reloaded(model, tmp_path / "base")), base)


@pytest.mark.parametrize(
    ("arch", "targets"),
    [("bart", "head"), ("t5", "embedding"), ("bert", "embedding"), ("roberta", "head")],
)
def test_tensors_that_stay_tied_are_in_the_export(
    arch: str, targets: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BART ties four tables, and BERT the biases of its head too. The configuration ties all or none."""
    model = tiny_models.build(arch, "masked-lm" if "bert" in arch else None)
    adapters = attach(model, LoRA(rank=2, targets=targets))
    randomise(adapters)
    adapted = logits(model)
    assert_close(logits(reloaded(model, tmp_path / "active")), adapted)
    adapters.merge(keep_base=False)
    assert "were one tensor and are two after the merge" in caplog.text
    assert model.config.tie_word_embeddings
    assert_close(logits(reloaded(model, tmp_path / "merged")), adapted)


@pytest.mark.parametrize(
    ("arch", "settings", "targets", "message"),
    [
        ("llama", {"tie_word_embeddings": True}, "attention.q", "embedding"),
        ("llama", {"tie_word_embeddings": False}, "embedding", "share"),
        ("llama", {"tie_word_embeddings": True}, ("embedding", "head"), "both"),
        ("bart", {}, "embedding", "an encoder and its decoder have two"),
        ("t5", {}, "embedding", "an encoder and its decoder have two"),
        ("t5", {}, "encoder.embed_tokens", "an encoder and its decoder have two"),
        ("bert", {}, "embedding", "tie_head"),
    ],
)
def test_tie_head_where_it_cannot_be(arch: str, settings: dict, targets: str, message: str) -> None:
    model = tiny_models.build(arch, **settings)
    keys = list(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        attach(model, LoRA(rank=2, targets=targets, tie_head=True))
    assert list(model.state_dict()) == keys
    assert handle_of(model) is None


def test_tie_head_on_a_head_that_is_only_read() -> None:
    """MobileBERT concatenates the head's weight with another one, and never calls the head."""
    config = MobileBertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        embedding_size=8,
        intra_bottleneck_size=16,
    )
    with pytest.raises(ConfigurationError, match=r"'cls.predictions.decoder' without calling it"):
        attach(MobileBertForMaskedLM(config), LoRA(rank=2, targets="embedding", tie_head=True))


# --- methods of transformers that tie and resize -----------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA(rank=2, train_modules="embed_tokens"), FullFineTuning()])
def test_tie_weights_leaves_a_trained_copy_and_the_base(method: Method) -> None:
    model = build("llama")
    base = logits(model)
    adapters = attach(model, method)
    randomise(adapters)
    adapted = logits(model)
    model.tie_weights()
    model.resize_token_embeddings(model.config.vocab_size)  # ties too
    assert torch.equal(logits(model), adapted)
    adapters.detach()
    assert torch.equal(logits(model), base)


def test_tie_weights_leaves_a_merged_embedding() -> None:
    model = build("llama")
    base = logits(model)
    adapters = adapt(model)
    adapters.merge()
    merged = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), merged)
    adapters.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"targets": "head"}),
        ("llama", {"targets": "attention", "train_modules": "embed_tokens"}),
        ("t5", {"targets": "embedding"}),  # the decoder's is tied to `shared`, which is resized
    ],
)
def test_a_resize_does_not_drop_an_adapter(arch: str, options: dict) -> None:
    model = build(arch)
    adapters = attach(model, LoRA(rank=2, **options))
    randomise(adapters)
    before, count = logits(model), model.config.vocab_size
    for arguments in ({"new_num_tokens": count + 6}, {"pad_to_multiple_of": 64}):
        with pytest.raises(AdapterStateError, match="Resize the base before you attach"):
            model.resize_token_embeddings(**arguments)
    assert torch.equal(logits(model), before)
    assert model.config.vocab_size == count


@pytest.mark.parametrize("arch", ["llama", "t5", "bart"])
@pytest.mark.parametrize(
    "options", [{"targets": ("embedding", "head")}, {"train_modules": ("embed_tokens", "lm_head")}]
)
def test_a_resize_to_the_same_size_changes_nothing(arch: str, options: dict) -> None:
    """The own method of T5 puts `shared` in place of the embeddings that it calls."""
    model = build(arch)
    randomise(attach(model, LoRA(rank=2, **options)))
    before, count = logits(model), model.config.vocab_size
    for arguments in ((None,), (count,), (count, None)):
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()
    assert torch.equal(logits(model), before)


def test_a_model_with_adapters_elsewhere_is_resized() -> None:
    model = build("llama")
    adapters = attach(model, LoRA(rank=2))
    randomise(adapters)
    before, count = logits(model), model.config.vocab_size
    model.resize_token_embeddings(count + 6)
    assert torch.equal(logits(model)[..., :count], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("arch", ["t5", "bart"])
@pytest.mark.parametrize("modules", [("shared",), ("shared", "lm_head")])
def test_an_embedding_that_is_never_called_is_not_trained_alone(
    arch: str, modules: tuple[str, ...]
) -> None:
    model = build(arch)
    with pytest.raises(TargetError, match=r"shared' is to be trained.*decoder\.embed_tokens"):
        attach(model, LoRA(rank=2, train_modules=modules))
    attach(model, LoRA(rank=2, train_modules=(*modules, "embed_tokens")))
