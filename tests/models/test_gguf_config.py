"""The configuration of a GGUF file keeps every setting that changes the computation, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import tiny_llama, tiny_starcoder2, tiny_t5, write_gguf
from transformers import (
    AutoConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    StableLmConfig,
)

from lorakit.compute.base import is_encoder_decoder
from lorakit.errors import BaseModelError
from lorakit.models import gguf as module
from lorakit.models.base_config import BaseConfig
from lorakit.models.gguf import converted_folder, described_folder
from lorakit.models.gguf_config import read_config
from lorakit.models.gguf_header import Header, read_header
from lorakit.models.loading import load_base

pytestmark = pytest.mark.usefixtures("cache")


def test_query_and_key_rows_without_the_number_of_key_heads(tmp_path: Path) -> None:
    source = tiny_llama(num_key_value_heads=4)
    path = write_gguf(tmp_path / "tiny.gguf", source, settings={"attention.head_count_kv": None})
    weights = load_base(path, dtype="float32").model.state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("build", "settings", "options"),
    [
        (
            tiny_starcoder2,
            {"rope.freq_base": 1e6},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ),
        (tiny_starcoder2, {"attention.sliding_window": 4}, {"sliding_window": 4}),
        *(
            (
                tiny_llama,
                settings,
                {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            )
            for settings in (
                {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                {"rope.scale_linear": 4.0},  # of older files
            )
        ),
        (tiny_llama, {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, {}),
        (tiny_llama, {"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0}, {}),
        (tiny_llama, {"attention.sliding_window": 128}, {}),
    ],
)
def test_settings_of_rope_and_of_the_sliding_window(
    tmp_path: Path,
    build: Callable[..., PreTrainedModel],
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    source = build(**options)
    for (
        weight
    ) in source.parameters():  # positions hardly count with the small weights of a new model
        weight.data.mul_(10)
    path = write_gguf(tmp_path / "tiny.gguf", source, pre="starcoder", settings=settings)
    described = AutoConfig.from_pretrained(described_folder(path))
    base = load_base(path, dtype="float32")
    for config in (described, base.model.config):
        for name in ("rope_parameters", *options):
            assert getattr(config, name) == getattr(source.config, name)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = source(ids).logits
        assert torch.equal(base.model(ids).logits, logits)
        if options:
            unset = build()
            unset.load_state_dict(source.state_dict())
            assert not torch.allclose(unset(ids).logits, logits, rtol=0.01, atol=0.01)


def test_head_and_activation_of_t5(tmp_path: Path) -> None:
    source = tiny_t5()
    settings = {"attention.key_length": 8, "attention.layer_norm_epsilon": 1e-6}
    settings |= {"rope.dimension_count": None, "rope.freq_base": None}
    path = write_gguf(tmp_path / "tiny.gguf", source, settings=settings)
    header = read_header(path)
    model = module._read_model(path, read_config(path, header), header).float().eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = [each(input_ids=ids, decoder_input_ids=ids).logits for each in (source, model)]
    assert torch.equal(*logits)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    # So a task of text opens it with its own head.
    assert is_encoder_decoder(BaseConfig(name=str(path)))


def test_rope_of_each_type_of_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"general.architecture": "gemma3", "gemma3.context_length": 131072}
    settings |= {"gemma3.rope.freq_base": 2e6, "gemma3.rope.freq_base_swa": 2e4}
    settings |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    settings |= {"gemma3.attention.sliding_window": 1024}
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: Gemma3TextConfig())
    config = read_config(tmp_path / "gemma.gguf", Header(settings, ()))
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert config.sliding_window == 1024


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (Gemma2Config(num_hidden_layers=46, hidden_size=4608, num_attention_heads=32), 144),
        (Gemma3TextConfig(num_hidden_layers=62, hidden_size=5376, num_attention_heads=32), 168),
        (Gemma3TextConfig(num_hidden_layers=18, hidden_size=640, head_dim=128), 128),
    ],
)
def test_attention_scale_of_gemma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig, scale: int
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    settings = {"general.architecture": config.model_type.removesuffix("_text")}
    read = read_config(tmp_path / "gemma.gguf", Header(settings, ()))
    assert read.query_pre_attn_scalar == scale


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"rope\.scaling\.type yarn"),
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type longrope"),
        ({"rope.scaling.attn_factor": 1.190238}, r"rope\.scaling\.attn_factor 1\.19"),
        ({"attention.sliding_window": 64}, r"attention\.sliding_window 64"),
        ({"attention.causal": False}, r"attention\.causal False"),
        ({"attention.sliding_window_pattern": [True, False]}, r"attention\.sliding_window_pattern"),
        ({"expert_count": 8}, r"expert_count 8"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30"),
        ({"logit_scale": 0.1}, r"logit_scale 0\.1"),
        ({"ssm.dt_b_c_rms": True}, r"ssm\.dt_b_c_rms True"),
    ],
)
@pytest.mark.parametrize("folder_of", [converted_folder, described_folder])
def test_settings_that_transformers_cannot_compute(
    tmp_path: Path, llama: LlamaForCausalLM, settings: dict[str, Any], named: str, folder_of: Any
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, settings=settings)
    with pytest.raises(BaseModelError, match=rf"tiny\.gguf' has the setting {named}, .*original"):
        folder_of(path)


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (
            Gemma3TextConfig(),  # as Ollama writes it
            {
                "attention.key_length": 256,
                "final_logit_softcapping": 30.0,
                "rope.global.freq_base": 2e6,
                "rope.local.freq_base": 2e4,
            },
            {
                "final_logit_softcapping": 30.0,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                },
            },
        ),
        (
            FalconConfig(),
            {"attention.layer_norm_epsilon": 1e-3, "tensor_data_layout": "jploski"},
            {"layer_norm_epsilon": 1e-3},
        ),
        (
            NemotronConfig(),
            {
                "attention.layer_norm_epsilon": 1e-3,
                "rope.dimension_count": 64,
                "rope.scaling.type": "none",
            },
            {"norm_eps": 1e-3},
        ),
        (
            StableLmConfig(),
            {"use_parallel_residual": True, "rope.dimension_count": 20},
            {"use_parallel_residual": False},
        ),
        (
            Phi3Config(),
            {
                "rope.dimension_count": 96,
                "rope.scaling.original_context_length": 512,
                "attention.sliding_window": 0,
            },
            {},
        ),
        (
            Qwen2MoeConfig(),
            {
                "expert_count": 60,
                "expert_used_count": 4,
                "expert_feed_forward_length": 1408,
                "expert_shared_feed_forward_length": 5632,
                "expert_weights_norm": True,
            },
            {"norm_topk_prob": True},
        ),
        (MambaConfig(), {"ssm.dt_b_c_rms": False, "attention.head_count": 0}, {}),
        (
            LlamaConfig(),
            {
                "attention.causal": True,
                "attention.value_length": 128,
                "attention.layer_norm_epsilon": 1e-5,
                "pooling_type": 3,
                "expert_count": 0,
            },
            {},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_settings_that_change_nothing_or_can_be_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: PreTrainedConfig,
    settings: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    architecture = config.model_type.removesuffix("_text")
    settings = {"vocab_size": 99, "context_length": 512, **settings}
    named = {f"{architecture}.{name}": value for name, value in settings.items()}
    header = Header({"general.architecture": architecture, "tokenizer.ggml.x": 1, **named}, ())
    read = read_config(tmp_path / "tiny.gguf", header).to_dict()
    assert {name: read[name] for name in expected} == expected


def test_a_share_of_a_head_that_rotates(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_starcoder2(), settings={"rope.dimension_count": 4}
    )
    with pytest.raises(BaseModelError, match=r"has the setting rope\.dimension_count 4"):
        converted_folder(path)
