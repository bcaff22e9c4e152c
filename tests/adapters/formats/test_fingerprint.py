"""Fingerprints: which models count as the base of an adapter, and which do not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import pytest
import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import lorakit
from lorakit.adapters.formats.fingerprint import BaseRecord, base_record, compare
from lorakit.errors import WrongBaseError
from lorakit.models import digests


@dataclass(frozen=True)
class Source:
    name: str
    revision: str | None = None


def llama(**settings) -> nn.Module:
    return tiny_models.build("llama", **settings)


def record(model: nn.Module, name: str | None = None, exclude=(), revision=None) -> BaseRecord:
    source = Source(name, revision) if name else None
    return base_record(model, source, exclude)


def test_the_hash_is_over_names_shapes_dtypes_and_numbers():
    """A fixed value: a change of it would make every saved adapter unusable."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 1 / 3]]))
        model.bias.copy_(torch.tensor([0.5, -1.0]))

    def digest(dtype: torch.dtype) -> str:
        whole = hashlib.sha256()
        for name, parameter in (("bias", model.bias), ("weight", model.weight)):
            numbers = parameter.detach().to(dtype).view(torch.uint8).numpy().tobytes()
            head = f"{str(dtype).removeprefix('torch.')}{tuple(parameter.shape)}\0".encode()
            whole.update(name.encode() + b"\0" + hashlib.sha256(head + numbers).digest())
        return whole.hexdigest()

    found = base_record(model)
    assert found.exact == digest(torch.float32)
    assert found.bfloat16 == digest(torch.bfloat16)
    shapes = hashlib.sha256(b"bias\0(2,)\0weight\0(2, 2)\0").hexdigest()
    assert (found.class_name, found.model_type, found.shapes) == ("Linear", None, shapes)


def test_the_same_model_is_the_same(monkeypatch):
    first = record(llama())
    assert compare(first, record(llama())) == []
    assert record(llama()) == first
    monkeypatch.setattr(digests, "_CHUNK", 7)  # hash a tensor in several chunks
    assert record(llama()) == first


@pytest.mark.parametrize(
    "where", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_one_number_more_or_less_is_another_base(where):
    model = llama()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[-1] += 2**-20
    with pytest.raises(WrongBaseError, match="its float32 weights differ") as caught:
        compare(record(llama()), record(model))
    assert "allow_other_base" in str(caught.value)


def test_another_architecture():
    trained = record(llama(), "owner/llama")
    for other, word in (
        (tiny_models.build("llama", "sequence-classification"), "its class is LlamaForSequence"),
        (tiny_models.build("mistral"), "its class is MistralForCausalLM, not LlamaForCausalLM"),
        (llama(vocab_size=100), "another size or vocabulary"),
        (llama(num_hidden_layers=1), "other parameters"),
    ):
        with pytest.raises(WrongBaseError, match=word) as caught:
            compare(trained, record(other))
        assert "trained on 'owner/llama'" in str(caught.value)


def test_another_dtype_of_the_same_weights_is_reported():
    notices = compare(record(llama()), record(llama().bfloat16()))
    assert notices == [
        "The adapter was trained on float32 weights and runs on bfloat16 ones; rounded to bfloat16 they "
        "are the same."
    ]
    assert "float16" in compare(record(llama().half().float()), record(llama().half()))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_more_precise_dtype_than_that_of_the_training_is_not_reported(dtype):
    trained = record(llama().bfloat16())
    assert compare(trained, record(llama().bfloat16().to(dtype))) == []
    assert compare(trained, record(llama())) == []  # its own digits beyond bfloat16
    with pytest.raises(WrongBaseError):
        compare(trained, record(other_weights()))


def test_float16_of_float32_weights_needs_the_revision_to_vouch():
    """Rounding to float16 and then to bfloat16 can differ from rounding to bfloat16."""
    then, now = record(llama()), record(llama().half())
    assert then.bfloat16 != now.bfloat16
    with pytest.raises(
        WrongBaseError,
        match=r"float16 weights differ, .*\(load it as in the training, in float32, ",
    ):
        compare(then, now)
    with pytest.raises(WrongBaseError, match="float16 weights differ"):
        compare(record(llama(), "folder"), record(llama().half(), "folder"))
    then, now = record(llama(), "a/b", revision="1"), record(llama().half(), "a/b", revision="1")
    assert "both of 'a/b' at revision 1. Rounded twice" in compare(then, now)[0]
    with pytest.raises(WrongBaseError, match=r"'a/b' at revision 1"):
        compare(then, record(llama().half(), "a/b", revision="2"))


def other_weights() -> nn.Module:
    return tiny_models.build("llama", seed=1)


def test_the_source_is_what_the_model_says_of_itself():
    model = llama()

    def source(found: BaseRecord) -> tuple[str | None, str | None]:
        return found.name, found.revision

    assert source(record(model)) == (None, None)
    model.config._name_or_path, model.config._commit_hash = "a/b", "123"
    assert source(record(model)) == ("a/b", "123")
    assert source(record(model, "c/d", revision="9")) == ("c/d", "9")


def test_adapters_do_not_count():
    model = llama()
    plain = record(model)
    settings = lorakit.LoRA(rank=2, targets="attention.q", bias="none", train_modules=["norm"])
    handle = lorakit.attach(model, settings, seed=0)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter += 1
    assert record(model) == plain
    handle.merge()
    assert record(model) == plain
    handle.unmerge()
    handle.activate(None)
    assert record(model) == plain


def test_a_tied_weight_counts_once():
    tied = tiny_models.build("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    untied = tiny_models.build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(WrongBaseError, match="other parameters"):
        compare(record(tied), record(untied))


def quantised(model: nn.Module) -> nn.Module:
    """A linear layer after an int8 quantiser: integers of another shape."""
    layer = model.model.layers[0].self_attn.q_proj
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return model


def test_quantised_weights_are_trusted_by_their_source():
    then = record(llama(), "a/b", revision="1")
    now = record(quantised(llama()), "a/b", revision="1")
    assert (now.dtype, now.bfloat16) == ("quantised", None)
    assert compare(now, record(quantised(llama()), "c/d")) == []  # the same packed numbers
    (notice,) = compare(then, now)
    assert "float32 weights and runs on quantised ones, of 'a/b'" in notice
    assert compare(now, then)
    for revision, of in (
        (None, "of 'a/b' at revision 1 and 'a/b'"),
        ("2", "of 'a/b' at revision 1 and 'a/b' at revision 2"),
    ):
        (notice,) = compare(then, record(quantised(llama()), "a/b", revision=revision))
        assert f"runs on quantised ones, {of}. quantised weights cannot be compared" in notice
    with pytest.raises(WrongBaseError, match="cannot be compared"):
        compare(then, record(quantised(llama()), "c/d"))
    (notice,) = compare(then, record(quantised(llama())))
    assert "make sure that it is the same base model" in notice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rms_norm_eps": 0.5}, r"rms_norm_eps 1e-06 -> 0\.5"),
        ({"hidden_act": "gelu"}, 'hidden_act "silu" -> "gelu"'),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            r"rope_parameters\.rope_theta 10000 -> 500000 ",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            r"rope_parameters\.factor null -> 2, .*rope_type \"default\" -> \"linear\"",
        ),
    ],
    ids=["eps", "activation", "theta", "rope scaling"],
)
def test_another_configuration_is_another_base(settings, message):
    with pytest.raises(WrongBaseError, match=f"its configuration differs in {message}"):
        compare(record(llama()), record(llama(**settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"bos_token_id": 5},
        {"pad_token_id": None},
        {"initializer_range": 0.5},
        {"attention_dropout": 0.5},  # acts in training only
        {"attn_implementation": "eager"},
        {"rms_norm_eps": 9.999999974752427e-07},  # as float32, from GGUF
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"a_field_of_another_tool": 1},
    ],
    ids=str,
)
def test_a_configuration_that_computes_the_same_is_the_same(settings):
    live = llama()
    for name, value in settings.items():
        setattr(live.config, name, value)
    assert compare(record(llama()), record(live)) == []


def test_another_version_of_transformers_may_have_other_fields():
    then, now = record(llama()), record(llama())
    then.configuration["transformers_version"] = "5.0.0"
    del then.configuration["mlp_bias"]
    now.configuration["rope_parameters"]["partial_rotary_factor"] = 1
    assert compare(then, now) == []
    now.configuration["rope_parameters"]["rope_theta"] = 7
    with pytest.raises(WrongBaseError, match="rope_theta 10000 -> 7"):
        compare(then, now)


def test_another_tokenizer_is_reported():
    def recorded(tokenizer) -> BaseRecord:
        return base_record(llama(), tokenizer=tokenizer)

    then = recorded(tiny_tokenizer())
    assert compare(then, recorded(tiny_tokenizer())) == []
    used = tiny_tokenizer()
    used(["a", "a b c d"], padding=True, truncation=True, max_length=2)
    used.pad_token, used.padding_side, used.model_max_length = used.eos_token, "left", 7
    assert compare(then, recorded(used)) == []
    for other in (tiny_tokenizer(adds_bos=True), tiny_tokenizer(chat_template=None)):
        (notice,) = compare(then, recorded(other))
        assert "another tokenizer" in notice
    assert compare(then, record(llama())) == []  # not known
    assert compare(record(llama()), then) == []


def test_json_there_and_back():
    source = Source("a/b", "1")
    found = base_record(llama(), source, ["model.norm.weight"], tokenizer=tiny_tokenizer())
    assert BaseRecord.from_json(json.loads(json.dumps(asdict(found)))) == found
