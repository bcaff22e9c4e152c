"""lorakit's attention and dropout in models of transformers: same results, and a clean removal."""

import random
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_runs
import torch
from torch import nn

from lorakit.compute import trials
from lorakit.compute.computation import choose_computation, confirm_computation
from lorakit.compute.trials import SHORT_COMPLETION, SHORT_PROMPT, try_faster
from lorakit.data import DataTask
from lorakit.models import faster
from lorakit.models.loading import load_base
from lorakit.ops.flex_attention import flex_masked_attention
from lorakit.tasks import LanguageExample

TAKING = ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt-neox", "bert", "roberta"]


def build(arch, **settings):
    model = tiny_models.build(arch, **settings)
    model.set_attn_implementation("sdpa")
    return model


def padded_batch():
    ids = torch.tensor([[5, 7, 3, 9, 8, 2], [6, 4, 2, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("arch", TAKING)
def test_logits_and_gradients_are_those_of_the_stock_attention(arch):
    model, batch = build(arch), padded_batch()
    seen = batch["attention_mask"].bool()

    def compute():
        model.zero_grad()
        logits = model(**batch).logits
        logits = logits[seen] if logits.ndim == 3 else logits
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = compute()
    assert try_faster(model, batch, batch) == ""
    assert model.config._attn_implementation == faster.ATTENTION
    logits, gradients = compute()
    torch.testing.assert_close(logits, before[0], rtol=1e-4, atol=1e-5)
    # The order of float32 sums differs, and a small gradient has the rounding errors of large summands.
    scale = max(gradient.norm() for gradient in before[1])
    for ours, stock in zip(gradients, before[1], strict=True):
        assert (ours - stock).norm() <= 1e-5 * scale
    faster.make_stock(model)
    assert model.config._attn_implementation == faster.STOCK
    torch.testing.assert_close(compute(), before, rtol=0, atol=0)


def test_an_attention_that_computes_something_else_is_found_out(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(
        faster, "masked_attention", lambda q, k, v, *rest, **options: q.transpose(1, 2).contiguous()
    )
    assert "would differ" in try_faster(model, padded_batch(), padded_batch())
    assert model.config._attn_implementation == faster.STOCK


def test_a_change_of_the_head_alone_is_found_out(monkeypatch):
    """Some heads have layers of their own before the vocabulary (ModernBERT's decoder)."""
    model = build("llama")
    monkeypatch.setattr(trials, "make_faster", lambda model: model.lm_head.weight.data.mul_(2))
    assert "would differ" in try_faster(model, padded_batch(), padded_batch())


def test_a_decoder_whose_backbone_cannot_be_called_alone_keeps_its_layers(monkeypatch):
    model = build("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **inputs: tuple(forward(**inputs)))
    model.forward = lambda **inputs: SimpleNamespace(logits=model.lm_head(model.model(**inputs)[0]))
    assert "it raised" in try_faster(model, padded_batch(), padded_batch())
    assert model.config._attn_implementation == faster.STOCK


def test_a_compiled_attention_is_tried_where_the_head_alone_is_trained():
    model = build("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert try_faster(model, padded_batch(), padded_batch(), "attention") == ""


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_logits_of_trials_are_those_of_a_few_tokens(arch, tmp_path):
    """A vocabulary of 262,144 and two examples of 2,048 tokens would take 4 GB for each copy of them."""
    folder = tiny_runs.save_base(tmp_path / "base", arch)
    base = load_base(folder, task=tiny_models.natural_head(arch), dtype="float32")
    rows = []
    base.model.get_output_embeddings().register_forward_hook(
        lambda head, args, output: rows.append(output[..., 0].numel())
    )
    ids = random.Random(0).choices(range(3, 50), k=500)
    examples = [
        LanguageExample(
            input_ids=ids[:length],
            loss_mask=[i >= 100 for i in range(length)],
            prompt_length=100,
            prompt="",
            completion="",
        )
        for length in (500, 400)
    ]
    task = DataTask(name="completion")
    choice = choose_computation(base.model, task, training=True, packing=True)
    confirmed = confirm_computation(choice, base, examples)
    assert confirmed.faster == "layers"
    assert rows
    assert max(rows) <= 2 * (SHORT_PROMPT + SHORT_COMPLETION)


def test_an_attention_that_fails_is_not_taken(monkeypatch):
    model = build("llama")

    def fails(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(faster, "masked_attention", fails)
    assert (
        try_faster(model, padded_batch(), padded_batch())
        == "it raised RuntimeError: no such kernel"
    )
    assert model.config._attn_implementation == faster.STOCK


def test_a_model_with_an_attention_of_its_own_keeps_it():
    model = tiny_models.build("llama")  # eager
    assert try_faster(model, padded_batch(), padded_batch()) == ""
    assert model.config._attn_implementation == "eager"


def test_dropout_modules_are_faster_and_put_back():
    model = build("gpt2").train()
    dropouts = [m for m in model.modules() if type(m) is nn.Dropout and m.p]
    assert dropouts
    faster.make_faster(model)
    x = torch.ones(2000)
    for module in dropouts:
        torch.manual_seed(0)
        dropped = (module(x) == 0).float().mean()
        assert abs(dropped - module.p) < 5 * (module.p * (1 - module.p) / len(x)) ** 0.5
        assert torch.equal(module.eval()(x), x)
    faster.make_stock(model)
    assert not any("forward" in vars(module) for module in dropouts)


def flex_without_dropout(*tensors, scale, dropout):
    assert not dropout
    return flex_masked_attention(*tensors, scale=scale)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_compiled_attention_gives_the_logits_of_the_stock_one(monkeypatch):
    """FlexAttention as on a GPU; on a CPU it is not compiled and has no gradients."""
    monkeypatch.setattr(faster, "masked_attention", flex_without_dropout)
    model, batch = build("llama"), padded_batch()
    with torch.no_grad():
        before = model(**batch).logits
        faster.use_own_attention(model)
        after = model(**batch).logits
    seen = batch["attention_mask"].bool()
    assert model.config._attn_implementation == faster.ATTENTION
    torch.testing.assert_close(after[seen], before[seen], rtol=1e-4, atol=1e-5)


def test_another_device_keeps_the_stock_attention_unless_kernels_are_compiled():
    model, task = build("llama"), DataTask(name="completion")
    meta = build("llama").to("meta")
    assert choose_computation(meta, task, training=True).faster == "none"
    assert choose_computation(meta, task, training=True, compiled=True).faster == "attention"
    assert choose_computation(model, task, training=True).faster == "layers"
    assert choose_computation(model, task).faster == "none"
    assert try_faster(model, padded_batch(), padded_batch(), "attention") == ""
    assert model.config._attn_implementation == faster.ATTENTION
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_compiled_attention_without_gradients_is_not_taken(monkeypatch):
    """FlexAttention on a CPU has a correct forward pass, but no backward pass."""
    monkeypatch.setattr(faster, "masked_attention", flex_without_dropout)
    model = build("llama")
    reason = try_faster(model, padded_batch(), padded_batch(), "attention")
    assert reason.startswith(
        "it raised NotImplementedError: FlexAttention does not support backward"
    )
    assert model.config._attn_implementation == faster.STOCK
