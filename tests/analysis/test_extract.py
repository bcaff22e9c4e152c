"""An extracted adapter approximates the difference of two models, and reports its error."""

from __future__ import annotations

import json
import math
import weakref

import at_rest
import pytest
import tiny_models
import torch
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from sample_adapters import randn
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, RobertaForTokenClassification

import lorakit
from lorakit import analysis
from lorakit.adapters.loading import load
from lorakit.analysis import base_weights, extract, extract_adapter
from lorakit.analysis.leading import leading_svd
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.agreement import agreement, logits_of_prompts
from lorakit.errors import AdapterFileError, BaseModelError, ConfigurationError, WrongBaseError
from lorakit.formatting import percentage
from lorakit.models.base_config import BaseConfig
from lorakit.models.tokenizer import tokenizer_digest


@pytest.mark.parametrize("target", [{"rank": 3}, {"energy": 0.7}, {"rank": 40}])
def test_the_best_factors_of_a_difference(target):
    base, tuned = randn(30, 20, seed=0), randn(30, 20, seed=1)
    change = (tuned - base).double()
    A, B, error = extract(base, tuned, **target)
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    k = len(A)
    if "energy" in target:
        shares = S.square().cumsum(0) / S.square().sum()
        assert k == int((shares < 0.7).sum()) + 1
    else:
        assert k == min(target["rank"], 20)
    found = B.double() @ A.double()
    torch.testing.assert_close(found, U[:, :k] * S[:k] @ Vh[:k], rtol=0, atol=1e-4)
    assert error == pytest.approx(float(S[k:].norm() / S.norm()), abs=1e-6)


def models(tmp_path, arch="gpt2", vocab_size=None, **settings):
    """Save a base and a copy with a merged adapter of rank 3; return the base's configuration and the copy."""
    model = tiny_models.build(arch, **({"vocab_size": vocab_size} if vocab_size else {}))
    model.save_pretrained(tmp_path / "base")
    method = lorakit.LoRA(**{"rank": 3, "alpha": 3, "targets": "all-linear"} | settings)
    handle = lorakit.attach(model, method, name="a")
    randomise(handle, scale=0.1)
    handle.merge(keep_base=False)
    model.save_pretrained(tmp_path / "tuned")
    return BaseConfig(name=str(tmp_path / "base")), model


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt-neox", "roberta", "mixtral"])
def test_a_difference_of_low_rank_is_found_again(arch, tmp_path):
    base, tuned = models(tmp_path, arch)
    made = extract_adapter(base, tmp_path / "tuned", rank=3)
    assert made.error < 1e-4
    # GPT-NeoX has another name for its head in the file.
    assert len(made.notices) == (arch == "gpt-neox")
    model = tiny_models.build(arch)
    load(model, made.adapter, name="extracted")
    batch = tiny_models.example_batch(arch, model)
    with torch.no_grad():
        expected = tuned(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_adapter_is_compared_with_the_fine_tuned_model(rank, tmp_path):
    tokenizer = tiny_tokenizer()
    base, tuned = models(tmp_path, "llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        tuned.model.norm.weight += 0.5  # not in the adapter
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "base")
    made = extract_adapter(base, tmp_path / "tuned", rank=rank)
    model = tiny_models.build("llama", vocab_size=len(tokenizer))
    load(model, made.adapter, name="extracted")
    adapted = logits_of_prompts(model, tokenizer)
    expected = agreement(logits_of_prompts(tuned, tokenizer), adapted)
    assert made.agreement is not None
    assert made.agreement.predictions == expected.predictions
    assert made.agreement.changed == expected.changed
    assert made.agreement.difference == pytest.approx(expected.difference, rel=1e-3)
    assert made.agreement.scale == pytest.approx(expected.scale, rel=1e-5)
    assert made.agreement.difference > 0.01


def test_models_that_predict_nothing_are_not_compared(tmp_path):
    base, _ = models(tmp_path)  # no tokenizer
    assert extract_adapter(base.name, tmp_path / "tuned", rank=3).agreement is None


def test_slices_of_fused_layers_and_other_kinds(tmp_path):
    base, _ = models(tmp_path, targets=("attention.qv", "embedding"))
    made = extract_adapter(base, tmp_path / "tuned", targets=("attention.qv", "embedding"), rank=3)
    assert made.error < 1e-4
    fused = made.adapter.layers["transformer.h.0.attn.c_attn"]
    assert [str(piece) for piece in fused.slices] == ["rows 0:32", "rows 64:96"]
    assert made.adapter.layers["transformer.wte"].kind == "embedding"


def test_energy_and_the_error_of_each_layer(tmp_path):
    base, tuned = models(tmp_path)
    original = tiny_models.build("gpt2")
    made = extract_adapter(base, tmp_path / "tuned", energy=0.6)
    for path, layer in made.adapter.layers.items():
        name = f"{path}.weight"
        change = (tuned.get_parameter(name) - original.get_parameter(name)).detach().double().T
        left = change - at_rest.delta(layer)
        assert made.layers[path].residual == pytest.approx(float(left.norm()), rel=1e-3)
        assert left.norm() ** 2 <= 0.4 * change.norm() ** 2 * (1 + 1e-5)
        assert made.adapter.method.rank_of(path) == layer.rank


def test_what_else_differs_is_said_or_taken_in(tmp_path):
    base, tuned = models(tmp_path, targets=("attention.qv",))
    with torch.no_grad():
        tuned.transformer.ln_f.weight += 0.5
        tuned.transformer.h[1].mlp.c_fc.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(base, tmp_path / "tuned", targets="attention", rank=3)
    unchanged, left = made.notices
    assert "2 targeted layers are the same" in unchanged
    assert "2 other parameters differ" in left
    assert "'transformer.h.1.mlp.c_fc.weight' most" in left
    taken = math.hypot(*(layer.norm for layer in made.layers.values())) ** 2
    missing = 0.25 * 32 + 0.01 * 32 * 128
    assert percentage(taken, taken + missing) in left

    made = extract_adapter(
        base, tmp_path / "tuned", targets=("attention", "mlp"), train_modules="ln_f", rank=3
    )
    assert "other parameters" not in "".join(made.notices)
    expected = tuned.transformer.ln_f.weight.detach()
    assert torch.equal(made.adapter.trained["transformer.ln_f.weight"], expected)


@pytest.mark.parametrize("target", [{"rank": 3}, {"energy": 0.9}])
def test_rows_outside_the_slices_are_no_part_of_the_adapter(target, tmp_path):
    """GPT-2 fuses q, k and v; the adapter covers q and v."""
    base, tuned = models(tmp_path, targets=("attention.qv",))
    name = "transformer.h.0.attn.c_attn.weight"
    with torch.no_grad():
        tuned.get_parameter(name)[:, 32:64] += 1  # k
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.qv", **target)
    (left,) = made.notices
    assert f"'{name} outside the targeted rows' most" in left
    taken = math.hypot(*(layer.norm for layer in made.layers.values())) ** 2
    left_out = made.error**2 * taken
    assert percentage(taken - left_out, taken + 32 * 32) in left

    only_k = tiny_models.build("gpt2")
    with torch.no_grad():
        only_k.get_parameter(name)[:, 32:64] += 1
    only_k.save_pretrained(tmp_path / "only_k")
    with pytest.raises(AdapterFileError, match="nothing to extract"):
        extract_adapter(base, tmp_path / "only_k", targets="attention.qv", **target)
    with torch.no_grad():
        only_k.get_parameter(name.replace("0", "1"))[:, :32] += 1  # q of the other layer
    only_k.save_pretrained(tmp_path / "only_k")
    made = extract_adapter(base, tmp_path / "only_k", targets="attention.qv", **target)
    assert list(made.layers) == ["transformer.h.1.attn.c_attn"]
    unchanged, left = made.notices
    assert "1 targeted layers are the same" in unchanged
    assert f"'{name} outside the targeted rows' most" in left


@pytest.mark.parametrize("narrow_base", [False, True])
def test_rounding_of_a_merged_model_is_blamed_for_what_is_left_out(tmp_path, narrow_base):
    """Merged into bfloat16, every parameter differs from a float32 base, but only by rounding."""
    model = tiny_models.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(300)
    if narrow_base:
        model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    handle = lorakit.attach(model.to(torch.bfloat16), lorakit.LoRA(rank=3, targets="attention"))
    randomise(handle, scale=0.1)
    handle.merge(keep_base=False)
    model.save_pretrained(tmp_path / "tuned")
    base = BaseConfig(name=str(tmp_path / "base"))
    made = extract_adapter(base, tmp_path / "tuned", targets="attention", rank=3)
    assert made.error > 0.3
    notice, *others = made.notices
    assert f"leaves out {100 * made.error**2:.1f} % of the squared difference" in notice
    assert "rounded to bfloat16" in notice
    assert "lorakit merge ADAPTER OUTPUT --base.dtype float32" in notice
    assert "add targets" not in "".join(others)
    if not narrow_base:
        assert "other parameters differ only by rounding to bfloat16" in others[0]


def test_added_tokens_are_said(tmp_path):
    base, tuned = models(tmp_path)
    width, rows = tuned.config.hidden_size, tuned.config.vocab_size
    tuned.resize_token_embeddings(rows + 3)
    tuned.save_pretrained(tmp_path / "tuned")
    configuration, left = extract_adapter(base, tmp_path / "tuned", rank=3).notices
    assert f"vocab_size {rows} -> {rows + 3}" in configuration
    assert "1 other parameters differ in shape" in left  # the head is tied to it
    expected = f"'transformer.wte.weight' is {(rows, width)} in the base and {(rows + 3, width)} after tuning"
    assert expected in left


def test_a_head_that_is_tied_in_the_base_only(tmp_path):
    tokenizer = tiny_tokenizer()
    tied = tiny_models.build("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = tiny_models.build("llama", vocab_size=len(tokenizer))
    tuned.load_state_dict(tied.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight += 1
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    base = BaseConfig(name=str(tmp_path / "base"))
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=3)
    assert made.agreement is not None
    assert made.agreement.difference > 0.1
    _, left = made.notices
    assert "1 other parameters differ" in left
    assert "'lm_head.weight' most" in left

    made = extract_adapter(base, tmp_path / "tuned", targets=("attention.q", "head"), rank=3)
    assert made.layers.keys() == {"model.layers.0.self_attn.q_proj", "lm_head"}
    assert "other parameters" not in "".join(made.notices)
    assert made.agreement is not None
    assert made.agreement.difference < 0.01
    tuned.lm_head.weight = tuned.model.embed_tokens.weight
    tuned.save_pretrained(tmp_path / "tuned")  # without the head, and the configuration ties none
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=3)
    assert made.agreement is None
    assert "not compared: The checkpoint of " in made.notices[-1]
    assert "lacks 1 of the weights that LlamaForCausalLM needs" in made.notices[-1]
    tuned.config.tie_word_embeddings = True
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=3)
    assert made.agreement is not None
    assert len(made.notices) == 1


def test_a_tied_embedding_changes_the_head_too(tmp_path):
    """An adapter on the embedding does not act on the head, whose weight has changed as much."""
    tokenizer = tiny_tokenizer()
    model = tiny_models.build("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.model.embed_tokens.weight += randn(len(tokenizer), 1, seed=1) @ randn(
                1, 32, seed=2
            )
    paths = str(tmp_path / "base"), tmp_path / "tuned"
    made = extract_adapter(*paths, targets="embedding", rank=2)
    assert made.agreement is not None
    assert made.agreement.difference > 0.1
    (left,) = made.notices
    assert "1 other parameters differ but are not in the adapter, 'lm_head.weight' most" in left
    assert "holds 50.0 % of the squared difference" in left

    made = extract_adapter(*paths, targets=("embedding", "head"), rank=2)
    assert made.notices == []
    assert made.agreement is not None
    assert made.agreement.difference < 0.01


def test_a_tied_head_of_the_fine_tuned_model_is_its_embedding(tmp_path):
    base = tiny_models.build("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = tiny_models.build("llama", tie_word_embeddings=True)
    tuned.save_pretrained(tmp_path / "tuned")
    path = str(tmp_path / "base")
    made = extract_adapter(path, tmp_path / "tuned", targets="head", rank=32)
    change = (tuned.lm_head.weight - base.lm_head.weight).detach()
    torch.testing.assert_close(
        at_rest.delta(made.adapter.layers["lm_head"]), change.double(), rtol=0, atol=1e-4
    )


def test_what_an_adapter_cannot_hold_is_said_and_counts(tmp_path):
    tokenizer = tiny_tokenizer()
    base = tiny_models.build("llama", vocab_size=len(tokenizer))
    tuned = tiny_models.build("llama", vocab_size=len(tokenizer), num_hidden_layers=3)
    tuned.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
    tuned.config.hidden_act = "relu"
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    path = str(tmp_path / "base")
    made = extract_adapter(path, tmp_path / "tuned", targets="attention.q", rank=4)
    configuration, added, unchanged = made.notices
    assert 'hidden_act "silu" -> "relu"' in configuration
    assert "num_hidden_layers 2 -> 3" in configuration
    assert "The base and the adapter lack 9 weights of the fine-tuned model" in added
    assert "model.layers.2.self_attn.q_proj.weight" in added
    assert "1 targeted layers are the same" in unchanged
    load(base, made.adapter, name="extracted")
    as_saved = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    expected = agreement(*(logits_of_prompts(model, tokenizer) for model in (as_saved, base)))
    assert made.agreement is not None
    assert made.agreement.changed == expected.changed > 0
    assert made.agreement.difference == pytest.approx(expected.difference, rel=1e-3)

    made = extract_adapter(
        str(tmp_path / "tuned"), tmp_path / "base", targets=r".*0.*q_proj", rank=4
    )
    assert "9 weights of the base were not compared" in made.notices[1]


def classifier(tmp_path, num_labels: int):
    """Save a causal base, and a classifier that was trained from it; return the classifier."""
    tokenizer = tiny_tokenizer()
    base = tiny_models.build("llama", vocab_size=len(tokenizer))
    sizes = {"vocab_size": len(tokenizer), "num_labels": num_labels}
    tuned = tiny_models.build("llama", "sequence-classification", **sizes)
    tuned.config.pad_token_id = tokenizer.pad_token_id
    tuned.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tuned.eval()


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_new_head_is_copied(tmp_path, num_labels):
    tuned = classifier(tmp_path, num_labels)
    settings = {"targets": "attention.q", "train_modules": "score", "rank": 2}
    made = extract_adapter(str(tmp_path / "base"), tmp_path / "tuned", **settings)
    assert made.notices == ["1 targeted layers are the same in both models."]
    assert made.adapter.trained.keys() == {"score.weight"}
    assert torch.equal(made.adapter.trained["score.weight"], tuned.score.weight)
    assert made.agreement is not None
    assert made.agreement.predicts == ("label" if num_labels > 1 else "score")
    assert made.agreement.difference < 1e-3
    analysis.save(made, tmp_path / "adapter", inputs=[tmp_path / "tuned"], settings={})
    task = {"task": "regression"}
    if num_labels > 1:
        task = {"task": "sequence-classification", "num_labels": num_labels}
    loaded = lorakit.load_base(tmp_path / "base", dtype="float32", seed=5, **task)
    lorakit.load(loaded.model, tmp_path / "adapter", tokenizer=loaded.tokenizer)
    batch = loaded.tokenizer("The river pub serves food.", return_tensors="pt")
    with torch.no_grad():
        found, expected = loaded.model(**batch).logits, tuned(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_new_head_that_is_not_copied_is_named(tmp_path):
    classifier(tmp_path, 3)
    base = str(tmp_path / "base")
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=2)
    head, lacking, _, compared = made.notices
    assert "1 weights of the fine-tuned model: score.weight" in head
    assert "add score to train_modules" in head
    assert "1 weights of the base were not compared" in lacking
    assert "lm_head.weight" in lacking
    assert "not compared: The fine-tuned model has another head" in compared
    assert made.agreement is None
    assert made.adapter.base.class_name == "LlamaForCausalLM"


def test_all_parts_of_a_new_head_are_copied(tmp_path):
    for name, head in (("base", "masked-lm"), ("tuned", "sequence-classification")):
        tiny_models.build("deberta-v2", head, seed=len(name)).save_pretrained(tmp_path / name)
    both = str(tmp_path / "base"), tmp_path / "tuned"
    weights = {f"{m}.{n}" for m in ("classifier", "pooler.dense") for n in ("weight", "bias")}
    for modules in ("classifier", "pooler", "pooler.dense"):
        made = extract_adapter(*both, train_modules=modules, rank=2)
        assert made.adapter.trained.keys() == weights


@pytest.mark.parametrize(
    ("kind", "arch", "expected"),
    [
        ("safetensors", "llama", [0, 0]),
        ("other names", "mixtral", [0, 0]),  # of the experts, which are not targeted
        ("bin", "llama", [0, 1]),
        ("full", "llama", [0]),
    ],
)
def test_no_more_models_than_needed_are_in_memory(kind, arch, expected, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    base, tuned = models(tmp_path, arch, vocab_size=len(tokenizer), targets="attention")
    tokenizer.save_pretrained(tmp_path / "base")
    if kind == "bin":
        (tmp_path / "tuned" / "model.safetensors").unlink()
        torch.save(tuned.state_dict(), tmp_path / "tuned" / "pytorch_model.bin")
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        handle = lorakit.attach(model, lorakit.FullFineTuning(), name="full")
        randomise(handle, scale=0.01)
        handle.save(tmp_path / "full")
    opened, alive = [], []
    loading = base_weights.load_base

    def counted(*args, **settings):
        alive.append(sum(ref() is not None for ref in opened))
        loaded = loading(*args, **settings)
        # Weights can outlive their model.
        opened.append(weakref.ref(next(loaded.model.parameters())))
        return loaded

    monkeypatch.setattr(base_weights, "load_base", counted)
    folder = tmp_path / ("full" if kind == "full" else "tuned")
    made = extract_adapter(base, folder, targets="attention", rank=3)
    assert made.agreement is not None
    assert made.agreement.difference < 0.01 or kind == "full"
    assert alive == expected
    experts = "6 weights of the base were not compared" if arch == "mixtral" else ""
    assert experts in "".join(made.notices)


def test_a_fine_tuned_model_without_logits_or_with_fewer_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    base, _ = models(tmp_path, "llama", vocab_size=size)
    tokenizer.save_pretrained(tmp_path / "base")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    smaller.model.save_pretrained(tmp_path / "headless")
    smaller.resize_token_embeddings(size // 2)
    smaller.save_pretrained(tmp_path / "smaller")
    for name in ("headless", "smaller"):
        made = extract_adapter(base, tmp_path / name, rank=3)
        assert made.error < 1e-4
        assert made.agreement is None
        assert "not compared: The fine-tuned model has another head or voc" in made.notices[-1]


def test_a_head_that_is_not_read_is_said(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_models.build("roberta", "masked-lm", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = RobertaForTokenClassification(model.config)
    tuned.roberta.load_state_dict(model.roberta.state_dict())
    with torch.no_grad():
        tuned.roberta.encoder.layer[0].attention.self.query.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    base = str(tmp_path / "base")
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=2)
    head, *others = made.notices
    assert "is a RobertaForTokenClassification, which is read without" in head
    assert "The base and the adapter lack" not in "".join(others)
    assert made.agreement is None


@pytest.mark.parametrize("tuned_has_it", [False, True])
def test_encoders_without_a_pooler(tuned_has_it, tmp_path):
    """`load_base` creates a random one, which is no weight of the model."""
    model = tiny_models.build("bert", "base")
    for name in ("base", "tuned"):
        state = model.state_dict()
        if name == "base" or not tuned_has_it:
            state = {key: tensor for key, tensor in state.items() if "pooler" not in key}
        model.save_pretrained(tmp_path / name, state_dict=state)
        with torch.no_grad():
            model.encoder.layer[0].attention.self.query.weight += 0.1
    both = str(tmp_path / "base"), tmp_path / "tuned"
    made = extract_adapter(*both, targets="attention.q", rank=2)
    assert made.adapter.trained == {}
    assert "were not compared" not in "".join(made.notices)
    if not tuned_has_it:
        with pytest.raises(BaseModelError, match=r"has no weight 'pooler.dense"):
            extract_adapter(*both, targets="attention.q", train_modules="pooler.dense", rank=2)


def test_a_fine_tuned_model_with_a_random_head_is_not_compared(tmp_path):
    classifier(tmp_path, 3)
    classifier(tmp_path / "other", 3)
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if k != "score.weight"}, file, {"format": "pt"})
    base = str(tmp_path / "other" / "tuned")
    with torch.no_grad():
        tensors["model.layers.1.self_attn.q_proj.weight"] += 0.1
    save_file({k: t for k, t in tensors.items() if k != "score.weight"}, file, {"format": "pt"})
    made = extract_adapter(base, tmp_path / "tuned", targets="attention.q", rank=2)
    assert made.agreement is None
    assert "(score.weight), so its predictions are random" in made.notices[-1]


def test_a_fine_tuned_model_that_cannot_run_costs_no_adapter(tmp_path):
    tokenizer = tiny_tokenizer()
    base, tuned = models(tmp_path, "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.norm.weight[0] = torch.nan  # not targeted
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(base, tmp_path / "tuned", rank=3)
    assert made.error < 1e-4
    assert made.agreement is None
    assert "not compared: The model's output is NaN: the weight 'model.norm" in made.notices[-1]


@pytest.mark.parametrize("damaged", ["base", "tuned"])
def test_a_targeted_weight_that_is_infinite(tmp_path, damaged):
    base, _ = models(tmp_path, "llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / damaged)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    model.save_pretrained(tmp_path / damaged)
    with pytest.raises(BaseModelError, match=rf"'{name}' of '.*{damaged}' holds NaN or infinity"):
        extract_adapter(base, tmp_path / "tuned", rank=2)


def test_the_tokenizer_of_the_fine_tuned_model(tmp_path):
    tokenizer = tiny_tokenizer()
    models(tmp_path, "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tuned")
    both = str(tmp_path / "base"), tmp_path / "tuned"
    made = extract_adapter(*both, rank=3)
    assert made.notices == []
    analysis.save(made, tmp_path / "adapter", inputs=[tmp_path / "tuned"], settings={})
    own = AdapterFile.read(tmp_path / "adapter")
    assert own is not None
    assert own.tokenizer.chat_template == tokenizer.chat_template
    assert own.stored.base.tokenizer == tokenizer_digest(own.tokenizer)

    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(*both, rank=3)
    assert made.tokenizer is None
    sizes = f"{len(tokenizer)} tokens, and the base has {len(tokenizer) - 1} embeddings"
    assert f"no tokenizer of its own: The tokenizer in tuned has {sizes}" in made.notices[0]
    # The tokenizer of Gemma 3 1B has a token without an embedding, also in the base.
    tokenizer.save_pretrained(tmp_path / "base")
    assert extract_adapter(*both, rank=3).tokenizer is not None


@pytest.mark.parametrize("record", [{}, {"task": "classification", "labels": ["a", "b", "c"]}])
def test_full_fine_tuning_of_a_classifier(record, tmp_path):
    """The causal base has no such head. `handle.save` alone records no task."""
    classifier(tmp_path, 3)
    base = {"task": "sequence-classification", "num_labels": 3, "dtype": "float32"}
    loaded = lorakit.load_base(tmp_path / "base", **base)
    handle = lorakit.attach(loaded.model, lorakit.FullFineTuning(), name="full")
    randomise(handle, scale=0.01)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_labels": 2}))
    handle.save(tmp_path / "full", tokenizer=loaded.tokenizer, provenance=record)
    made = extract_adapter(str(tmp_path / "base"), tmp_path / "full", rank=32)
    trained = handle.stored().trained
    assert torch.equal(made.adapter.trained["score.weight"], trained["score.weight"])
    assert made.agreement is not None
    assert made.agreement.predicts == "label"
    assert made.error < 1e-3


def test_full_fine_tuning_of_lorakit_s(tmp_path):
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    handle = lorakit.attach(model, lorakit.FullFineTuning(), name="full")
    randomise(handle, scale=0.01)
    handle.save(tmp_path / "full")
    base = BaseConfig(name=str(tmp_path / "base"))
    made = extract_adapter(base, tmp_path / "full", rank=32)
    path = "model.layers.0.self_attn.q_proj"
    original = tiny_models.build("llama").get_parameter(f"{path}.weight").detach()
    change = handle.stored().trained[f"{path}.weight"] - original
    layer = made.adapter.layers[path]
    torch.testing.assert_close(layer.scaling * layer.B @ layer.A, change, rtol=0, atol=1e-6)
    assert "started from this base cannot be checked" in made.notices[0]


def test_full_fine_tuning_of_another_base(tmp_path):
    model = tiny_models.build("llama")
    handle = lorakit.attach(model, lorakit.FullFineTuning(top_layers=1), name="part")
    randomise(handle)
    handle.save(tmp_path / "part")
    tiny_models.build("llama", seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError):
        extract_adapter(BaseConfig(name=str(tmp_path / "other")), tmp_path / "part", rank=2)


def test_models_that_do_not_go_together(tmp_path):
    base, _ = models(tmp_path)
    with pytest.raises(AdapterFileError, match="nothing to extract"):
        extract_adapter(base, tmp_path / "base", rank=2)
    tiny_models.build("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(BaseModelError, match="one architecture"):
        extract_adapter(base, tmp_path / "llama", rank=2)
    tiny_models.build("gpt2", n_embd=64).save_pretrained(tmp_path / "large")
    with pytest.raises(BaseModelError, match="different sizes"):
        extract_adapter(base, tmp_path / "large", rank=2)
    made = extract_adapter(base, tmp_path / "tuned", rank=2)
    model = tiny_models.build("gpt2")
    load(model, made.adapter, name="a").save(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="an adapter already"):
        extract_adapter(base, tmp_path / "adapter", rank=2)
    with pytest.raises(ConfigurationError, match="neither"):
        extract_adapter(base, tmp_path / "tuned")


def test_leading_vectors_of_a_weight_that_is_zero():
    """The matrix is wide enough for Lanczos, which cannot start on zeros."""
    U, S, Vh = leading_svd(torch.zeros(600, 530), 4)
    assert not S.any()
    torch.testing.assert_close(U.T @ U, torch.eye(4))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4))
