"""The last block computed only for used tokens, with the same loss and gradients."""

import dataclasses
from typing import ClassVar

import pytest
import tiny_models
import torch
from test_packing import example
from torch import nn

import lorakit
from lorakit.adapters.attach import Adapters
from lorakit.compute.last_block import _padded, last_block
from lorakit.compute.model_input import place
from lorakit.compute.objective import ClassificationLoss, LanguageModellingLoss, RegressionLoss
from lorakit.compute.trials import try_last_block
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.methods.module import AdapterModule
from lorakit.models.compiling import compile_blocks
from lorakit.training.mixed_precision import cast_mixed_norms
from lorakit.training.setup import enable_gradient_checkpointing

PACKABLE = ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt-neox", "granite"]
DECODERS = [*PACKABLE, "bloom"]
METHODS = {
    "lora": lorakit.LoRA(rank=2, targets="all-linear"),
    "dora": lorakit.LoRA(rank=2, targets="all-linear", dora=True),
    "houlsby": lorakit.BottleneckAdapter(size=4),
    "pfeiffer": lorakit.BottleneckAdapter(kind="pfeiffer", size=4),
    "bitfit": lorakit.BitFit(),
    "full": lorakit.FullFineTuning(),
}


def labelled_batch():
    ids = torch.tensor([[5, 7, 3, 9, 8, 2], [6, 4, 2, 1, 1, 1], [6, 9, 2, 8, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


EXAMPLES = [example([1, 5, 3, 8, 2], 2), example([1, 5, 3, 8, 6, 7], 3), example([4, 5, 9], 1)]


def padded():
    return collate(EXAMPLES, pad_id=0)


def packed():
    # Two examples continue a shared prefix with different tokens, so one position predicts both.
    return pack(EXAMPLES, pad_id=0)


def adapted(arch, head, method, **settings):
    model = tiny_models.build(arch, head, **settings).double()
    handle = lorakit.attach(model, METHODS[method], dtype=torch.float64, seed=0)
    for parameter in handle.trainable_parameters():
        if method != "full":
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(objective, model, batch):
    model.zero_grad()
    loss = objective.loss_sum(model, batch)
    loss.backward()
    return loss.item(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(objective, model, batch):
    loss, gradients = loss_and_gradients(objective, model, batch)
    whole = dataclasses.replace(objective, last_block=None)
    expected, expected_gradients = loss_and_gradients(whole, model, batch)
    # Norms of some models always compute in float32.
    assert loss == pytest.approx(expected, rel=1e-6)
    scale = max(gradient.norm() for gradient in expected_gradients.values())
    assert scale > 0
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * scale, name


def gathers(objective, model, batch):
    """Return whether a forward pass gathers tokens in the last block."""
    before = objective.last_block.gather_count
    objective.loss_sum(model, batch)
    return objective.last_block.gather_count >= before + 1


def tokens_of(linear, call):
    """Return the shapes (B, T) of the inputs of a linear layer, without a hook, which would disable gathering."""
    seen, forward = [], linear.forward
    linear.forward = lambda x: seen.append(x.shape[:-1]) or forward(x)
    call()
    del linear.forward
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", tiny_models.ENCODERS)
def test_an_encoder_reads_the_first_token_and_gradients_stay(arch, method):
    model = adapted(arch, "sequence-classification", method)
    batch = labelled_batch()
    objective = try_last_block(ClassificationLoss(), model, batch)
    assert objective.last_block is not None
    assert objective.reads == "first"
    assert "first token only" in objective.note
    assert_same(objective, model, batch)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_decoder_that_classifies_reads_the_last_token(arch):
    model = adapted(arch, "sequence-classification", "lora")
    model.config.pad_token_id = 1
    batch = labelled_batch()
    objective = try_last_block(ClassificationLoss(), model, batch)
    assert objective.last_block is not None
    assert objective.reads == "last"
    assert_same(objective, model, batch)


def test_a_text_may_end_with_the_token_of_padding():
    model = adapted("gpt2", "sequence-classification", "lora")
    model.config.pad_token_id = 1
    objective = try_last_block(ClassificationLoss(), model, labelled_batch())
    batch = labelled_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert gathers(objective, model, batch)
    assert_same(objective, model, batch)


@pytest.mark.parametrize(
    ("arch", "make"), [*((a, padded) for a in DECODERS), *((a, packed) for a in PACKABLE)]
)
def test_a_decoder_reads_what_predicts_targets(arch, make):
    model, batch = adapted(arch, "causal-lm", "lora"), make()
    objective = try_last_block(LanguageModellingLoss(path="fused", note="fused"), model, padded())
    assert objective.last_block is not None
    assert objective.note == "fused; last block too"
    assert gathers(objective, model, batch)
    assert_same(objective, model, batch)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_decoder(method):
    model, batch = adapted("gpt2", "causal-lm", method), packed()
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    assert gathers(objective, model, batch)
    assert_same(objective, model, batch)


def test_a_regression_reads_one_token_too():
    model = adapted("bert", "sequence-classification", "lora", num_labels=1)
    batch = {**labelled_batch(), "labels": torch.tensor([0.5, 2.0, -1.0])}
    objective = try_last_block(RegressionLoss(), model, batch)
    assert objective.last_block is not None
    assert_same(objective, model, batch)


def test_the_rows_that_are_not_read_are_left_out():
    model, batch = adapted("llama", "causal-lm", "lora"), packed()
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    read = len(batch["target_at"].unique())
    assert read < len(batch["target_at"])
    before, block = model.model.layers[-2:]

    def loss():
        objective.loss_sum(model, batch)

    for linear in (block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj):
        assert tokens_of(linear, loss) == [(1, read)]
    for linear in (block.self_attn.k_proj, before.mlp.down_proj):
        assert tokens_of(linear, loss) == [batch["input_ids"].shape]
    assert not any(part._forward_hooks for part in (block.mlp, block.mlp.act_fn))


def test_other_rows_pad_to_a_rounded_number(monkeypatch):
    """Padding rows are computed too and do not change the result."""
    monkeypatch.setattr("lorakit.compute.last_block.rounded_rows", lambda count: count + 1)
    model, batch = adapted("llama", "causal-lm", "lora"), packed()
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    down = model.model.layers[-1].mlp.down_proj
    read = len(batch["target_at"].unique())
    assert tokens_of(down, lambda: objective.loss_sum(model, batch)) == [(1, read + 1)]
    assert_same(objective, model, batch)


def test_no_row_is_gathered_twice():
    at = torch.tensor([7, *range(30, 46)])
    indices = _padded(at, 48)
    assert indices.tolist() == [*at.tolist(), 0]
    assert len(_padded(at[:16], 48)) == 16
    assert _padded(torch.arange(17), 17).tolist() == list(range(17))  # no other index is left


def test_a_batch_without_targets_has_a_loss_of_zero():
    model, batch = adapted("llama", "causal-lm", "lora"), padded()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    assert objective.loss_sum(model, batch).item() == 0


def test_hooks_are_gone_where_the_model_raises():
    model = adapted("llama", "causal-lm", "lora")
    block = last_block(model)
    with block.restricted_to(lambda: torch.tensor([0]), (1, 4)):
        assert all(part._forward_pre_hooks for part in block.parts)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        block.restricted_to(lambda: torch.tensor([0]), (1, 4)),
    ):
        raise RuntimeError("on purpose")
    assert not any(part._forward_pre_hooks for part in block.parts)


def test_a_head_that_reads_every_token_gets_every_token():
    class MeanPool(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config
            self.pool = lambda hidden: hidden.mean(1)

        def forward(self, input_ids, attention_mask):
            hidden = self.model.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return type("Output", (), {"logits": self.model.classifier(self.pool(hidden))})()

    model = MeanPool(tiny_models.build("bert", "sequence-classification").eval())
    assert try_last_block(ClassificationLoss(), model, labelled_batch()).last_block is None
    model.pool = lambda hidden: hidden[:, 0]
    assert try_last_block(ClassificationLoss(), model, labelled_batch()).last_block is not None


def test_a_probe_that_is_read_nearly_whole_is_divided_all_the_same():
    text = example([1, 5, 3, 8, 2, 7, 9, 4, 6, 3, 2, 5], 1)
    model = adapted("llama", "causal-lm", "lora")
    objective = try_last_block(
        LanguageModellingLoss(path="fused"), model, collate([text], pad_id=0)
    )
    assert objective.last_block is not None
    assert objective.last_block.max_share < 1


def computes_all(model):
    """Return whether a forward pass computes the last block of a Llama for all tokens."""
    batch = padded()
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    seen = tokens_of(model.model.layers[-1].mlp.down_proj, lambda: objective.loss_sum(model, batch))
    return seen == [batch["input_ids"].shape]


BEHIND = [
    "model.layers.1",
    "model.layers.1.self_attn",
    "model.layers.1.post_attention_layernorm",
    "model.layers.1.mlp",
    "model.layers.1.mlp.act_fn",
    "model.norm",
    "model",
]


@pytest.mark.parametrize("path", BEHIND)
def test_a_hook_of_somebody_else_sees_every_token(path):
    model = adapted("llama", "causal-lm", "lora")
    assert not computes_all(model)
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    assert computes_all(model)
    objective = LanguageModellingLoss(path="fused", note="fused")
    assert try_last_block(objective, model, padded()) == objective


def test_a_hook_before_the_last_block_changes_nothing():
    model = adapted("llama", "causal-lm", "lora")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not computes_all(model)


@pytest.mark.parametrize("path", [p for p in BEHIND if p != "model"])
def test_an_adapter_that_may_mix_tokens_sees_every_token(path):
    class Shift(AdapterModule):
        def adapt(self, layer, x, output, weight):
            return output + output.roll(1, dims=1)

    class Shifting:
        __dataclass_fields__: ClassVar = {}

        def modules(self, model, dtype=torch.float32):
            return {path: Shift()}

        def trained_parameters(self, model):
            return []

    model = tiny_models.build("llama", "causal-lm")
    assert not computes_all(model)
    handle: Adapters = lorakit.attach(model, Shifting())
    assert computes_all(model)
    handle.activate(None)
    assert not computes_all(model)


def test_rows_with_adapters_of_their_own_are_computed_in_full():
    model = adapted("llama", "causal-lm", "lora")
    handle = lorakit.attach(model, METHODS["lora"], name="second", dtype=torch.float64, seed=1)
    with handle.per_sample(["default", "second", None]):
        assert computes_all(model)


def test_blocks_that_are_computed_again_are_computed_as_they_were():
    model = adapted("llama", "causal-lm", "lora")
    enable_gradient_checkpointing(model)
    assert not last_block(model).can_gather


def test_chunks_of_a_feed_forward_network_are_computed_in_full():
    model = adapted("distilbert", "sequence-classification", "lora")
    model.distilbert.transformer.layer[-1].chunk_size_feed_forward = 3
    assert try_last_block(ClassificationLoss(), model, labelled_batch()).last_block is None


def test_a_batch_that_is_read_nearly_whole_is_computed_whole():
    model = adapted("llama", "causal-lm", "lora")
    block = last_block(model)
    with block.restricted_to(lambda: torch.arange(19), (1, 20)):
        assert not any(part._forward_pre_hooks for part in block.parts)


@pytest.mark.parametrize("method", [lorakit.PrefixLayer, lorakit.PrefixEmbedding])
def test_prefix_methods_divide_too(method):
    model = tiny_models.build("gpt2", "causal-lm").double()
    handle = lorakit.attach(model, method(prefix_length=2), dtype=torch.float64, seed=0)
    examples = [place(e, handle.virtual_tokens, []) for e in EXAMPLES]
    batch = pack(examples, pad_id=0)
    objective = LanguageModellingLoss(path="fused", last_block=last_block(model))
    assert gathers(objective, model, batch)
    assert_same(objective, model, batch)


def test_norms_whose_bias_alone_is_wide_divide_too():
    model = tiny_models.build("bert", "sequence-classification").bfloat16()
    lorakit.attach(model, lorakit.BitFit(), dtype=torch.float32)
    cast_mixed_norms(model)
    assert last_block(model).can_gather


def test_compiled_blocks_are_computed_in_full():
    model = adapted("llama", "causal-lm", "lora")
    block = last_block(model)
    compile_blocks(model, backend="eager")
    with block.restricted_to(lambda: torch.tensor([0]), (1, 4)):
        assert not any(part._forward_pre_hooks for part in block.parts)


@pytest.mark.parametrize("arch", tiny_models.ENCODER_DECODERS)
def test_encoder_decoders_have_none(arch):
    assert last_block(tiny_models.build(arch)) is None
