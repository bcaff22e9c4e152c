"""Known layers get a faster forward; similar layers keep theirs."""

import copy

import packed_models
import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3Model,
    DeepseekV32Config,
    DeepseekV32Model,
    GemmaConfig,
    GemmaModel,
    Glm5NextTextConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    SeedOssConfig,
)
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextMLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from lorakit.models.faster import ATTENTION, make_faster, make_stock
from lorakit.models.faster_layers import FasterForward, faster_forward
from lorakit.models.quantising import quantise

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}


def llama():
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES))


def replaced(model):
    return {
        name: vars(module)["forward"].func.__name__
        for name, module in model.named_modules()
        if isinstance(vars(module).get("forward"), FasterForward)
    }


def test_norms_and_gates_of_llama_and_qwen():
    for model, attention_norms in ((llama(), 0), (Qwen3Model(Qwen3Config(**SIZES)), 2)):
        make_faster(model)
        names = list(replaced(model).values())
        assert names.count("_rms_norm") == 2 * (2 + attention_norms) + 1
        assert names.count("_gated") == 2


def test_gpt2_gets_the_fused_gelu_and_computes_the_same():
    model = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)).eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).last_hidden_state
    make_faster(model)
    assert list(replaced(model).values()).count("gelu") == 2
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_a_norm_that_adds_one_to_its_weight_is_not_replaced():
    model = GemmaModel(GemmaConfig(**SIZES))
    make_faster(model)
    assert "_rms_norm" not in replaced(model).values()


def test_a_gate_with_another_activation_is_not_replaced():
    model = LlamaModel(LlamaConfig(**SIZES, hidden_act="gelu"))
    make_faster(model)
    assert "_gated" not in replaced(model).values()


def test_a_gate_with_an_extra_operation_is_not_replaced():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
            self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

        def forward(self, x):
            return 1.1 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    assert faster_forward(Scaled()) is None


@pytest.mark.parametrize(
    ("mlp", "config"),
    [(SeedOssMLP, SeedOssConfig), (Glm5NextTextMLP, Glm5NextTextConfig)],
)
def test_a_gate_with_dropout_or_clamps_is_not_replaced(mlp, config):
    """The example shows neither: the model is in evaluation mode, and the values are small."""
    torch.manual_seed(0)
    module = mlp(config(hidden_size=32, intermediate_size=48)).eval()
    assert faster_forward(module) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantisation", [None, "nf4", "int8"])
def test_results_and_gradients_do_not_change(dtype, quantisation):
    stock = llama().to(dtype)
    if quantisation:
        quantise(stock, quantisation)
    ours = copy.deepcopy(stock)
    make_faster(ours)
    assert {"_rms_norm", "_gated"} <= set(replaced(ours).values())
    ids = torch.arange(20).view(2, 10) % 50
    for model in (stock, ours):
        model(ids).last_hidden_state.float().sin().sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for (name, own), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if own.requires_grad:
            assert (own.grad - other.grad).norm() <= limit * own.grad.norm(), name


@pytest.mark.parametrize("kind", packed_models.KINDS)
def test_norms_and_gates_beside_layers_of_other_libraries(kind):
    """Where the layers of a gate are not linear layers of PyTorch, it keeps its forward."""
    model, _ = packed_models.packed_and_twin(kind)
    expected = tiny_models.logits(model)
    make_faster(model)
    names = {*replaced(model).values()}
    is_linear = isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)
    assert names >= {"_rms_norm"} | ({"_gated"} if is_linear else set())
    torch.testing.assert_close(tiny_models.logits(model), expected)


def test_attention_with_narrow_values_is_the_stock_one():
    """DeepSeek's query and key heads are wider than its value heads."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "v_head_dim": 12}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    model = DeepseekV3Model(DeepseekV3Config(**sizes, **heads))
    ids = torch.arange(12).view(2, 6)
    before = model(ids).last_hidden_state
    make_faster(model)
    assert model.config._attn_implementation == ATTENTION
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_sparse_attention_is_the_stock_one():
    """DeepSeek-V3.2's indexer puts its choice of keys into the mask of stock attention only."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "v_head_dim": 16}
    sizes |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    indexer = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    model = DeepseekV32Model(DeepseekV32Config(**sizes, **indexer))
    ids = torch.arange(20).view(2, 10)
    before = model(ids).last_hidden_state
    make_faster(model)
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation(ATTENTION)
    with pytest.raises(NotImplementedError, match=r"attention is sparse \(indices\)"):
        model(ids)


def test_make_stock_restores_the_model_and_a_copy_uses_its_own_weights():
    model = llama()
    make_faster(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.norm.weight)
    assert not twin(torch.arange(4)[None]).last_hidden_state.any()
    assert model(torch.arange(4)[None]).last_hidden_state.any()
    make_stock(model)
    assert not replaced(model)


@pytest.mark.parametrize("trains_bias", [False, True])
def test_mpnet_with_its_position_bias_and_padding(trains_bias):
    model = tiny_models.build("mpnet", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model = model.double()
    model.mpnet.encoder.relative_attention_bias.requires_grad_(trains_bias)
    ids = torch.randint(5, 99, (3, 20), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(20) < torch.tensor([[20], [9], [3]])).long(),
    }

    def outputs():
        model.zero_grad()
        model.train()
        logits = model(**batch).logits
        logits.square().sum().backward()
        return logits, [p.grad for p in model.parameters() if p.grad is not None]

    expected = outputs()
    make_faster(model.eval())
    assert list(replaced(model).values()).count("_mpnet_attention") == 2
    torch.testing.assert_close(outputs(), expected, rtol=1e-10, atol=1e-12)
    # Attention weights are an output of the stock attention only.
    assert model(**batch, output_attentions=True).attentions[0].shape == (3, 4, 20, 20)


def test_an_attention_with_another_bias_is_not_replaced():
    class MPNetSelfAttention(
        type(tiny_models.build("mpnet").mpnet.encoder.layer[0].attention.attn)
    ):
        def forward(self, x, mask=None, position_bias=None, **options):
            return super().forward(x, mask, None if position_bias is None else 2 * position_bias)

    attention = tiny_models.build("mpnet").mpnet.encoder.layer[0].attention.attn
    assert faster_forward(attention) is not None
    attention.__class__ = MPNetSelfAttention
    assert faster_forward(attention) is None
