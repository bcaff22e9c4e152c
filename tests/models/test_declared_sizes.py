"""The config.json of a base is untrusted: absurd numbers are errors that name the field, before a model is built."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest
import tiny_models
from transformers import CONFIG_MAPPING

from lorakit.errors import BaseModelError
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import shape_of
from lorakit.models.declared_sizes import check_declared
from lorakit.models.loading import load_base


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5", "bert"):
        tiny_models.build(arch).save_pretrained(folder / arch)
    return folder


def edited(models, arch, field, value):
    path = models / arch / "config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.with_name("other").mkdir(exist_ok=True)
    other = path.parent / "other"
    for file in path.parent.glob("*.safetensors"):
        (other / file.name).unlink(missing_ok=True)
        (other / file.name).symlink_to(file)
    text = json.dumps(config).replace('"1e400"', "1e400")
    (other / "config.json").write_text(text)
    return other


@pytest.mark.parametrize(
    ("arch", "field", "value"),
    [
        ("llama", "num_hidden_layers", -1),
        ("llama", "num_hidden_layers", 0),
        ("llama", "num_hidden_layers", 10**9),
        ("llama", "num_hidden_layers", 10**400),
        ("llama", "vocab_size", 10**12),
        ("llama", "vocab_size", 0),
        ("llama", "hidden_size", 0),
        ("llama", "hidden_size", -16),
        ("llama", "intermediate_size", 10**9),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_key_value_heads", 0),
        ("llama", "head_dim", -1),
        ("llama", "max_position_embeddings", 10**18),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "rms_norm_eps", "1e400"),
        ("llama", "attention_dropout", float("inf")),
        ("gpt2", "n_layer", 10**9),
        ("gpt2", "n_embd", 0),
        ("gpt2", "n_head", 0),
        ("t5", "num_layers", 10**9),
        ("t5", "d_model", -1),
        ("t5", "d_ff", 10**12),
        ("bert", "num_hidden_layers", -5),
    ],
)
def test_an_absurd_number_is_an_error_that_names_its_field(models, arch, field, value):
    folder = edited(models, arch, field, value)
    began = time.monotonic()
    for read in (load_base, lambda name: shape_of(BaseConfig(name=str(name)))):
        with pytest.raises(
            BaseModelError, match=rf"config\.json of 'other' sets {field} to .* expected"
        ):
            read(folder)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("arch", "field"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_far_more_layers_than_the_weights_have_is_an_error(models, arch, field):
    folder = edited(models, arch, field, 5000)
    with pytest.raises(
        BaseModelError,
        match=rf"sets {field} to 5,000, but its files have the weights of \d+ layers",
    ):
        load_base(folder)


def test_an_index_beside_the_weights_is_ignored(tmp_path):
    tiny_models.build("llama").save_pretrained(tmp_path)
    stale = {"weight_map": {"model.layers.0.mlp.up_proj.weight": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale))
    check_declared("m", {"num_hidden_layers": 3}, tmp_path)  # at most twice those in the weights


def test_a_nested_section_is_checked_too():
    config = {"text_config": {"num_hidden_layers": 10**9}}
    with pytest.raises(
        BaseModelError, match=r"sets text_config.num_hidden_layers to 1,000,000,000"
    ):
        check_declared("m", config, "owner/name")


def test_the_section_of_a_quantisation_has_no_sizes(models):
    """torchao writes a `dim` of -1."""
    granularity = {"quant_type": {"default": {"granularity": {"dim": -1}}}}
    config = json.loads((models / "llama" / "config.json").read_text())
    check_declared("x", config | {"quantization_config": granularity}, models / "llama")
    with pytest.raises(BaseModelError, match=r"sets text_config.dim to -1"):
        check_declared("x", config | {"text_config": {"dim": -1}}, models / "llama")


def test_weights_of_other_shapes_are_an_error_with_the_reason(models):
    with pytest.raises(
        BaseModelError, match=r"shapes of its weights differ from those that its config"
    ):
        load_base(edited(models, "llama", "vocab_size", 333))


@pytest.mark.slow
def test_the_defaults_of_every_architecture_are_accepted():
    checked = 0
    for kind in CONFIG_MAPPING:
        with suppress(Exception):  # a few need arguments, or packages that are not installed
            config = CONFIG_MAPPING[kind]().to_dict()
            checked += 1
            try:
                check_declared(kind, config, "x")
            except BaseModelError as error:
                pytest.fail(str(error))
    assert checked > 300


def test_shared_layers_and_null_are_accepted():
    check_declared("m", {"num_hidden_groups": 1, "num_hidden_layers": 12, "n_inner": None}, "x")
    check_declared("m", {"time_step_limit": [0.0, float("inf")], "hidden_size": [8, 16]}, "x")
