"""Roles select the right layers and rows in every known architecture."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.voxtral_realtime.modeling_voxtral_realtime import (
    VoxtralRealtimeCausalConv1d,
)
from transformers.pytorch_utils import Conv1D

from lorakit.errors import TargetError
from lorakit.methods.lora.kinds import kind_of
from lorakit.models import roles
from lorakit.models.architectures import ARCHITECTURES, Fused
from lorakit.models.heads import is_never_called
from lorakit.models.layers import AdapterSlot, RowSlice, weight_shape, why_not_adaptable
from lorakit.models.listing import targets
from lorakit.models.places import all_places, find_places, is_role
from lorakit.models.roles import resolve_targets
from lorakit.models.tree import walk

LAYERS = (
    nn.Linear(3, 4),
    Conv1D(4, 3),
    nn.Embedding(5, 4),
    nn.Conv2d(4, 6, (3, 2), groups=2),
    nn.MultiheadAttention(8, 2),
)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_shape_of_a_weight_is_known_without_it(layer: nn.Module) -> None:
    """DeepSpeed's ZeRO-3 empties the weights that it splits."""
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    shape = tuple(weight.T.shape if isinstance(layer, Conv1D) else weight.shape)
    weight.data = torch.empty(0)
    assert weight_shape(layer) == shape


EVERY_MODEL = [*tiny_models.ARCHITECTURES, *tiny_models.RELATIVES]

# Blocks of the tiny model, and attention modules in them: encoder, decoder, cross-attention.
BLOCKS = dict.fromkeys(EVERY_MODEL, 2) | dict.fromkeys(
    [
        *("t5", "bart", "MT5", "UMT5", "T5 without gates", "MBart", "M2M100", "Marian", "Pegasus"),
        *("Mvp", "PLBart", "BlenderbotSmall", "Blenderbot", "Whisper"),
    ],
    4,
)
CROSS_ATTENTIONS = dict.fromkeys([name for name in BLOCKS if BLOCKS[name] == 4], 2) | dict.fromkeys(
    ["Bert with cross-attention", "GPT2 with cross-attention"], 2
)
GATED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3", "phi3"),
    *("granite", "olmo2", "t5", "ModernBert", "Ministral3", "StableLm", "SeedOss", "Cohere"),
    *("Cohere2", "Olmo", "Olmo3", "Exaone4", "Helium", "Ernie4_5", "Glm", "Glm4", "MT5", "UMT5"),
    *("Ministral", "VaultGemma", "HunYuanDenseV1", "Cwm", "Gemma4Text", "Exaone", "InternLM3"),
    *("HyperCLOVAX", "BitNet", "DiffLlama", "GraniteSWA", "EuroBert", "NomicBert", "Gte"),
    "Phi3 with a wide head",
}


def test_the_tiny_models_cover_the_table() -> None:
    known = {model_type for a in ARCHITECTURES for model_type in a.model_types}
    configs = (tiny_models.ARCHITECTURES | tiny_models.RELATIVES).values()
    assert {config().model_type for config in configs} == known


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_counts(arch: str) -> None:
    with torch.device("meta"):
        model = tiny_models.build(arch)
    attentions = BLOCKS[arch] + CROSS_ATTENTIONS.get(arch, 0)
    for letter in "qkvo":
        assert len(find_places(model, f"attention.{letter}")) == attentions
    assert len(find_places(model, "attention.qv")) == 2 * attentions
    if arch in tiny_models.WITH_EXPERTS:
        for entry in ("mlp", "mlp.up"):
            with pytest.raises(TargetError, match=r"stacked weights, not as .* Write 'experts'"):
                find_places(model, entry)
        assert not any(role.startswith("mlp") for role in targets(model))
        assert {p.path.rpartition(".")[2] for p in find_places(model, "experts")} >= {"down_proj"}
        return
    assert len(find_places(model, "mlp.up")) == BLOCKS[arch]
    assert len(find_places(model, "mlp.down")) == BLOCKS[arch]
    assert len(find_places(model, "mlp")) == (3 if arch in GATED else 2) * BLOCKS[arch]
    if arch in GATED:
        assert len(find_places(model, "mlp.gate")) == BLOCKS[arch]
    else:
        with pytest.raises(TargetError, match=r"no layer for 'mlp\.gate'\. It has: attention\.q"):
            find_places(model, "mlp.gate")


@pytest.mark.parametrize("arch", EVERY_MODEL)
def test_all_linear_is_every_linear_layer_of_the_blocks(arch: str) -> None:
    """And every stacked weight of experts, but not the gate of shared experts, which has one output."""
    model = tiny_models.build(arch)
    in_blocks = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and re.search(r"\.\d+\.", f".{path}.")
        and 1 not in module.weight.shape
    }
    if arch in tiny_models.WITH_EXPERTS:
        in_blocks |= {name for name, p in model.named_parameters() if p.dim() == 3}
    assert {place.path for place in find_places(model, "all-linear")} == in_blocks


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_slices_of_a_fused_layer_cover_each_row_once(arch: str) -> None:
    model = tiny_models.build(arch)
    rows: dict[str, list[torch.Tensor]] = {}
    entries = ["attention"] if arch in tiny_models.WITH_EXPERTS else ["attention", "mlp"]
    for place in resolve_targets(model, entries):
        if place.slice is not None:
            rows.setdefault(place.path, []).append(place.slice.rows())
    for path, parts in rows.items():
        layer = model.get_submodule(path)
        out_features = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(out_features)), path


@pytest.mark.parametrize("arch", [*tiny_models.ARCHITECTURES, "MT5", "MBart", "CLIPTextModel"])
def test_embeddings_are_called_in_the_forward_pass(arch: str) -> None:
    model = tiny_models.build(arch)
    called = []
    for place in find_places(model, "embedding"):
        layer = model.get_submodule(place.path)
        layer.register_forward_hook(lambda *_, path=place.path: called.append(path))
    with torch.no_grad():
        model(**tiny_models.example_batch(arch, model))
    assert sorted(called) == sorted(place.path for place in find_places(model, "embedding"))
    assert len(called) == (2 if arch in ("t5", "bart", "MT5", "MBart") else 1)


SHORT = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16),
    **{"vocab_size": 60, "max_position_embeddings": 64, "decoder_start_token_id": 2},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2},
}
SHORT_T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
ENCODER_DECODERS = {
    "LongT5": SHORT_T5 | {"decoder_start_token_id": 0},
    "Blenderbot": SHORT,
    "BlenderbotSmall": SHORT,
    "PLBart": SHORT,
    "Mvp": SHORT,
    "BigBirdPegasus": SHORT | {"attention_type": "original_full"},
    "PegasusX": SHORT | {"block_size": 4, "num_global_tokens": 2},
    "LED": SHORT | {"attention_window": 4},
    "Bart": SHORT | {"tie_word_embeddings": False},
    "Marian": SHORT | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 60},
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_embeddings_of_encoder_and_decoder(name: str) -> None:
    head = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    config = getattr(transformers, f"{name}Config")(**ENCODER_DECODERS[name])
    model = getattr(transformers, f"{name}{head}")(config).eval()
    called: list[str] = []
    for place in (places := find_places(model, "embedding")):
        layer = model.get_submodule(place.path)
        layer.register_forward_hook(lambda *_, path=place.path: called.append(path))
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    assert sorted(called) == sorted(place.path for place in places)
    assert len(called) == 2
    for shared in (path for path, _ in model.named_modules() if path.endswith("shared")):
        with pytest.raises(TargetError, match=r"never calls.*Write 'embedding'"):
            resolve_targets(model, shared)


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS])
def test_head_of_a_language_model_is_its_output_projection(arch: str) -> None:
    model = tiny_models.build(arch)
    (place,) = find_places(model, "head")
    assert model.get_submodule(place.path) is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("arch", "paths"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
        ("deberta-v2", ["pooler.dense", "classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("mpnet", ["classifier.dense", "classifier.out_proj"]),
        ("gpt2", ["score"]),
        ("llama", ["score"]),
        ("bart", ["classification_head.dense", "classification_head.out_proj"]),
        ("t5", ["classification_head.dense", "classification_head.out_proj"]),
        ("vit", ["classifier"]),
    ],
)
def test_the_head_of_a_classifier_has_all_layers_outside_the_base(
    arch: str, paths: list[str]
) -> None:
    model = tiny_models.build(arch, "sequence-classification")
    assert [place.path for place in find_places(model, "head")] == paths


def test_a_model_without_a_head_says_so() -> None:
    with pytest.raises(TargetError, match=r"bert has no layer for 'head'"):
        find_places(tiny_models.build("bert", "base"), "head")


# --- the grammar of targets ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["attention", "attention.q", "attention.vq", "mlp", "mlp.up", "head", "all-linear"]
)
def test_roles(entry: str) -> None:
    assert is_role(entry)


@pytest.mark.parametrize("entry", ["", "q", "attention.", "attention.qq", "attention.qx", "mlp.qv"])
def test_not_roles(entry: str) -> None:
    assert not is_role(entry)


def test_find_places_accepts_only_roles() -> None:
    with pytest.raises(TargetError, match=r"'atention' is not a role\. Did you mean 'attention'\?"):
        find_places(tiny_models.build("llama"), "atention")


def paths(model: nn.Module, *targets: str) -> list[str]:
    return [place.path for place in resolve_targets(model, targets)]


def test_suffix() -> None:
    model = tiny_models.build("llama")
    assert resolve_targets(model, "q_proj") == find_places(model, "attention.q")
    assert paths(model, "self_attn.v_proj") == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert paths(model, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert paths(model, "lm_head") == ["lm_head"]


def test_a_suffix_consists_of_whole_names() -> None:
    with pytest.raises(TargetError, match=r"'proj' matches no layer of LlamaForCausalLM"):
        resolve_targets(tiny_models.build("llama"), "proj")


def test_regular_expression_matches_the_whole_path() -> None:
    model = tiny_models.build("llama")
    assert paths(model, r".*\.0\..*(q|v)_proj") == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert len(paths(model, r".*self_attn.*")) == 8  # the parent module is skipped
    with pytest.raises(TargetError, match="matches no layer"):
        resolve_targets(model, r"layers\.0\..*q_proj")


def test_targets_are_unique_and_in_model_order() -> None:
    model = tiny_models.build("llama")
    assert paths(model, "v_proj", "attention.qv", "q_proj") == paths(model, "attention.qv")
    assert paths(model, "attention.qv")[:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_a_list_of_paths_looks_for_the_roles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    expected = find_places(model, "attention")
    looks = []
    monkeypatch.setattr(roles, "all_places", lambda *args: looks.append(args) or all_places(*args))
    assert resolve_targets(model, [place.path for place in expected]) == expected
    assert len(looks) == 1


def test_slices_merge_and_a_whole_layer_absorbs_them() -> None:
    model = tiny_models.build("gpt2")
    fused = "transformer.h.0.attn.c_attn"

    def slices(*targets: str) -> list[RowSlice | None]:
        return [p.slice for p in resolve_targets(model, targets) if p.path == fused]

    q = RowSlice(groups=1, stride=96, offset=0, width=32)
    v = RowSlice(groups=1, stride=96, offset=64, width=32)
    assert slices("attention.v", "attention.q", "attention.qv") == [q, v]
    assert slices("attention.v", "c_attn") == [None]
    assert [p.role for p in resolve_targets(model, "c_attn")] == ["", ""]


@pytest.mark.parametrize(
    ("arch", "target", "message"),
    [
        (
            "llama",
            "attention.w",
            r"matches no layer.*Did you mean 'attention\.\w'\?.*Roles of this model:",
        ),
        (
            "llama",
            "atention.qv",
            r"Did you mean 'attention\.qv'\?.*qv, attention\.qkv, attention, mlp, all-linear",
        ),
        ("t5", "atention.qkv", r"Did you mean 'attention\.qkv'\?"),
        ("llama", "all_linear", r"Did you mean 'all-linear'\?"),
        ("llama", "q_porj", r"Did you mean 'q_proj'\?"),
        ("llama", "input_layernorm", r"'model\.layers\.0\.input_layernorm' \(LlamaRMSNorm\) and 1"),
        (
            "llama",
            "self_attn",
            r"\(LlamaAttention\).*layers inside: q_proj, k_proj, v_proj, o_proj",
        ),
        ("llama", r"model\.layers\.0\..*", r"\(LlamaRMSNorm\)"),
        ("llama", "(q_proj", "it is not a valid regular expression"),
        ("llama", "", "non-empty string"),
        ("opt", "embed_positions", "it computes its own indices"),
        ("deberta-v2", "rel_embeddings", "never calls"),
        ("t5", "shared", "never calls.*Write 'embedding'"),
        ("bart", "shared", "never calls.*Write 'embedding'"),
        ("roberta", "classifier", r"layers inside: dense, out_proj"),
    ],
)
def test_invalid_targets(arch: str, target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_targets(tiny_models.build(arch), [target])


TINY: dict = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
HEADS: dict = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
ONLY_READ: dict[str, tuple[transformers.PreTrainedConfig, type, set[str]]] = {
    "mamba": (
        transformers.MambaConfig(**TINY, state_size=4),
        transformers.MambaForCausalLM,
        {"dt_proj", "conv1d", "x_proj", "out_proj"},
    ),
    "jamba": (
        transformers.JambaConfig(
            **TINY, **HEADS, num_experts=1, attn_layer_period=2, attn_layer_offset=1
        ),
        transformers.JambaForCausalLM,
        {"dt_proj", "conv1d"},
    ),
    "lfm2": (
        transformers.Lfm2Config(**TINY, **HEADS, layer_types=["conv", "full_attention"]),
        transformers.Lfm2ForCausalLM,
        {"conv"},
    ),
    "mobilebert": (
        transformers.MobileBertConfig(
            **TINY, num_attention_heads=2, embedding_size=8, intra_bottleneck_size=16
        ),
        transformers.MobileBertForMaskedLM,
        {"decoder", "dense"},
    ),
}


@pytest.mark.parametrize("name", ONLY_READ)
def test_layers_whose_weight_is_only_read(name: str) -> None:
    """An adapter on them would have no effect. They are no targets, and all others are called."""
    config, kind, expected = ONLY_READ[name]
    model = kind(config).eval()
    called: set[str] = set()
    for at in walk(model):
        at.module.register_forward_hook(lambda *_, path=at.path: called.add(path))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    adaptable = [at for at in walk(model) if why_not_adaptable(at.module) is None]
    found = {at.path for at in adaptable if is_never_called(at)}
    assert {path.rpartition(".")[2] for path in found} == expected
    called -= {path for path in found if path.endswith(("x_proj", "out_proj"))}  # in evaluation
    assert {at.path for at in adaptable} - called == found
    assert {place.path for place in resolve_targets(model, "all-linear")} <= called
    for path in found:
        with pytest.raises(
            TargetError, match=r"never calls, .* uses only the weight.*Leave it out"
        ):
            resolve_targets(model, path)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("mamba", "mamba_inner_fn"), ("mamba2", "mamba2_split_conv1d_scan_combined")],
)
def test_layers_that_a_fused_kernel_reads_in_training(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_heads": 4, "head_dim": 8, "n_groups": 1} if name == "mamba2" else {}
    config = transformers.AutoConfig.for_model(name, **TINY, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, kernel, lambda *_, **__: torch.zeros(1, 3, 16))
    called: set[str] = set()
    for at in walk(model):
        at.module.register_forward_hook(lambda *_, path=at.path: called.add(path))
    model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    targets = paths(model, "all-linear")
    assert {path.rpartition(".")[2] for path in targets} == {"in_proj"}
    assert called >= set(targets)
    with pytest.raises(TargetError, match=r"Mixer never calls, or not in training"):
        resolve_targets(model, "out_proj")


ROUTER: dict = {"hidden_size": 16, "num_local_experts": 4}
OTHER_OUTPUTS = {
    "phimoe": (lambda: PhimoeTopKRouter(transformers.PhimoeConfig(**ROUTER)), "several tensors"),
    "llama4": (lambda: Llama4Router(transformers.Llama4TextConfig(**ROUTER)), "several tensors"),
    "deepseek_v4": (lambda: DeepseekV4GroupedLinear(16, 32, 16), "the shape that Linear returns"),
    "voxtral": (lambda: VoxtralRealtimeCausalConv1d(16, 4, 3, ""), "the shape that Conv1d returns"),
}


@pytest.mark.parametrize("name", OTHER_OUTPUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_to_whose_output_an_adapter_cannot_add(name: str, device: str) -> None:
    make, message = OTHER_OUTPUTS[name]
    with torch.device(device):
        model = Wrapper(inner=make(), fc=nn.Linear(16, 16))
    assert paths(model, "all-linear") == ["fc"]
    with pytest.raises(TargetError, match=f"'inner'.* cannot be adapted: .*{message}"):
        resolve_targets(model, "inner")
    with pytest.raises(TargetError, match=f"LoRA cannot adapt: .*{message}"):  # as in a file
        kind_of(model.get_submodule("inner"), model, "inner")


ROUTED: dict = TINY | HEADS | {"num_hidden_layers": 1, "head_dim": 8}
STACKED = {
    "deepseek_v3": (
        lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                **ROUTED, n_routed_experts=8, first_k_dense_replace=0, moe_intermediate_size=8
            )
        ),
        r"'model\.layers\.0\.mlp\.experts' .* stacked weights, .* Write 'experts'",
    ),
    "dbrx": (
        lambda: transformers.DbrxForCausalLM(
            transformers.DbrxConfig(
                **{"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 50},
                attn_config={"rope_theta": 1e4, "clip_qkv": 8, "kv_n_heads": 2},
            )
        ),
        r"'transformer\.blocks\.0\.ffn\.experts\.mlp' .* cannot be adapted: .*one matrix for each",
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_experts_in_stacked_tensors_are_found_without_known_roles(name: str) -> None:
    make, message = STACKED[name]
    with torch.device("meta"):
        model = make()
    for entry in ("mlp", "mlp.down", *(["experts", "all-linear"] if name == "dbrx" else [])):
        says = f"'{entry}' includes the experts of {name}, and {message}"
        with pytest.raises(TargetError, match=says):
            find_places(model, entry)
    says = f"not known for the architecture {name}. Write 'all-linear' or module names instead"
    with pytest.raises(TargetError, match=says):
        find_places(model, "attention")


def test_an_embedding_that_renormalises_its_rows_is_rejected() -> None:
    model = tiny_models.build("llama")
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(TargetError, match=r"renormalises its rows \(max_norm\)"):
        resolve_targets(model, ["embed_tokens"])


def test_no_targets() -> None:
    with pytest.raises(TargetError, match="No targets"):
        resolve_targets(tiny_models.build("llama"), [])


def test_adapters_of_a_layer_are_not_targets() -> None:
    model = tiny_models.build("llama")
    before = resolve_targets(model, "all-linear"), resolve_targets(model, "q_proj")
    for place in before[0]:
        adapter = AdapterSlot({"default": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
        model.get_submodule(place.path).add_module("adapters", adapter)
    assert (resolve_targets(model, "all-linear"), resolve_targets(model, "q_proj")) == before


# --- composite, generic and unknown models ------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_each_part_of_a_composite_model_has_its_own_architecture() -> None:
    model = Wrapper(text=tiny_models.build("gpt2"), vision=tiny_models.build("vit"))
    counts = Counter(place.path.split(".")[0] for place in find_places(model, "attention.q"))
    assert counts == {"text": 2, "vision": 2}
    assert find_places(model, "attention.q")[0].slice is not None


def test_multihead_attention_by_type() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    places = find_places(model, "attention")
    assert [(p.path, p.role) for p in places[:4]] == [
        ("layers.0.self_attn", "attention.q"),
        ("layers.0.self_attn", "attention.k"),
        ("layers.0.self_attn", "attention.v"),
        ("layers.0.self_attn.out_proj", "attention.o"),
    ]
    assert places[1].slice == RowSlice(groups=1, stride=24, offset=8, width=8)
    assert [p.path for p in find_places(model, "mlp")][:2] == [
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    assert find_places(model, "all-linear") == resolve_targets(model, ["attention", "mlp"])
    assert paths(model, "self_attn")[:2] == ["layers.0.self_attn", "layers.0.self_attn.out_proj"]


def test_multihead_attention_with_separate_weights() -> None:
    model = Wrapper(attention=nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(TargetError, match=r"three weights.*write 'attention\.o'"):
        find_places(model, "attention.q")
    assert [p.path for p in find_places(model, "attention.o")] == ["attention.out_proj"]


def test_unknown_architecture_works_by_name() -> None:
    model = Wrapper(body=nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), fc=nn.Linear(4, 2))
    with pytest.raises(
        TargetError, match=r"Roles such as 'attention' are not known.*it has: 0, fc"
    ):
        find_places(model, "attention")
    assert paths(model, "all-linear") == ["body.0", "fc"]
    assert paths(model, "fc") == ["fc"]


def test_experts_without_known_roles() -> None:
    """Not the gate of the shared expert: it has one output, which the default rank does not fit."""
    config = transformers.Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_experts=4, vocab_size=99
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {place.path.rpartition(".")[2] for place in find_places(model, "all-linear")}
    assert names > {"out_proj", "gate_up_proj", "down_proj"}
    assert "shared_expert_gate" not in names
    experts = paths(model, "experts")
    assert len(experts) == 8
    assert paths(model, "mlp.experts") == paths(model, r".*\.experts\..*") == experts
    assert paths(model, "experts.down_proj") == experts[1::2]


def test_all_linear_of_a_model_without_linear_layers() -> None:
    model = Wrapper(body=nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()))
    with pytest.raises(TargetError, match=r"no linear layer outside its heads.*it has: 0\."):
        find_places(model, "all-linear")


def test_all_linear_excludes_heads_of_an_unknown_architecture() -> None:
    language, classifier = tiny_models.build("llama"), tiny_models.build("roberta")
    for model in (language, classifier):
        blocks = set(paths(model, "all-linear"))
        model.config.model_type = "a-new-one"
        outside = set(paths(model, "all-linear")) - blocks
        assert outside == set()
    with pytest.raises(TargetError, match=r"not known for the architecture a-new-one.*q_proj"):
        find_places(language, "attention.q")


def test_a_model_without_any_adaptable_layer() -> None:
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        find_places(Wrapper(norm=nn.LayerNorm(4)), "all-linear")


# --- row slices ---------------------------------------------------------------------------------


def test_row_slice() -> None:
    assert RowSlice(groups=2, stride=6, offset=2, width=2).rows().tolist() == [2, 3, 8, 9]
    assert RowSlice(groups=1, stride=9, offset=4, width=3).rows().tolist() == [4, 5, 6]
    assert RowSlice(groups=2, stride=6, offset=2, width=2).total == 4
    with torch.device("meta"):
        assert RowSlice(groups=1, stride=2, offset=0, width=1).rows().device.type == "cpu"


@pytest.mark.parametrize(
    ("groups", "stride", "offset", "width"),
    [(0, 4, 0, 1), (1, 4, 0, 0), (1, 4, 2, 3), (1, 4, -1, 2)],
)
def test_row_slice_outside_its_stride(groups: int, stride: int, offset: int, width: int) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        RowSlice(groups=groups, stride=stride, offset=offset, width=width)


def test_a_fused_layer_of_unexpected_width_is_rejected() -> None:
    model = tiny_models.build("phi3")
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.qkv_proj = nn.Linear(32, 63)
    with pytest.raises(TargetError, match=r"not laid out as in other phi3 models: 63 rows"):
        find_places(model, "attention.q")
    assert paths(model, "qkv_proj")[0] == "model.layers.0.self_attn.qkv_proj"


def test_a_projection_of_an_unsupported_type_is_rejected() -> None:
    model = tiny_models.build("llama")
    model.get_submodule("model.layers.1.self_attn").q_proj = nn.Bilinear(4, 4, 4)
    with pytest.raises(TargetError, match=r"'model\.layers\.1\.self_attn\.q_proj' \(Bilinear\)"):
        find_places(model, "attention")
    assert len(find_places(model, "attention.kvo")) == 6


def test_published_shapes_of_fused_layers() -> None:
    """32 query and 8 key/value heads: contiguous as in Phi-3, interleaved as in Falcon."""

    class Sizes:
        num_attention_heads, num_key_value_heads = 32, 8

    roles = ("attention.q", "attention.k", "attention.v")
    grouped = Fused(roles=roles).slices(32 * 96 + 2 * 8 * 96, Sizes)
    assert [(s.offset, s.width) for s in grouped.values()] == [(0, 3072), (3072, 768), (3840, 768)]
    interleaved = Fused(roles=roles, interleaved=True).slices(8 * 6 * 64, Sizes)
    assert [(s.groups, s.stride, s.offset, s.width) for s in interleaved.values()] == [
        (8, 384, 0, 256),
        (8, 384, 256, 64),
        (8, 384, 320, 64),
    ]
