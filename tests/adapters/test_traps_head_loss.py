"""A chunked loss reads the head's weight, so everything else that changes the logits must be detected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from random_adapters import randomise
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters import attach
from lorakit.compute.objective import confirm_loss_path
from lorakit.data.batches import IGNORED
from lorakit.errors import AdapterStateError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

CASES: dict[str, tuple[str, dict, Method]] = {
    "adapter on the head": ("llama", {}, LoRA(rank=2, alpha=3, targets="head")),
    "dora on the head": ("llama", {}, LoRA(rank=2, targets="head", dora=True)),
    "head in full": ("llama", {}, LoRA(rank=2, train_modules="lm_head")),
    "bias of the head": ("phi", {}, LoRA(rank=2, bias="all")),
    "tied table": ("gpt2", {}, LoRA(rank=2, alpha=3, targets="embedding")),
    "tied table and head": ("gpt2", {}, LoRA(rank=2, alpha=3, targets="embedding", tie_head=True)),
    "tied table in full": ("gpt2", {}, LoRA(rank=2, train_modules="wte")),
    "full": ("llama", {}, FullFineTuning()),
    "capped": ("gemma2", {"final_logit_softcapping": 1.5}, LoRA(rank=2, targets="mlp")),
    "capped, adapted": ("gemma2", {"final_logit_softcapping": 1.5}, LoRA(rank=2, targets="head")),
    "divided": ("granite", {"logits_scaling": 3.0}, LoRA(rank=2, targets="mlp")),
    "divided, adapted": ("granite", {"logits_scaling": 3.0}, LoRA(rank=2, targets="head")),
    "multiplied": ("Cohere", {"logit_scale": 0.25}, LoRA(rank=2, targets="attention")),
    "blocks alone": ("llama", {}, LoRA(rank=2, targets="all-linear")),
}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(
        3, tiny_models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0)
    )
    labels = ids.clone()
    labels[0, :4] = labels[1, :6] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def whole(model: PreTrainedModel, examples: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=examples["input_ids"]).logits[:, :-1].float()
    labels = examples["labels"][:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chosen", ["fresh", "trained"], ids=["at the start", "once trained"])
def test_loss_and_gradients_are_the_models_own(case: str, chosen: str) -> None:
    """A loss chosen while the new adapter still adds zero must be correct after training."""
    arch, settings, method = CASES[case]
    model = tiny_models.build(arch, "causal-lm", **settings)
    examples = batch()
    base = whole(model, examples).item()
    adapters = attach(model, method)
    if chosen == "fresh":
        objective = confirm_loss_path(model, examples)
        randomise(adapters)
    else:
        randomise(adapters)
        objective = confirm_loss_path(model, examples)
    expected = whole(model, examples)
    assert abs(expected.item() - base) > 1e-2
    actual = objective.loss_sum(model, examples)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)

    parameters = adapters.trainable_parameters()
    expected_gradients = torch.autograd.grad(expected, parameters, materialize_grads=True)
    gradients = torch.autograd.grad(actual, parameters, materialize_grads=True)
    assert max(gradient.abs().max() for gradient in expected_gradients) > 1e-4
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-4, rtol=1e-4)


CHANGES: dict[str, Callable] = {
    "another adapter on the head": lambda adapters: attach(
        adapters.model, LoRA(rank=2, alpha=3, targets="head"), name="head"
    ),
    "the head in full": lambda adapters: attach(
        adapters.model, LoRA(rank=2, train_modules="lm_head"), name="head"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_way_that_was_chosen_earlier_is_not_taken_on_trust(change: str) -> None:
    """The head is adapted after the objective was chosen: the loss is correct, or an error is raised."""
    model = tiny_models.build("llama")
    examples = batch()
    adapters = attach(model, LoRA(rank=2, targets="mlp"))
    objective = confirm_loss_path(model, examples)
    CHANGES[change](adapters)
    randomise(adapters)
    torch.testing.assert_close(objective.loss_sum(model, examples), whole(model, examples))


@pytest.mark.slow  # the import of TRL
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_never_ignores_an_adapter_on_the_head() -> None:
    """Its loss is the model's own, or an error is raised."""
    pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.arange(3, 17).view(2, 7)
    for targets in ("all-linear", "head"):
        model = tiny_models.build("llama")
        adapters = attach(model, LoRA(rank=2, targets=targets))
        randomise(adapters)
        add_fused_lm_head(model)
        expected = model(ids, labels=ids).loss
        if targets == "head":
            with pytest.raises(AdapterStateError, match="Leave the head out of the targets"):
                model(ids, labels=ids, fused_lm_head=True)
            adapters.merge()
        actual = model(ids, labels=ids, fused_lm_head=True).loss
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
