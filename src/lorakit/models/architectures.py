"""A table of the projection names of each architecture.

Layer names are relative to their block: ``model.layers.3.self_attn.q_proj`` is listed as
``self_attn.q_proj``, the part after the last number. The names, and the order inside fused
projections, are those of ``transformers`` 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.models.layers import RowSlice

Q, K, V, O = "attention.q", "attention.k", "attention.v", "attention.o"  # noqa: E741
GATE, UP, DOWN = "mlp.gate", "mlp.up", "mlp.down"


def _key_value_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        return 1  # the first Falcon models
    names = ("num_kv_heads", "num_key_value_heads", "num_attention_heads")
    return next(count for name in names if (count := getattr(config, name, None)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections in one weight, in the order of their rows.

    ``interleaved`` repeats that order for each key/value head (GPT-NeoX, BLOOM, Falcon): the query
    heads that share it, its key, its value. Otherwise each projection is one contiguous run of rows
    (GPT-2, Phi-3). Query projections are as wide as all query heads, key and value projections as
    all key/value heads. Gate and up projections are equally wide.
    """

    roles: tuple[str, ...]
    interleaved: bool = False

    def slices(self, out_features: int, config: Any) -> dict[str, RowSlice]:
        """Return role -> rows for a layer with ``out_features`` output rows.

        Raises:
            ValueError: the rows do not divide into the heads of ``config``.
        """
        in_attention = K in self.roles
        shared = _key_value_heads(config) if in_attention else 1
        counts = {Q: config.num_attention_heads, K: shared, V: shared} if in_attention else {}
        heads = {role: counts.get(role, 1) for role in self.roles}
        groups = shared if self.interleaved else 1
        head_width, rest = divmod(out_features, sum(heads.values()))
        if rest or any(count % groups for count in heads.values()):
            raise ValueError(f"{out_features} rows do not divide into heads {heads}")
        slices, offset = {}, 0
        for role in self.roles:
            width = heads[role] * head_width // groups
            slices[role] = RowSlice(
                groups=groups, stride=out_features // groups, offset=offset, width=width
            )
            offset += width
        return slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The projections of one family of models.

    Attributes:
        model_types: values of ``config.model_type`` that share these names.
        layers: name relative to the block -> its role, or the roles fused in it.
        dropouts: name of a layer -> the dropout between its output and the residual sum, if no
            other layer uses that dropout.
        output_norm: name of the LayerNorm at the end of a block; None if the block ends with a
            residual sum.
    """

    model_types: tuple[str, ...]
    layers: Mapping[str, str | Fused]
    dropouts: Mapping[str, str] = field(default_factory=dict)
    output_norm: str | None = None

    def output_norm_of(self, config: Any) -> str | None:
        """Return the name of the LayerNorm at the end of a block of the model that `config` describes."""
        # OPT 350M normalises after the residual sum; the other sizes normalise before the layer.
        return None if getattr(config, "do_layer_norm_before", False) else self.output_norm

    def roles_of(self, name: str) -> tuple[str, ...]:
        """Return the roles of the layer called ``name`` in its block."""
        content = self.layers.get(name, ())
        return content.roles if isinstance(content, Fused) else (content,) if content else ()


def _attention(
    *modules: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj"
) -> dict[str, str]:
    names = ((q, Q), (k, K), (v, V), (o, O))
    return {f"{module}.{name}": role for module in modules for name, role in names}


_LLAMA_ATTENTION = _attention("self_attn")
_UP_DOWN_MLP = {"mlp.up_proj": UP, "mlp.down_proj": DOWN}
_LLAMA_MLP = {"mlp.gate_proj": GATE, **_UP_DOWN_MLP}
_BERT_ATTENTION = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
_BERT_MLP = {"intermediate.dense": UP, "output.dense": DOWN}
_BERT_LAYERS = {**_attention("attention", "crossattention", **_BERT_ATTENTION), **_BERT_MLP}
_BERT_DROPOUTS = {
    "attention.output.dense": "attention.output.dropout",
    "crossattention.output.dense": "crossattention.output.dropout",
    "output.dense": "output.dropout",
}
_QKV = Fused(roles=(Q, K, V))
_FUSED_PER_HEAD = Fused(roles=(Q, K, V), interleaved=True)
_GATE_UP_MLP = {"mlp.gate_up_proj": Fused(roles=(GATE, UP)), "mlp.down_proj": DOWN}
_FC_MLP = {"mlp.fc1": UP, "mlp.fc2": DOWN}
_GPT2_MLP = {"mlp.c_fc": UP, "mlp.c_proj": DOWN}
_GPT_NEOX_MLP = {"mlp.dense_h_to_4h": UP, "mlp.dense_4h_to_h": DOWN}
_BART_LAYERS = {**_attention("self_attn", "encoder_attn", o="out_proj"), "fc1": UP, "fc2": DOWN}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_types=(
            *("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text"),
            *("bert-generation", "big_bird", "layoutlm", "nystromformer", "rembert", "roc_bert"),
            "roformer",
        ),
        layers=_BERT_LAYERS,
        dropouts=_BERT_DROPOUTS,
        output_norm="output.LayerNorm",
    ),
    Architecture(
        model_types=("xlm-roberta-xl", "roberta-prelayernorm", "megatron-bert", "esm"),
        layers=_BERT_LAYERS,
        dropouts=_BERT_DROPOUTS,
    ),
    Architecture(
        model_types=("deberta-v2",),
        layers={
            "attention.self.query_proj": Q,
            "attention.self.key_proj": K,
            "attention.self.value_proj": V,
            "attention.output.dense": O,
            **_BERT_MLP,
        },
        dropouts=_BERT_DROPOUTS,
        output_norm="output.LayerNorm",
    ),
    Architecture(
        model_types=("mpnet",),
        layers={**_attention("attention.attn", q="q", k="k", v="v", o="o"), **_BERT_MLP},
        dropouts={"attention.attn.o": "attention.dropout", "output.dense": "output.dropout"},
        output_norm="output.LayerNorm",
    ),
    Architecture(
        model_types=("distilbert",),
        layers={
            **_attention("attention", q="q_lin", k="k_lin", v="v_lin", o="out_lin"),
            "ffn.lin1": UP,
            "ffn.lin2": DOWN,
        },
        dropouts={"ffn.lin2": "ffn.dropout"},
        output_norm="output_layer_norm",
    ),
    Architecture(
        model_types=("modernbert",),
        layers={
            "attn.Wqkv": _QKV,
            "attn.Wo": O,
            "mlp.Wi": Fused(roles=(GATE, UP)),  # the activation acts on the first half
            "mlp.Wo": DOWN,
        },
    ),
    Architecture(
        model_types=("gpt2",),
        layers={
            "attn.c_attn": _QKV,
            "attn.c_proj": O,
            "crossattention.q_attn": Q,
            "crossattention.c_attn": Fused(roles=(K, V)),
            "crossattention.c_proj": O,
            **_GPT2_MLP,
        },
        dropouts={
            "attn.c_proj": "attn.resid_dropout",
            "crossattention.c_proj": "crossattention.resid_dropout",
            "mlp.c_proj": "mlp.dropout",
        },
    ),
    Architecture(
        model_types=("gpt_neo",),
        layers={**_attention("attn.attention", o="out_proj"), **_GPT2_MLP},
        dropouts={
            "attn.attention.out_proj": "attn.attention.resid_dropout",
            "mlp.c_proj": "mlp.dropout",
        },
    ),
    Architecture(
        model_types=("gptj",),
        layers={**_attention("attn", o="out_proj"), "mlp.fc_in": UP, "mlp.fc_out": DOWN},
        dropouts={"attn.out_proj": "attn.resid_dropout", "mlp.fc_out": "mlp.dropout"},
    ),
    Architecture(
        model_types=("gpt_neox",),
        layers={
            "attention.query_key_value": _FUSED_PER_HEAD,
            "attention.dense": O,
            **_GPT_NEOX_MLP,
        },
        dropouts={
            "attention.dense": "post_attention_dropout",
            "mlp.dense_4h_to_h": "post_mlp_dropout",
        },
    ),
    Architecture(
        model_types=("bloom", "falcon"),
        layers={
            "self_attention.query_key_value": _FUSED_PER_HEAD,
            "self_attention.dense": O,
            **_GPT_NEOX_MLP,
        },
    ),
    Architecture(
        model_types=("mpt",),
        layers={"attn.Wqkv": _QKV, "attn.out_proj": O, "ffn.up_proj": UP, "ffn.down_proj": DOWN},
    ),
    Architecture(
        model_types=(
            *("llama", "mistral", "ministral", "ministral3", "smollm3", "stablelm", "seed_oss"),
            *("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "vaultgemma"),
            *("cohere", "cohere2", "granite", "olmo", "olmo2", "olmo3", "exaone4", "helium"),
            *("ernie4_5", "hunyuan_v1_dense", "cwm", "exaone", "internlm3", "hyperclovax"),
            *("bitnet", "diffllama", "granite_swa", "eurobert"),
            *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "minimax_m2", "glm4_moe"),
            *("ernie4_5_moe", "exaone_moe", "granitemoe", "hunyuan_v1_moe", "solar_open"),
            *("flex_olmo", "cohere2_moe", "mellum"),
        ),
        # Blocks with experts lack the latter, and with them the whole model has no roles of the MLP (`places`).
        layers={**_LLAMA_ATTENTION, **_LLAMA_MLP},
    ),
    Architecture(
        model_types=("nomic_bert", "gte"),
        layers={**_LLAMA_ATTENTION, **_LLAMA_MLP},
        dropouts={
            "self_attn.o_proj": "post_attention_dropout",
            "mlp.down_proj": "post_mlp_dropout",
        },
        output_norm="post_mlp_layernorm",
    ),
    Architecture(
        model_types=("arcee", "nemotron", "apertus", "jais2"),
        layers={**_LLAMA_ATTENTION, **_UP_DOWN_MLP},
    ),
    Architecture(
        model_types=("phi",),
        layers={**_attention("self_attn", o="dense"), **_FC_MLP},
    ),
    Architecture(
        model_types=("phi3",),
        layers={"self_attn.qkv_proj": _QKV, "self_attn.o_proj": O, **_GATE_UP_MLP},
        dropouts={"self_attn.o_proj": "resid_attn_dropout", "mlp.down_proj": "resid_mlp_dropout"},
    ),
    Architecture(model_types=("glm", "glm4"), layers={**_LLAMA_ATTENTION, **_GATE_UP_MLP}),
    Architecture(model_types=("starcoder2",), layers={**_LLAMA_ATTENTION, **_GPT2_MLP}),
    Architecture(
        model_types=("t5", "mt5", "umt5"),
        layers={
            **_attention("SelfAttention", "EncDecAttention", q="q", k="k", v="v", o="o"),
            "DenseReluDense.wi": UP,
            "DenseReluDense.wi_0": GATE,
            "DenseReluDense.wi_1": UP,
            "DenseReluDense.wo": DOWN,
        },
        dropouts=dict.fromkeys(
            ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"), "dropout"
        ),
    ),
    Architecture(
        model_types=("bart", "marian", "opt", "mvp", "plbart", "blenderbot-small"),
        layers=_BART_LAYERS,
        output_norm="final_layer_norm",
    ),
    Architecture(
        model_types=("mbart", "m2m_100", "pegasus", "blenderbot", "whisper", "xglm", "biogpt"),
        layers=_BART_LAYERS,
    ),
    Architecture(model_types=("vit",), layers={**_attention("attention"), **_FC_MLP}),
    Architecture(
        model_types=("clip_text_model", "clip_vision_model"),
        layers={**_attention("self_attn", o="out_proj"), **_FC_MLP},
    ),
)
"""Every architecture whose roles are known."""

_BY_MODEL_TYPE = {
    model_type: architecture
    for architecture in ARCHITECTURES
    for model_type in architecture.model_types
}


def architecture_of(config: Any) -> Architecture | None:
    """Return the architecture of the model that ``config`` describes, or None if it is not known."""
    return _BY_MODEL_TYPE.get(getattr(config, "model_type", ""))
