"""A tiny, deterministic random model of every architecture with known roles.

``build("llama")`` returns a float32 model in eval mode with its natural head: hidden size 32, two
layers, four attention heads (two key/value heads if the architecture shares them), a vocabulary
of 99. The same call returns the same weights. Every tensor is random, biases and norms too, so
that a lost one changes the output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

VOCABULARY = 99
PAD, BOS, EOS = 0, 1, 2
NUM_LABELS = 3

_IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_ENCODER: dict[str, Any] = dict(
    _IDS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
_DECODER: dict[str, Any] = dict(_ENCODER, num_key_value_heads=2)
_SHORT_WINDOW: dict[str, Any] = {"sliding_window": 4}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
_BART: dict[str, Any] = {
    **_IDS,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def _config(name: str, **settings: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, name)(num_labels=NUM_LABELS, **settings)


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": _config("BertConfig", **_ENCODER),
    "roberta": _config("RobertaConfig", **_ENCODER),
    "deberta-v2": _config(
        "DebertaV2Config",
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
    ),
    "distilbert": _config(
        "DistilBertConfig",
        **_IDS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
    ),
    "mpnet": _config("MPNetConfig", **_ENCODER),
    "gpt2": _config("GPT2Config", **_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": _config("GPTNeoXConfig", **_ENCODER),
    "opt": _config(
        "OPTConfig",
        **_IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
    ),
    "bloom": _config("BloomConfig", **_IDS, hidden_size=32, n_layer=2, n_head=4),
    "llama": _config("LlamaConfig", **_DECODER),
    "mistral": _config("MistralConfig", **_DECODER, **_SHORT_WINDOW),
    "mixtral": _config(
        "MixtralConfig", **_DECODER, **_SHORT_WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2": _config("Qwen2Config", **_DECODER),
    "qwen3": _config("Qwen3Config", **_DECODER, head_dim=8),
    "gemma": _config("GemmaConfig", **_DECODER, head_dim=8),
    "gemma2": _config(
        "Gemma2Config", **_DECODER, **_SHORT_WINDOW, head_dim=8, query_pre_attn_scalar=8
    ),
    "gemma3": _config(
        "Gemma3TextConfig", **_DECODER, **_SHORT_WINDOW, head_dim=8, query_pre_attn_scalar=8
    ),
    "smollm3": _config("SmolLM3Config", **_DECODER, no_rope_layer_interval=2),
    "phi": _config("PhiConfig", **_DECODER),
    "phi3": _config("Phi3Config", **_DECODER),
    "granite": _config(
        "GraniteConfig",
        **_DECODER,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
    ),
    "olmo2": _config("Olmo2Config", **_DECODER),
    "t5": _config("T5Config", **_T5, feed_forward_proj="gated-gelu"),
    "bart": _config("BartConfig", **_BART),
    "vit": _config(
        "ViTConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
    ),
}
"""Functions that create the configuration of a tiny model, by architecture."""

_GROUPED_HEADS: dict[str, Any] = {**_DECODER, "head_dim": 8}
_EXPERTS: dict[str, Any] = {
    **_GROUPED_HEADS,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_EXPERT_RELATIVES = (
    *("Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "MiniMaxM2", "Glm4Moe", "Ernie4_5_Moe"),
    *("ExaoneMoe", "GraniteMoe", "HunYuanMoEV1", "SolarOpen", "FlexOlmo", "Cohere2Moe", "Mellum"),
)
_FALCON: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

RELATIVES: dict[str, Callable[[], PretrainedConfig]] = {
    **{
        name: _config(f"{name}Config", **_ENCODER)
        for name in (
            *("XLMRoberta", "XLMRobertaXL", "Camembert", "RobertaPreLayerNorm", "Data2VecText"),
            *("Ernie", "BertGeneration", "LayoutLM", "RoCBert", "MegatronBert", "BioGpt"),
        )
    },
    "Electra": _config("ElectraConfig", **_ENCODER, embedding_size=16),
    "RoFormer": _config("RoFormerConfig", **_ENCODER, embedding_size=16),
    "RemBert": _config("RemBertConfig", **_ENCODER, input_embedding_size=16),
    "BigBird": _config("BigBirdConfig", **_ENCODER, attention_type="original_full"),
    "Nystromformer": _config("NystromformerConfig", **_ENCODER, num_landmarks=64),
    "Esm": _config("EsmConfig", **_ENCODER, mask_token_id=VOCABULARY - 1),
    "NomicBert": _config("NomicBertConfig", **_ENCODER),
    "Gte": _config("GteConfig", **_ENCODER),
    "ModernBert": _config("ModernBertConfig", **_ENCODER, local_attention=4),
    "GPTNeo": _config(
        "GPTNeoConfig",
        **_IDS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    "GPTJ": _config("GPTJConfig", **_IDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "Falcon": _config("FalconConfig", **_FALCON),
    "Falcon with grouped heads": _config(
        "FalconConfig", **_FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "Falcon with all heads": _config("FalconConfig", **_FALCON, multi_query=False, alibi=True),
    "Mpt": _config("MptConfig", **_IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    **{
        name: _config(f"{name}Config", **_GROUPED_HEADS)
        for name in (
            *("Ministral3", "StableLm", "SeedOss", "Cohere", "Cohere2", "Olmo", "Olmo3", "Exaone4"),
            *("Helium", "Ernie4_5", "Glm", "Glm4", "Starcoder2", "Ministral", "VaultGemma"),
            *("HunYuanDenseV1", "Cwm", "Arcee", "Nemotron", "Apertus", "Jais2", "Exaone"),
            *("InternLM3", "HyperCLOVAX", "BitNet", "DiffLlama", "GraniteSWA", "EuroBert"),
        )
    },
    "Gemma4Text": _config(
        "Gemma4TextConfig",
        **_GROUPED_HEADS,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    **{name: _config(f"{name}Config", **_EXPERTS) for name in _EXPERT_RELATIVES},
    "MT5": _config("MT5Config", **_T5),
    "UMT5": _config("UMT5Config", **_T5),
    "T5 without gates": _config("T5Config", **_T5, feed_forward_proj="relu"),
    **{
        name: _config(f"{name}Config", **_BART)
        for name in (
            *("MBart", "M2M100", "Marian", "Pegasus", "Mvp", "PLBart"),
            *("BlenderbotSmall", "Blenderbot"),
        )
    },
    "Whisper": _config(
        "WhisperConfig", **_BART, num_mel_bins=8, max_source_positions=8, max_target_positions=64
    ),
    "XGLM": _config("XGLMConfig", **_IDS, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    "CLIPTextModel": _config("CLIPTextConfig", **_ENCODER),
    "CLIPVisionModel": _config(
        "CLIPVisionConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
    ),
    "Bert with cross-attention": _config(
        "BertConfig", **_ENCODER, is_decoder=True, add_cross_attention=True
    ),
    "GPT2 with cross-attention": _config(
        "GPT2Config",
        **_IDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
    ),
    "DebertaV2 with position projections": _config(
        "DebertaV2Config",
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=False,
    ),
    "Phi3 with a wide head": _config("Phi3Config", **_DECODER, head_dim=16),
}
"""More models with known roles, and variants of those above, for the tests of roles."""

EVERY_MODEL = [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in RELATIVES)]
"""For ``parametrize``: `make test-fast` leaves the relatives out."""

ENCODERS = ("bert", "roberta", "deberta-v2", "distilbert", "mpnet")
ENCODER_DECODERS = ("t5", "bart")
IMAGE_MODELS = ("vit",)
WITH_EXPERTS = ("mixtral", *_EXPERT_RELATIVES)
DECODERS = tuple(a for a in ARCHITECTURES if a not in (*ENCODERS, *ENCODER_DECODERS, *IMAGE_MODELS))

_MODEL_CLASSES = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def natural_head(arch: str) -> str:
    """Return the usual head of an architecture, the default of :func:`build`."""
    if arch in RELATIVES:
        return "base"
    if arch in IMAGE_MODELS:
        return "image-classification"
    if arch in ENCODERS:
        return "sequence-classification"
    return "seq2seq-lm" if arch in ENCODER_DECODERS else "causal-lm"


def build(arch: str, head: str | None = None, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Build the tiny model of ``arch``; ``settings`` override fields of its configuration.

    ``head`` is one of "base", "causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"
    (for "vit" the same as "image-classification"), or None for the natural one. Inside
    ``with torch.device("meta")`` the model has no weights.
    """
    head = head or natural_head(arch)
    if arch in IMAGE_MODELS and head == "sequence-classification":
        head = "image-classification"
    config = (ARCHITECTURES | RELATIVES)[arch]()
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _MODEL_CLASSES[head]).from_config(
            config, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(torch.float32).eval()


def example_batch(
    arch: str, model: PreTrainedModel, *, padding: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return a two-row batch for ``model``.

    The first row of text is left-padded. Both rows end in EOS, which BART and T5 need to classify.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    decoder_input_ids = torch.randint(EOS + 1, VOCABULARY, (2, 5), generator=generator)
    if model.main_input_name == "input_features":
        features = torch.randn(2, 8, 16, generator=generator)
        return {"input_features": features, "decoder_input_ids": decoder_input_ids}
    input_ids = torch.randint(EOS + 1, VOCABULARY, (2, 7), generator=generator)
    input_ids[:, -1] = EOS
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :padding] = PAD
    attention_mask[0, :padding] = 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.is_encoder_decoder and not type(model).__name__.endswith(
        "SequenceClassification"
    ):
        batch["decoder_input_ids"] = decoder_input_ids
    if getattr(model.config, "add_cross_attention", False):
        batch["encoder_hidden_states"] = torch.randn(2, 5, 32, generator=generator)
    return batch


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of `example_batch`."""
    return model(**example_batch(model.config.model_type, model)).logits


def logits_with_cache(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Return the logits of tokens that continue a cache."""
    known = inspect.signature(inspect.unwrap(model.forward)).parameters
    name = "cache" if "cache" in known else "past_key_values"  # renamed within transformers 5
    return model(input_ids=ids, use_cache=True, **{name: cache}).logits


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters and buffers in a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert equal names in equal order, and equal values."""
    assert list(actual) == list(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
