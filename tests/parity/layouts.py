"""The layers of each role in every tiny model, written by hand.

Tests compare lorakit's tables with this one, so nothing here is derived from lorakit.
The sizes are those of ``tiny_models``: hidden size 32, two blocks, four heads of width 8, two
key/value heads if the architecture shares them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

BLOCKS = range(2)

Rows = tuple[int, ...]
"""Output rows of one projection inside a fused layer."""


@dataclass(frozen=True)
class Projection:
    """A projection of every block: a layer, or some of its output rows."""

    path: str
    """Path below the base model, with {} for the number of the block."""
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layers of one tiny model."""

    base: str
    """Path of the base model inside the model with a head, with a trailing dot."""
    roles: Mapping[str, tuple[Projection, ...]]
    """Projections of q, k, v, o, gate, up, down; several per role with cross-attention."""
    embedding: tuple[str, ...]
    """Paths below the base model."""
    language_head: tuple[str, ...] = ("lm_head",)
    class_head: tuple[str, ...] = ("score",)
    """Paths of the linear layers of the classification head."""
    class_module: str = "score"
    """The module of the classification head that a user names to train it."""
    norm: str
    """Name of a normalisation layer that a user may train in full."""
    names: tuple[str, ...]
    """Two module names that a user would target: a (fused) query projection, and one of the MLP."""


def _roles(**paths: str | tuple[str, ...] | Projection) -> dict[str, tuple[Projection, ...]]:
    roles = {}
    for role, value in paths.items():
        values = value if isinstance(value, tuple) else (value,)
        roles[role] = tuple(v if isinstance(v, Projection) else Projection(v) for v in values)
    return roles


def _fused(path: str, **rows: range | list[int]) -> dict[str, tuple[Projection, ...]]:
    return {role: (Projection(path, tuple(indices)),) for role, indices in rows.items()}


def _interleaved(path: str) -> dict[str, tuple[Projection, ...]]:
    """Return the rows of q, k, v that repeat for each of four heads of width 8 (GPT-NeoX, BLOOM)."""
    rows = {
        role: [24 * head + 8 * position + j for head in range(4) for j in range(8)]
        for position, role in enumerate(("q", "k", "v"))
    }
    return _fused(path, **rows)


def _bert(base: str, q: str, k: str, v: str, **settings) -> Layout:
    block = "encoder.layer.{}."
    return Layout(
        base=base,
        roles=_roles(
            q=f"{block}attention.self.{q}",
            k=f"{block}attention.self.{k}",
            v=f"{block}attention.self.{v}",
            o=block + "attention.output.dense",
            up=block + "intermediate.dense",
            down=block + "output.dense",
        ),
        embedding=("embeddings.word_embeddings",),
        class_module="classifier",
        norm="LayerNorm",
        names=(q, "intermediate.dense"),
        **settings,
    )


def _llama(**settings) -> Layout:
    block = "layers.{}."
    fields = {
        "base": "model.",
        "roles": _roles(
            **{x: f"{block}self_attn.{x}_proj" for x in "qkvo"},
            **{x: f"{block}mlp.{x}_proj" for x in ("gate", "up", "down")},
        ),
        "embedding": ("embed_tokens",),
        "norm": "norm",
        "names": ("q_proj", "up_proj"),
    }
    return Layout(**(fields | settings))


_BLOOM_BLOCK = {
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}

LAYOUTS: dict[str, Layout] = {
    "bert": _bert("bert.", "query", "key", "value", class_head=("classifier",)),
    "roberta": _bert(
        "roberta.",
        "query",
        "key",
        "value",
        class_head=("classifier.dense", "classifier.out_proj"),
    ),
    "deberta-v2": _bert(
        "deberta.",
        "query_proj",
        "key_proj",
        "value_proj",
        class_head=("pooler.dense", "classifier"),
    ),
    "distilbert": Layout(
        base="distilbert.",
        roles=_roles(
            q="transformer.layer.{}.attention.q_lin",
            k="transformer.layer.{}.attention.k_lin",
            v="transformer.layer.{}.attention.v_lin",
            o="transformer.layer.{}.attention.out_lin",
            up="transformer.layer.{}.ffn.lin1",
            down="transformer.layer.{}.ffn.lin2",
        ),
        embedding=("embeddings.word_embeddings",),
        class_head=("pre_classifier", "classifier"),
        # PEFT's modules_to_save=["classifier"] includes pre_classifier: it compares suffixes.
        class_module="classifier",
        norm="output_layer_norm",
        names=("q_lin", "lin1"),
    ),
    "mpnet": Layout(
        base="mpnet.",
        roles=_roles(
            **{x: f"encoder.layer.{{}}.attention.attn.{x}" for x in "qkvo"},
            up="encoder.layer.{}.intermediate.dense",
            down="encoder.layer.{}.output.dense",
        ),
        embedding=("embeddings.word_embeddings",),
        class_head=("classifier.dense", "classifier.out_proj"),
        class_module="classifier",
        norm="output.LayerNorm",
        names=("q", "intermediate.dense"),
    ),
    "gpt2": Layout(
        base="transformer.",
        roles={
            **_fused("h.{}.attn.c_attn", q=range(32), k=range(32, 64), v=range(64, 96)),
            **_roles(o="h.{}.attn.c_proj", up="h.{}.mlp.c_fc", down="h.{}.mlp.c_proj"),
        },
        embedding=("wte",),
        norm="ln_f",
        names=("c_attn", "c_fc"),
    ),
    "gpt-neox": Layout(
        base="gpt_neox.",
        roles={
            **_interleaved("layers.{}.attention.query_key_value"),
            **_roles(
                o="layers.{}.attention.dense",
                **{role: f"layers.{{}}.{name}" for role, name in _BLOOM_BLOCK.items()},
            ),
        },
        embedding=("embed_in",),
        norm="final_layer_norm",
        names=("query_key_value", "dense_h_to_4h"),
    ),
    "opt": Layout(
        base="model.decoder.",
        roles=_roles(
            **{x: f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
            o="layers.{}.self_attn.out_proj",
            up="layers.{}.fc1",
            down="layers.{}.fc2",
        ),
        embedding=("embed_tokens",),
        norm="final_layer_norm",
        names=("q_proj", "fc1"),
    ),
    "bloom": Layout(
        base="transformer.",
        roles={
            **_interleaved("h.{}.self_attention.query_key_value"),
            **_roles(
                o="h.{}.self_attention.dense",
                **{role: f"h.{{}}.{name}" for role, name in _BLOOM_BLOCK.items()},
            ),
        },
        embedding=("word_embeddings",),
        norm="ln_f",
        names=("query_key_value", "dense_h_to_4h"),
    ),
    **{
        arch: _llama()
        for arch in (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
            *("smollm3", "granite", "olmo2"),
        )
    },
    # The experts have tests of their own (test_experts).
    "mixtral": _llama(
        roles=_roles(**{x: f"layers.{{}}.self_attn.{x}_proj" for x in "qkvo"}),
        names=("q_proj", "o_proj"),
    ),
    "phi": _llama(
        roles=_roles(
            **{x: f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
            o="layers.{}.self_attn.dense",
            up="layers.{}.mlp.fc1",
            down="layers.{}.mlp.fc2",
        ),
        norm="final_layernorm",
        names=("q_proj", "fc1"),
    ),
    # Four query heads, two key and two value heads of width 8; gate and up projections of width 64.
    "phi3": _llama(
        roles={
            **_fused("layers.{}.self_attn.qkv_proj", q=range(32), k=range(32, 48), v=range(48, 64)),
            **_fused("layers.{}.mlp.gate_up_proj", gate=range(64), up=range(64, 128)),
            **_roles(o="layers.{}.self_attn.o_proj", down="layers.{}.mlp.down_proj"),
        },
        names=("qkv_proj", "gate_up_proj"),
    ),
    "t5": Layout(
        base="",
        roles=_roles(
            **{
                x: (
                    f"encoder.block.{{}}.layer.0.SelfAttention.{x}",
                    f"decoder.block.{{}}.layer.0.SelfAttention.{x}",
                    f"decoder.block.{{}}.layer.1.EncDecAttention.{x}",
                )
                for x in "qkvo"
            },
            **{
                role: (
                    f"encoder.block.{{}}.layer.1.DenseReluDense.{name}",
                    f"decoder.block.{{}}.layer.2.DenseReluDense.{name}",
                )
                for role, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
            },
        ),
        embedding=("encoder.embed_tokens", "decoder.embed_tokens"),
        class_head=("classification_head.dense", "classification_head.out_proj"),
        class_module="classification_head",
        norm="final_layer_norm",
        names=("q", "wi_1"),
    ),
    "bart": Layout(
        base="model.",
        roles=_roles(
            **{
                role: (
                    f"encoder.layers.{{}}.self_attn.{name}",
                    f"decoder.layers.{{}}.self_attn.{name}",
                    f"decoder.layers.{{}}.encoder_attn.{name}",
                )
                for role, name in (
                    *(("q", "q_proj"), ("k", "k_proj")),
                    *(("v", "v_proj"), ("o", "out_proj")),
                )
            },
            up=("encoder.layers.{}.fc1", "decoder.layers.{}.fc1"),
            down=("encoder.layers.{}.fc2", "decoder.layers.{}.fc2"),
        ),
        embedding=("encoder.embed_tokens", "decoder.embed_tokens"),
        class_head=("classification_head.dense", "classification_head.out_proj"),
        class_module="classification_head",
        norm="layernorm_embedding",
        names=("q_proj", "fc1"),
    ),
    "vit": Layout(
        base="vit.",
        roles=_roles(
            **{x: f"layers.{{}}.attention.{x}_proj" for x in "qkvo"},
            up="layers.{}.mlp.fc1",
            down="layers.{}.mlp.fc2",
        ),
        embedding=("embeddings.patch_embeddings.projection",),
        class_head=("classifier",),
        class_module="classifier",
        norm="layernorm",
        names=("q_proj", "fc1"),
    ),
}

WITHOUT_BIAS = ("llama", "mistral", "mixtral", "qwen3", "gemma", "gemma2", "gemma3", "smollm3")
WITHOUT_BIAS += ("phi3", "granite", "olmo2")
"""Architectures without any bias. T5 has biases only in its classification head."""


@dataclass(frozen=True)
class Target:
    """An adapted layer: the whole layer, or slices of its rows."""

    path: str
    slices: tuple[Rows, ...] = ()


def base_prefix(arch: str, head: str) -> str:
    """Return the path of the base model with a trailing dot; in T5 it is nested only under a classification head."""
    if arch == "t5" and head == "sequence-classification":
        return "transformer."
    return LAYOUTS[arch].base


def is_classifier(head: str) -> bool:
    return head.endswith("classification")


def head_layers(arch: str, head: str) -> tuple[str, ...]:
    layout = LAYOUTS[arch]
    return layout.class_head if is_classifier(head) else layout.language_head


def head_module(arch: str, head: str) -> str:
    return LAYOUTS[arch].class_module if is_classifier(head) else "lm_head"


def expected_targets(arch: str, head: str, targets: tuple[str, ...]) -> dict[str, Target]:
    """Return the layers that `targets` select in a tiny model, by path."""
    slices: dict[str, set[Rows] | None] = {}
    for entry in targets:
        for path, rows in _places(arch, head, entry):
            if rows is None:
                slices[path] = None
            elif (known := slices.setdefault(path, set())) is not None:
                known.add(rows)
    return {path: Target(path, tuple(sorted(rows or ()))) for path, rows in slices.items()}


def _places(arch: str, head: str, entry: str) -> list[tuple[str, Rows | None]]:
    layout, base = LAYOUTS[arch], base_prefix(arch, head)
    combined = {"mlp": ("gate", "up", "down"), "all-linear": (*"qkvo", "gate", "up", "down")}
    roles: tuple[str, ...] = combined.get(entry, ())
    if entry.startswith("attention"):
        roles = tuple(entry.partition(".")[2] or "qkvo")
    elif entry.startswith("mlp."):
        roles = (entry.removeprefix("mlp."),)
    if roles:
        return [
            (base + place.path.format(i), place.rows)
            for role in roles
            for place in layout.roles.get(role, ())
            for i in BLOCKS
        ]
    if entry == "embedding":
        return [(base + path, None) for path in layout.embedding]
    if entry == "head":
        return [(path, None) for path in head_layers(arch, head)]
    everything = {path for path, _ in _places(arch, head, "all-linear")}
    named = {path for path in everything if f".{path}".endswith(f".{entry}")}
    return [(p, None) for p in named or {p for p in everything if re.fullmatch(entry, p)}]
