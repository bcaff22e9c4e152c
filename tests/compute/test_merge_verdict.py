"""The verdict on a merge: what rounding leaves of the update, and which predictions change."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

import lorakit
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.loading import load
from lorakit.compute.agreement import PROMPTS
from lorakit.compute.merge_verdict import MergeVerdict, judge_merge
from lorakit.errors import BaseModelError
from lorakit.formatting import percentage
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource


def adapted(method, *, dtype=torch.bfloat16, scale=0.1, arch="llama", head=None, **settings):
    """Return a base with an active random adapter, its handle and its file."""
    tokenizer = tiny_encoder_tokenizer() if arch == "bert" else tiny_tokenizer()
    model = tiny_models.build(arch, head, vocab_size=len(tokenizer), **settings).to(dtype)
    handle = lorakit.attach(model, method, name="a")
    randomise(handle, scale=scale)
    source = ModelSource(name="base", path_or_id="base", kind="folder")
    return Base(model, tokenizer, source), handle, handle.stored()


def verdict_of(base, handle, stored):
    def merge():
        handle.merge(keep_base=False)
        return base.model

    return judge_merge(base, stored, merge)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scale", [0.003, 0.03])
def test_the_share_of_the_update_that_survives_rounding(dora: bool, scale: float) -> None:
    base, handle, stored = adapted(
        lorakit.LoRA(rank=2, targets="attention", dora=dora), scale=scale
    )
    update = lost = 0.0
    before = {name: p.detach().double() for name, p in base.model.named_parameters()}
    wide = tiny_models.build("llama", vocab_size=len(base.tokenizer))  # the same base in float32
    wide.load_state_dict({n: before[n].float() for n, _ in wide.named_parameters()}, strict=False)
    load(wide, stored, name="a").merge(keep_base=False)
    verdict = verdict_of(base, handle, stored)
    for name, merged in base.model.named_parameters():
        exact = wide.get_parameter(name).detach().double()
        update += float((exact - before[name]).square().sum())
        lost += float((merged.detach().double() - exact).square().sum())
    assert verdict.kept == pytest.approx(max(0.0, 1 - lost / update), abs=1e-3)
    assert f"{percentage(verdict.kept, 1)} of the adapter's weight update" in " ".join(
        verdict.sentences()
    )
    assert verdict.sentences()[-1].endswith("add --base.dtype float32.") == (
        bool(verdict.changed) or verdict.kept < 0.99
    )


def test_a_merge_in_float32_keeps_everything() -> None:
    verdict = verdict_of(*adapted(lorakit.LoRA(rank=2), dtype=torch.float32, scale=0.3))
    assert (verdict.changed, verdict.kept) == (0, 1.0)
    assert "float32: add" not in " ".join(verdict.sentences())


def test_a_lost_update_changes_the_predictions() -> None:
    """The update is far below the spacing of the weights, but acts on large activations."""
    base, handle, stored = adapted(lorakit.LoRA(rank=2, targets="all-linear"), scale=0.3)
    with torch.no_grad():
        for path in stored.layers:
            weight = base.model.get_submodule(path).weight
            weight.copy_(1024.0 * torch.randn_like(weight).sign())
    verdict = verdict_of(base, handle, stored)
    assert verdict.kept < 0.5
    assert verdict.changed > 0
    tokens = sum(min(64, len(base.tokenizer(prompt)["input_ids"])) for prompt in PROMPTS)
    assert verdict.predictions == tokens
    first, *_, last = verdict.sentences()
    assert first.startswith(
        f"The merge changes the most likely token in {verdict.changed} of {tokens} predictions"
    )
    assert "--base.dtype float32" in last


def test_parameters_trained_in_full_are_compared_with_the_file() -> None:
    """They are rounded when the adapter is loaded, before the merge."""
    base, handle, stored = adapted(lorakit.BitFit(), arch="gpt2", scale=0.0)
    with torch.no_grad():
        for name, parameter in base_parameters(base.model):
            if name in stored.trained:
                parameter.fill_(1)
                stored.trained[name] = torch.full_like(parameter, 1.001, dtype=torch.float32)
    assert verdict_of(base, handle, stored).kept == pytest.approx(0, abs=1e-6)


def test_a_new_head_does_not_hide_what_the_other_parameters_lose() -> None:
    method = lorakit.BitFit(train_modules="classifier")
    base, handle, stored = adapted(method, arch="bert", head="sequence-classification", scale=0.0)
    base.new_weights.extend(["classifier.weight", "classifier.bias"])
    with torch.no_grad():
        for name, parameter in base_parameters(base.model):
            if name in stored.trained:
                parameter.fill_(1)
                trained = 100.0 if name in base.new_weights else 1.001
                stored.trained[name] = torch.full_like(parameter, trained, dtype=torch.float32)
    assert stored.trained.keys() > set(base.new_weights)
    assert verdict_of(base, handle, stored).kept == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("labels", "predicts"), [(3, "label"), (1, "score")])
def test_a_classifier_has_one_prediction_per_prompt(labels: int, predicts: str) -> None:
    found = verdict_of(
        *adapted(
            lorakit.LoRA(rank=2), arch="bert", head="sequence-classification", num_labels=labels
        )
    )
    assert (found.predicts, found.predictions) == (predicts, len(PROMPTS))


def test_a_base_of_nan_is_named() -> None:
    base, handle, stored = adapted(lorakit.LoRA(rank=2))
    with torch.no_grad():
        base.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(BaseModelError, match=r"NaN: the weight 'lm_head\.weight'"):
        verdict_of(base, handle, stored)


def test_a_verdict_in_words() -> None:
    verdict = MergeVerdict(
        predicts="token",
        predictions=96,
        changed=12,
        kept=0.41,
        dtype=torch.bfloat16,
        difference=1.0,
        scale=31.5,
    )
    assert verdict.sentences() == [
        "The merge changes the most likely token in 12 of 96 predictions on 8 prompts (12.5 %).",
        "Largest difference from the unmerged logits: 1; largest logit: 31.5.",
        "41.0 % of the adapter's weight update survives rounding to bfloat16.",
        "To keep the whole update, merge in float32: add --base.dtype float32.",
    ]
