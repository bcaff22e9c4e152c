"""adapter_config.json is validated strictly, and its patterns mean the same as in PEFT."""

from __future__ import annotations

import dataclasses
import json

import hypothesis.strategies as st
import peft
import pytest
from hypothesis import given
from peft.utils.other import get_pattern_key

from lorakit.adapters.formats.peft.adapter_config import (
    _IMPLEMENTED,
    _NO_EFFECT,
    _NOT_IMPLEMENTED,
    _NOT_MERGEABLE,
    parse,
)
from lorakit.errors import AdapterFileError

LORA = {"peft_type": "LORA", "target_modules": ["q"]}


def as_json(config: peft.LoraConfig) -> dict:
    """The options that PEFT would write."""
    found = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.loads(json.dumps(found))


def test_pefts_defaults_are_ours():
    config = parse(as_json(peft.LoraConfig()))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8.0, 0.0, "none")
    flags = (config.use_rslora, config.use_dora, config.fan_in_fan_out)
    assert not any(flags)
    assert config == parse({"peft_type": "LORA"})


def test_every_option_of_the_installed_peft_is_judged():
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    judged = _NO_EFFECT | _IMPLEMENTED | _NOT_IMPLEMENTED.keys()
    assert options <= judged
    assert not _NO_EFFECT & _IMPLEMENTED
    assert not (_NO_EFFECT | _IMPLEMENTED) & _NOT_IMPLEMENTED.keys()
    assert _NOT_IMPLEMENTED.keys() >= _NOT_MERGEABLE


@pytest.mark.parametrize("option", sorted(_NOT_IMPLEMENTED))
def test_an_option_that_lorakit_does_not_have_is_named(option: str):
    assert parse({**LORA, option: None}) == parse({**LORA, option: {}}) == parse(LORA)
    with pytest.raises(
        AdapterFileError, match=rf"the option {option} is set \(\{{'x': 1\}}\)"
    ) as caught:
        parse({**LORA, option: {"x": 1}})
    assert ("merge it there" in str(caught.value)) == (option not in _NOT_MERGEABLE)


def test_an_option_of_a_future_peft():
    assert parse({**LORA, "use_zlora": False, "z_config": None}) == parse(LORA)
    with pytest.raises(AdapterFileError, match=r"use_zlora is set.*does not know"):
        parse({**LORA, "use_zlora": True})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pissa", "path_initial_model_for_weight_conversion"),
        ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("olora", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        (
            "loftq",
            "before training. To load it on the changed base, .* set init_lora_weights to true",
        ),
        ("something new", "init_lora_weights is 'something new'"),
        (1, "init_lora_weights is 1"),
    ],
)
def test_an_initialisation_that_changes_the_base(init, message: str):
    with pytest.raises(AdapterFileError, match=message):
        parse({**LORA, "init_lora_weights": init})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": "IA3"}, "of type 'IA3'; lorakit reads only LORA"),
        ({"peft_type": ["LORA"]}, r"of type \['LORA'\]"),
        ({"r": 0}, "r is 0; it must be a whole number of 1 or more"),
        ({"r": -8}, "r is -8"),
        ({"r": 8.0}, "r is 8.0"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0, so the adapter would have no effect"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": False}, "lora_alpha is False"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
        ({"rank_pattern": ["q"]}, "rank_pattern is .*must be a mapping"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern holds .* not a valid regular expression"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be at least 0 and below 1"),
        ({"lora_dropout": "a lot"}, "lora_dropout is 'a lot'"),
        ({"lora_dropout": 10**400}, "lora_dropout is 1000.*; it must be a finite number"),
        ({"lora_dropout": float("inf")}, "lora_dropout is inf"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"bias": "some"}, "bias is 'some'; it must be one of none, all, lora_only"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; it must be True or False"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"target_modules": ["q", None]}, r"target_modules\[1\] is None; it must be a string"),
        ({"modules_to_save": [""]}, "lists an empty name"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save is"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(change: dict, message: str):
    with pytest.raises(AdapterFileError, match=message):
        parse({**LORA, **change})


# --- ranks and alphas by layer ----------------------------------------------------------------------

PATHS = (
    "q",
    "model.q",
    "model.layers.0.attn.q",
    "model.layers.0.attn.q_norm",
    "model.layers.1.attn.q",
    "model.layers.11.attn.q",
    "model.layers.1.experts.0.q",
    "h.1.q",
    "h.2.mlp.fc",
    "model.blocks.3.q",
    "lm_head",
    "head.0.q",
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["q", "^q", "attn.q", r"layers\.\d+\.attn", r"^model\.layers\.1\..*", "q|fc"]
        ),
        st.integers(1, 64),
    )
)
def test_patterns_mean_what_they_mean_to_peft(pattern: dict[str, int]):
    config = parse({**LORA, "rank_pattern": pattern, "alpha_pattern": pattern, "lora_alpha": 5})
    for path in PATHS:
        key = get_pattern_key(pattern, path)
        assert config.rank_of(path) == pattern.get(key, 8)
        assert config.alpha_of(path) == pattern.get(key, 5)
