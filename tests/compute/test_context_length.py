"""The longest input that a model's configuration states."""

from __future__ import annotations

import transformers

from lorakit.compute.batching import context_length


def test_a_negative_context_is_no_limit() -> None:
    """XLNet's positions are relative, and its configuration has -1 as their number."""
    config = transformers.XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert config.max_position_embeddings == -1
    assert context_length(transformers.XLNetForSequenceClassification(config)) is None
