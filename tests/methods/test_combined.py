"""Several methods as one adapter, compared with each method alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from method_cases import seen
from random_adapters import randomise

from lorakit import (
    BitFit,
    BottleneckAdapter,
    Combined,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
    attach,
    count_parameters,
)
from lorakit.errors import ConfigurationError
from lorakit.methods.method import with_head

THIN, PREFIX = LoRA(rank=2, targets="all-linear"), PrefixLayer(prefix_length=2, infix_length=1)


def test_it_is_the_sum_of_its_parts() -> None:
    model = tiny_models.build("llama")
    both = Combined(methods=(THIN, PREFIX))
    counts = [count_parameters(model, method).trainable for method in (THIN, PREFIX, both)]
    assert counts[0] + counts[1] == counts[2]

    adapters = attach(model, both, seed=1)
    randomise(adapters)
    ids = torch.tensor([both.virtual_tokens.place([5, 9, 33], keep=1)])
    actual = seen(model, {"input_ids": ids})
    # The same numbers with LoRA merged into the base and the prefix alone on top of it.
    merged = tiny_models.build("llama")
    thin = attach(merged, THIN)
    prefix = {}
    with torch.no_grad():
        for path, module in adapters.modules().items():
            if path in thin.modules():
                thin.modules()[path].load_state_dict(module.state_dict())
            else:
                prefix[path] = module
    thin.merge(keep_base=False)
    alone = attach(merged, PREFIX)
    for path, module in alone.modules().items():
        module.load_state_dict(prefix[path].state_dict())
    torch.testing.assert_close(actual, seen(merged, {"input_ids": ids}), atol=1e-3, rtol=1e-3)


def test_what_can_be_merged_is_merged() -> None:
    model = tiny_models.build("gpt2")
    adapters = attach(model, Combined(methods=(THIN, BitFit())))
    randomise(adapters)
    batch = tiny_models.example_batch("gpt2", model)
    acting = seen(model, batch)
    adapters.merge()
    rounding = 3e-5 * float(acting.abs().max())
    torch.testing.assert_close(seen(model, batch), acting, atol=rounding, rtol=0)
    adapters.unmerge()
    assert torch.equal(seen(model, batch), acting)


def test_a_new_head_is_trained_beside_all_of_them() -> None:
    model = tiny_models.build("bert", head="sequence-classification")
    new = ("classifier.weight", "classifier.bias")
    method = with_head(Combined(methods=(LoRA(), PREFIX)), model, ["classifier"], new)
    assert method == Combined(methods=(LoRA(), PREFIX), train_modules="classifier")
    chosen = Combined(methods=(LoRA(train_modules="classifier"), PREFIX))
    assert with_head(chosen, model, ["classifier"], new) is chosen


def test_a_new_head_is_trained_beside_modules_that_the_user_names() -> None:
    model = tiny_models.build("bert", head="sequence-classification")
    norms = LoRA(train_modules="output.LayerNorm")
    method = with_head(norms, model, ["classifier"], ("classifier.weight", "classifier.bias"))
    assert method == LoRA(train_modules=("output.LayerNorm", "classifier"))
    pooler = ("bert.pooler.dense.bias", "bert.pooler.dense.weight")  # outside the head
    method = with_head(LoRA(), model, ["classifier"], pooler)
    assert method == LoRA(train_modules=("classifier", "bert.pooler.dense"))
    # A head of the checkpoint stays frozen, as the user chose.
    assert with_head(norms, model, ["classifier"]) is norms


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((LoRA(),), "give it two or more"),
        ((LoRA(), LoRA(rank=4)), "LoRA twice"),
        ((LoRA(), Combined(methods=(BitFit(), PREFIX))), "another Combined"),
        ((PrefixEmbedding(), PREFIX), "PrefixEmbedding and PrefixLayer both give vectors"),
        ((LoRA(), "bitfit"), "methods"),
    ],
)
def test_what_does_not_go_together_is_refused(methods, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Combined(methods=methods)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((LoRA(targets="embedding"), PREFIX), "LoRA and PrefixLayer both adapt"),
        ((BottleneckAdapter(kind="lin", size=4), PREFIX), "BottleneckAdapter and PrefixLayer both"),
        ((LoRA(), FullFineTuning(top_layers=1)), "trained in full, and LoRA adapts it as well"),
    ],
)
def test_what_meets_on_a_layer_is_refused(methods, message: str) -> None:
    model = tiny_models.build("llama")
    before = list(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        attach(model, Combined(methods=methods))
    assert list(model.state_dict()) == before
