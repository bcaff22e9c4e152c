"""Inputs that the handle rejects: the error names the fix, and the model does not change."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from failing_calls import fail_at
from random_adapters import randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach, handle_of, load
from lorakit.adapters import handle as handle_module
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.errors import (
    AdapterFileError,
    AdapterStateError,
    ConfigurationError,
    LorakitError,
    RunFolderError,
    TargetError,
    WrongBaseError,
)
from lorakit.methods import BitFit
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_models.build("llama")


@pytest.fixture
def adapters(model: PreTrainedModel) -> Adapters:
    """Two adapters, the first active."""
    adapters = attach(model, LoRA(rank=2), name="sql")
    attach(model, LoRA(rank=2, targets="mlp"), name="e2e")
    randomise(adapters)
    adapters.activate("sql")
    return adapters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", LoRA()), r"model is 'chat'; .*load_base\('chat'\)\.model"),
        (({}, LoRA()), r"model is \{\}; it must be a PyTorch module\.$"),
        (
            (SimpleNamespace(model=nn.Linear(2, 2)), LoRA()),
            r"Pass the model that the SimpleNamespace has",
        ),
        ((nn.Linear(2, 2), "lora"), r"method is 'lora'; .* for example LoRA\(rank=8\)"),
        ((nn.Linear(2, 2), LoRA), r"method is <class .*; it must be a method with its settings"),
    ],
    ids=["name", "dict", "wrapper", "method's name", "method's class"],
)
def test_arguments_of_another_type(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attach(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, r"dtype is 'float32'; it must be one of torch\.float32, "),
        ({"dtype": torch.int32}, r"dtype is torch\.int32; it must be one of"),
    ],
)
def test_settings_of_another_type(model: PreTrainedModel, settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attach(model, LoRA(), **settings)
    assert handle_of(model) is None


def test_a_seed_may_be_a_whole_number_of_numpy() -> None:
    drawn = [
        attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2, targets="0"), seed=seed)
        for seed in (3, np.int64(3))
    ]
    first, second = (handle.trainable_parameters() for handle in drawn)
    assert all(map(torch.equal, first, second))


def test_combined_needs_methods_with_their_settings() -> None:
    with pytest.raises(ConfigurationError, match="must be a method with its settings"):
        Combined(methods=(LoRA, BitFit()))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTuning()], ids=["lora", "full"])
def test_adapters_made_in_inference_mode_can_be_trained(
    model: PreTrainedModel, method: Method, tmp_path: Path
) -> None:
    with torch.inference_mode():
        adapters = attach(model, method, name="new")
        adapters.save(tmp_path / "saved", "new")
        load(model, tmp_path / "saved", name="loaded", trainable=True)
    for name in ("new", "loaded"):
        adapters.activate(name)
        model(IDS, labels=IDS).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()


def test_an_adapter_without_numbers_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        adapters = attach(tiny_models.build("llama"), LoRA(rank=2))
    adapters.model.to("meta")
    with pytest.raises(AdapterStateError, match="on the meta device, without numbers to save"):
        adapters.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


REPLACED = (
    r"layer 'model\.layers\.0\.self_attn\.q_proj' was replaced after the adapter 'sql' was attached"
)


@pytest.mark.parametrize(
    "action",
    [
        lambda adapters, folder: adapters.activate({"sql": 1.0}),
        lambda adapters, folder: adapters.merge("sql"),
        lambda adapters, folder: adapters.merge(),
        lambda adapters, folder: adapters.save(folder / "saved", "sql"),
        lambda adapters, folder: adapters.stored("sql"),
    ],
    ids=["activate", "merge by name", "merge", "save", "stored"],
)
def test_a_replaced_layer_is_named(adapters: Adapters, model, tmp_path: Path, action) -> None:
    attention = model.model.layers[0].self_attn
    original = attention.q_proj
    attention.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(AdapterStateError, match=REPLACED):
        action(adapters, tmp_path)
    assert not list(tmp_path.iterdir())
    assert adapters.active == {"sql": 1.0}
    adapters.activate("e2e")  # has all its layers
    attention.q_proj = original
    action(adapters, tmp_path)


def test_a_replaced_block_is_named_by_its_first_layer(adapters: Adapters, model) -> None:
    model.model.layers[0] = nn.Identity()
    with pytest.raises(AdapterStateError, match=r"q_proj' \(and 1 more\) was replaced"):
        adapters.activate("sql")


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTuning()], ids=["lora", "full"])
@pytest.mark.parametrize("merged", [False, True])
def test_detach_reports_a_replaced_layer_and_restores_the_others(
    model, caplog, method, merged: bool
) -> None:
    before = trace(model)
    adapters = attach(model, method, name="sql")
    randomise(adapters)
    if merged:
        adapters.merge()
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(32, 32, bias=False)
    adapters.detach()
    assert any(re.search(REPLACED, record.getMessage()) for record in caplog.records)
    assert handle_of(model) is None
    plain = tiny_models.build("llama")
    attention.q_proj = plain.model.layers[0].self_attn.q_proj
    assert trace(model)[0] == before[0]
    assert torch.equal(logits(model), logits(plain))


def test_removing_an_adapter_reports_a_replaced_layer(adapters: Adapters, model, caplog) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    adapters.remove("sql")
    assert any(re.search(REPLACED, record.getMessage()) for record in caplog.records)
    assert adapters.names == ("e2e",)


def test_a_wrapped_or_copied_layer_is_not_a_replaced_one(adapters: Adapters, model) -> None:
    expected = logits(model)
    copied = copy.deepcopy(model)
    handle_of(copied).activate("sql")
    torch.testing.assert_close(logits(copied), expected)
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    adapters.activate("sql")
    adapters.merge("sql")
    torch.testing.assert_close(logits(model), expected)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def trace(model: nn.Module) -> tuple:
    """Everything on a model that attach, load or merge may change."""
    modules = dict(model.named_modules())
    return (
        {name: type(module) for name, module in modules.items()},
        {name: (t.clone(), t.dtype) for name, t in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {
            name: (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            for name, module in modules.items()
        },
        {name: set(vars(module)) for name, module in modules.items()},
        list(model._load_state_dict_pre_hooks),
        vars(handle_of(model))["_activation"].active if handle_of(model) else None,
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    types, tensors, *rest = trace(model)
    assert types == before[0]
    assert list(tensors) == list(before[1])
    assert all(
        torch.equal(tensors[n][0], t) and tensors[n][1] == d for n, (t, d) in before[1].items()
    )
    assert rest == list(before[2:])


# --- attach ---------------------------------------------------------------------------------------

REFUSED = {
    "no such target": (LoRA(rank=2, targets=("attention.q", "q_prj")), TargetError, "q_proj"),
    "a target that cannot be": (LoRA(rank=2, targets="input_layernorm"), TargetError, "RMSNorm"),
    "no such role": (LoRA(rank=2, targets="attention.x"), TargetError, "attention"),
    "rank too high": (
        LoRA(rank=17, targets=("q_proj", "k_proj")),
        ConfigurationError,
        "rank_pattern",
    ),
    "no such module": (LoRA(rank=2, train_modules="lm_hed"), TargetError, "lm_head"),
    "trained and adapted": (LoRA(rank=2, train_modules="self_attn"), TargetError, "in full"),
    "pattern that matches nothing": (
        LoRA(rank=2, rank_pattern={"k_proj": 4}),
        ConfigurationError,
        "rank_pattern",
    ),
    "too many blocks": (FullFineTuning(top_layers=3), TargetError, "2 blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("first", [True, False], ids=["bare model", "adapted model"])
def test_refused_attach_leaves_nothing(case: str, first: bool, model: PreTrainedModel) -> None:
    method, error, message = REFUSED[case]
    model.lm_head.requires_grad_(False)  # this flag must be restored too
    if not first:
        randomise(attach(model, LoRA(rank=2, targets="mlp", train_modules="lm_head")))
    before, expected = trace(model), logits(model)
    with pytest.raises(error, match=message):
        attach(model, method, name="other")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_attach_that_fails_while_it_installs() -> None:
    """The second layer has an attribute named `adapters`: the first must not keep its adapter."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.adapters = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = Model()
    before = trace(model)
    with pytest.raises(TypeError):
        attach(model, LoRA(rank=1, targets=("one", "two")))
    assert_unchanged(model, before)


@pytest.mark.parametrize("first", [True, False], ids=["bare model", "adapted model"])
def test_attach_that_is_interrupted_while_it_installs(
    model: PreTrainedModel, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not first:
        randomise(attach(model, LoRA(rank=2, targets="mlp")))
    before, expected = trace(model), logits(model)
    add, calls = handle_module.add_module, iter(range(3))

    def interrupted(*arguments: Any) -> None:
        add(*arguments)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(handle_module, "add_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(model, LoRA(rank=2, targets="all-linear", train_modules="lm_head"), name="other")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    attach(model, LoRA(rank=2), name="other")


def test_a_part_and_the_whole_cannot_both_be_adapted(model: PreTrainedModel) -> None:
    """With two handles on one layer, neither would know all its adapters."""
    adapters = attach(model.model, LoRA(rank=2), name="part")
    randomise(adapters)
    expected = logits(model)
    with pytest.raises(AdapterStateError, match="part"):
        attach(model, LoRA(rank=2), name="whole")
    assert torch.equal(logits(model), expected)
    assert not any(".whole." in name for name in model.state_dict())
    adapters.detach()
    attach(model, LoRA(rank=2), name="whole")
    with pytest.raises(AdapterStateError):
        attach(model.model, LoRA(rank=2), name="part")
    assert not any(".part." in name for name in model.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.b",
        "a b",
        ".a",
        "-a",
        "ä",
        "a/b",
        "../a",
        "items",
        "keys",
        "forward",
        "weight\n",
        "train",
        3,
        None,
    ],
)
def test_names_that_cannot_be(name: str, model: PreTrainedModel) -> None:
    before = trace(model)
    with pytest.raises(ConfigurationError, match="name"):
        attach(model, LoRA(rank=2), name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["a", "A-1_b", "7", "0-shot", "default", "lora_A", "weight"])
def test_names_that_can_be(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    base = logits(model)
    adapters = attach(model, LoRA(rank=2), name=name)
    randomise(adapters)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-2
    adapters.merge()
    adapters.unmerge()
    adapters.save(tmp_path / "saved")
    adapters.detach()
    load(model, tmp_path / "saved", name=name)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_name_that_is_taken(adapters: Adapters, model: PreTrainedModel, seed: int) -> None:
    before = trace(model)
    with pytest.raises(AdapterStateError, match=r"'sql'.*remove\('sql'\)"):
        attach(model, LoRA(rank=4, targets="mlp"), name="sql", seed=seed)
    assert_unchanged(model, before)


# --- activating -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        "sqll",
        {"sql": 1.0, "e2f": 1.0},
        ["sql", "e2e"],
        5,
        {"sql": "1"},
        {"sql": True},
        {"sql": None},
    ],
    ids=str,
)
def test_choices_that_cannot_be(choice: object, adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with pytest.raises(AdapterStateError):
        adapters.activate(choice)  # type: ignore[arg-type]
    with pytest.raises(AdapterStateError):
        adapters.merge(choice)  # type: ignore[arg-type]
    assert_unchanged(model, before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_finite_number(weight: float, adapters: Adapters) -> None:
    with pytest.raises(AdapterStateError, match="sql"):
        adapters.activate({"sql": weight})
    assert adapters.active == {"sql": 1.0}


def test_an_unknown_name_is_answered_with_the_known(adapters: Adapters) -> None:
    for call in (
        adapters.activate,
        adapters.summary,
        adapters.remove,
        adapters.stored,
        adapters.method,
    ):
        with pytest.raises(AdapterStateError, match=r"sqll.*sql, e2e.*Did you mean 'sql'"):
            call("sqll")


def test_a_name_is_needed_where_there_are_several(adapters: Adapters, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="sql, e2e"):
        adapters.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(AdapterStateError, match="sql, e2e"):
        adapters.summary()


@pytest.mark.parametrize("rows", ["sql", ["sql", "sqll"], ["sql", 5], 5, None], ids=str)
def test_rows_that_cannot_be(rows: object, adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with (
        pytest.raises(AdapterStateError),
        adapters.per_sample(rows),  # type: ignore[arg-type]
    ):
        raise AssertionError("the block must not be entered")
    assert_unchanged(model, before)


def test_an_error_inside_per_sample_puts_the_choice_back(
    adapters: Adapters, model: PreTrainedModel
) -> None:
    expected = logits(model)
    with pytest.raises(ZeroDivisionError), adapters.per_sample(["e2e", None]):
        raise ZeroDivisionError
    assert adapters.active == {"sql": 1.0}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda adapters: adapters.activate("e2e"),
        lambda adapters: adapters.merge("e2e"),
        lambda adapters: adapters.detach(),
        lambda adapters: adapters.remove("sql"),
        lambda adapters: attach(adapters.model, LoRA(rank=2), name="third"),
    ],
    ids=["activate", "merge", "detach", "remove", "attach"],
)
def test_inside_per_sample(call, adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with adapters.per_sample(["e2e", None]):
        inside = trace(model)
        with pytest.raises(AdapterStateError, match="per_sample"):
            call(adapters)
        assert_unchanged(model, inside)
    assert_unchanged(model, before)


# --- merging --------------------------------------------------------------------------------------


def test_nothing_to_merge(adapters: Adapters, model: PreTrainedModel) -> None:
    adapters.activate(None)
    before = trace(model)
    with pytest.raises(AdapterStateError, match="sql, e2e"):
        adapters.merge()
    with pytest.raises(AdapterStateError, match="unmerge"):
        adapters.unmerge()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda adapters: adapters.activate("e2e"),
        lambda adapters: adapters.activate(None),
        lambda adapters: adapters.merge("e2e"),
        lambda adapters: adapters.merge(),
        lambda adapters: adapters.remove("e2e"),
        lambda adapters: attach(adapters.model, LoRA(rank=2), name="third"),
        lambda adapters: adapters.per_sample(["sql", "e2e"]).__enter__(),
    ],
    ids=["activate", "activate None", "merge", "merge again", "remove", "attach", "per_sample"],
)
def test_while_merged(call, adapters: Adapters, model: PreTrainedModel) -> None:
    adapters.merge("sql")
    before, merged = trace(model), logits(model)
    with pytest.raises(AdapterStateError, match=r"sql is merged.*unmerge\(\)"):
        call(adapters)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), merged)
    assert adapters.merged == {"sql": 1.0}


def test_a_merge_that_fails_midway(adapters: Adapters, model: PreTrainedModel) -> None:
    """The last layer's weight is quantised: no earlier layer may stay merged."""
    layer = model.model.layers[1].self_attn.v_proj
    layer.weight = nn.Parameter(layer.weight.data.mul(10).to(torch.int8), requires_grad=False)
    before = trace(model)
    with pytest.raises(AdapterStateError, match="int8"):
        adapters.merge("sql")
    assert_unchanged(model, before)
    assert not adapters.merged


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, dora=True),
        LoRA(rank=2, targets="mlp", train_modules="lm_head"),
        FullFineTuning(),
    ],
    ids=["dora", "trained module", "full"],
)
def test_parts_that_do_not_scale(method, adapters: Adapters, model: PreTrainedModel) -> None:
    attach(model, method, name="whole")
    adapters.activate({"whole": 1})
    before = trace(model)
    for choice in ({"whole": 0.5}, {"whole": 1.0, "sql": 1.0}, {"sql": 0.0, "whole": 1.0}):
        with pytest.raises(AdapterStateError, match=r"'whole'.*linear"):
            adapters.activate(choice)
        with pytest.raises(AdapterStateError, match=r"'whole'.*linear"):
            adapters.merge(choice)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(torch, "ones", 2)],
    ids=["replacing weights"],
)
def test_a_merge_that_is_interrupted(
    adapters: Adapters, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, owner, name, call
) -> None:
    model.eval()
    before, expected = trace(model), logits(model)
    fail_at(monkeypatch, owner, name, call)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.merge("e2e")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    assert adapters.active == {"sql": 1.0}


def test_an_unmerge_that_is_interrupted_is_completed(
    adapters: Adapters, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trace(model)
    adapters.merge("sql")
    fail_at(monkeypatch, LayerAdapters, "restore", 2)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.unmerge()
    assert adapters.merged == {}
    assert_unchanged(model, before)


# --- removing -------------------------------------------------------------------------------------


def test_a_detach_that_is_interrupted_can_be_repeated(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trace(model)
    adapters = attach(model, LoRA(rank=2))
    fail_at(monkeypatch, nn.Parameter, "requires_grad_", 3)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.detach()
    adapters.detach()
    assert_unchanged(model, before)


DETACHED_CALLS = {
    "activate": lambda adapters: adapters.activate("sql"),
    "activate none": lambda adapters: adapters.activate(None),
    "disabled": lambda adapters: adapters.disabled().__enter__(),
    "per_sample": lambda adapters: adapters.per_sample(["sql", None]).__enter__(),
    "per_sample base": lambda adapters: adapters.per_sample([None, None]).__enter__(),
    "per_token": lambda adapters: adapters.per_token([(None, 14)]).__enter__(),
    "merge": lambda adapters: adapters.merge("sql"),
    "merge active": lambda adapters: adapters.merge(),
    "remove": lambda adapters: adapters.remove("sql"),
    "summary": lambda adapters: adapters.summary(),
    "save": lambda adapters: adapters.save("never"),
}


@pytest.mark.parametrize("call", DETACHED_CALLS.values(), ids=DETACHED_CALLS)
def test_a_detached_handle_changes_nothing(
    call, adapters: Adapters, model: PreTrainedModel
) -> None:
    adapters.detach()
    with pytest.raises(AdapterStateError, match=r"This handle was detached .* latest attach"):
        call(adapters)
    assert handle_of(model) is None
    again = attach(model, FullFineTuning(), name="sql")
    randomise(again)
    expected = logits(model)
    assert (expected - logits(tiny_models.build("llama"))).abs().max() > 1e-2
    for refused in (call, lambda adapters: adapters.keep()):
        with pytest.raises(AdapterStateError, match=r"This handle was detached .* latest attach"):
            refused(adapters)
    adapters.detach()  # the new handle keeps its adapters
    assert handle_of(model) is again
    assert again is not adapters
    assert again.names == ("sql",)
    assert torch.equal(logits(model), expected)


def test_the_text_of_a_handle_and_of_a_stored_adapter(adapters: Adapters) -> None:
    assert repr(adapters) == "Adapters(sql, e2e; active: {'sql': 1.0})"
    adapters.merge("e2e")
    assert repr(adapters) == "Adapters(sql, e2e; merged: {'e2e': 1.0})"
    adapters.unmerge()
    adapters.activate(None)
    assert repr(adapters) == "Adapters(sql, e2e; active: none)"
    stored = repr(adapters.stored("sql"))
    assert "rank=2" in stored
    assert "tensor(" not in stored
    adapters.detach()
    assert repr(adapters) == "Adapters(detached)"


def test_a_handle_after_a_merge_without_the_base(adapters: Adapters) -> None:
    adapters.merge(keep_base=False)
    with pytest.raises(AdapterStateError, match=r"This handle was detached"):
        adapters.disabled().__enter__()


def test_removing_the_active_adapter_leaves_the_others_whole(
    adapters: Adapters, model: PreTrainedModel
) -> None:
    adapters.activate("e2e")
    expected = logits(model)
    adapters.activate("sql")
    adapters.remove("sql")
    assert adapters.names == ("e2e",)
    assert adapters.active == {}
    assert torch.equal(logits(model), logits(tiny_models.build("llama")))
    assert not any(".sql." in name for name in model.state_dict())
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks
    adapters.activate("e2e")
    assert torch.equal(logits(model), expected)
    adapters.remove("e2e")
    assert handle_of(model) is None


def test_removing_one_of_a_blend_keeps_the_rest_active(
    adapters: Adapters, model: PreTrainedModel
) -> None:
    attach(model, LoRA(rank=2, targets="attention.k"), name="third")
    randomise(adapters, "third")
    adapters.activate({"e2e": 0.3, "third": 2.0})
    expected = logits(model)
    adapters.activate({"e2e": 0.3, "sql": 0.7, "third": 2.0})
    adapters.remove("sql")
    assert adapters.active == {"e2e": 0.3, "third": 2.0}
    assert torch.equal(logits(model), expected)


# --- files ----------------------------------------------------------------------------------------


def test_save_to_a_folder_that_exists(adapters: Adapters, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="overwrite"):
        adapters.save(folder, "sql")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "notes.txt"]
    with pytest.raises(RunFolderError, match="not an adapter's"):
        adapters.save(folder, "sql", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"

    adapters.save(tmp_path / "other", "sql")
    first = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="overwrite"):
        adapters.save(tmp_path / "other", "e2e")
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == first
    adapters.save(tmp_path / "other", "e2e", overwrite=True)
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() != first


def test_save_that_fails_leaves_nothing(adapters: Adapters, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            Path(folder, "tokenizer.json").write_text("half")
            raise OSError("no such vocabulary")

    with pytest.raises(OSError, match="vocabulary"):
        adapters.save(tmp_path / "adapter", "sql", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_provenance(adapters: Adapters, tmp_path: Path) -> None:
    adapters.save(tmp_path / "adapter", "sql", provenance={"step": 1})
    with pytest.raises(ConfigurationError, match="provenance cannot be written as JSON"):
        adapters.save(tmp_path / "other", "sql", provenance={"loss": float("nan")})
    with pytest.raises(RunFolderError, match="overwrite"):
        adapters.save(tmp_path / "adapter", "sql", provenance={"step": 2})
    assert adapters.provenance("sql") == {"step": 1}
    adapters.save(tmp_path / "other", "sql", provenance={"loss": 2.5})
    assert adapters.provenance("sql") == {"step": 1, "loss": 2.5}
    adapters.provenance("sql").clear()  # a copy, as of `modules`
    assert adapters.provenance("sql") == {"step": 1, "loss": 2.5}


@pytest.mark.parametrize("state", ["merged", "inactive", "other", "rows"])
def test_a_file_does_not_depend_on_what_acts(
    state: str, adapters: Adapters, model: PreTrainedModel, tmp_path: Path
) -> None:
    attach(
        model, LoRA(rank=2, dora=True, targets=("k_proj",), train_modules="lm_head"), name="dora"
    )
    randomise(adapters, "dora")
    adapters.activate("dora")
    adapters.save(tmp_path / "active", "dora")
    if state == "merged":
        adapters.merge("dora")
        adapters.save(tmp_path / state, "dora")
    elif state == "rows":
        with adapters.per_sample(["dora", "sql"]):
            adapters.save(tmp_path / state, "dora")
    else:
        adapters.activate({"inactive": None, "other": "sql"}[state])
        adapters.save(tmp_path / state, "dora")
    names = sorted(path.name for path in (tmp_path / "active").iterdir())
    assert names == sorted(path.name for path in (tmp_path / state).iterdir())
    for name in names:
        assert (tmp_path / "active" / name).read_bytes() == (tmp_path / state / name).read_bytes()


@pytest.mark.parametrize("state", ["merged", "inactive", "full"])
def test_loading_beside_what_acts_compares_with_the_base(
    state: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    """The fingerprint is that of the base, also while other tensors replace its weights."""
    source = attach(tiny_models.build("llama"), LoRA(rank=2))
    source.save(tmp_path / "adapter")
    method = FullFineTuning() if state == "full" else LoRA(rank=2, targets="mlp")
    adapters = attach(model, method, name="other")
    randomise(adapters)
    if state == "merged":
        adapters.merge()
        adapters.unmerge()
    elif state == "inactive":
        adapters.activate(None)
    load(model, tmp_path / "adapter", name="loaded")
    assert adapters.names == ("other", "loaded")


def test_refused_load_leaves_nothing(
    adapters: Adapters, model: PreTrainedModel, tmp_path: Path
) -> None:
    other = attach(tiny_models.build("llama", seed=1), LoRA(rank=2))
    other.save(tmp_path / "other base")
    wide = attach(tiny_models.build("llama", intermediate_size=48), LoRA(rank=2, targets="mlp"))
    wide.save(tmp_path / "other shape")
    before = trace(model)
    with pytest.raises(WrongBaseError, match="allow_other_base"):
        load(model, tmp_path / "other base")
    for options in ({}, {"allow_other_base": True}):
        with pytest.raises((WrongBaseError, AdapterFileError)):
            load(model, tmp_path / "other shape", **options)
    with pytest.raises(LorakitError, match="nowhere"):
        load(model, tmp_path / "nowhere")
    with pytest.raises(AdapterStateError, match="sql"):
        load(model, tmp_path / "other base", name="sql", allow_other_base=True)
    assert_unchanged(model, before)
    load(model, tmp_path / "other base", name="other", allow_other_base=True)
    assert adapters.names == ("sql", "e2e", "other")


def test_a_load_that_fails_while_it_copies_leaves_nothing(
    adapters: Adapters, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter of that name would have the file's factors and the base's head."""
    other = attach(tiny_models.build("llama"), LoRA(rank=2, train_modules="lm_head"))
    randomise(other)
    other.save(tmp_path / "new")
    before, expected = trace(model), logits(model)
    fail_at(monkeypatch, handle_module, "add_copies", 0)
    with pytest.raises(torch.OutOfMemoryError):
        load(model, tmp_path / "new")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    load(model, tmp_path / "new")
    torch.testing.assert_close(logits(model), logits(other.model))
