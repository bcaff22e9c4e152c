"""Inputs that the handle rejects: the error names the fix, and the model does not change."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach, handle_of, load
from lorakit.errors import (
    AdapterFileError,
    AdapterStateError,
    ConfigurationError,
    LorakitError,
    RunFolderError,
    TargetError,
    WrongBaseError,
)
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA

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


REPLACED = (
    r"layer 'model\.layers\.0\.self_attn\.q_proj' was replaced after the adapter 'sql' was attached"
)


@pytest.mark.parametrize(
    "action",
    [
        lambda adapters, folder: adapters.activate({"sql": 1.0}),
        lambda adapters, folder: adapters.merge("sql"),
        lambda adapters, folder: adapters.save(folder / "saved", "sql"),
    ],
    ids=["activate", "merge", "save"],
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


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTuning()], ids=["lora", "full"])
def test_detach_reports_a_replaced_layer_and_restores_the_others(model, caplog, method) -> None:
    randomise(attach(model, method, name="sql"))
    adapters = handle_of(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(32, 32, bias=False)
    adapters.detach()
    assert any(re.search(REPLACED, record.getMessage()) for record in caplog.records)
    assert handle_of(model) is None
    plain = tiny_models.build("llama")
    attention.q_proj = plain.model.layers[0].self_attn.q_proj
    assert torch.equal(logits(model), logits(plain))


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
    "name", ["", "a.b", "a b", "-a", "ä", "../a", "keys", "forward", "weight\n", 3, None]
)
def test_names_that_cannot_be(name: str, model: PreTrainedModel) -> None:
    before = trace(model)
    with pytest.raises(ConfigurationError, match="name"):
        attach(model, LoRA(rank=2), name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["A-1_b", "0-shot", "lora_A", "weight"])
def test_names_that_can_be(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    adapters = attach(model, LoRA(rank=2), name=name)
    randomise(adapters)
    expected = logits(model)
    adapters.save(tmp_path / "saved")
    adapters.detach()
    load(model, tmp_path / "saved", name=name)
    torch.testing.assert_close(logits(model), expected)


def test_a_name_that_is_taken(adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with pytest.raises(AdapterStateError, match=r"'sql'.*remove\('sql'\)"):
        attach(model, LoRA(rank=4, targets="mlp"), name="sql")
    assert_unchanged(model, before)


# --- activating -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    ["sqll", {"sql": 1.0, "e2f": 1.0}, ["sql", "e2e"], 5, {"sql": "1"}, {"sql": float("nan")}],
    ids=str,
)
def test_choices_that_cannot_be(choice: object, adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with pytest.raises(AdapterStateError):
        adapters.activate(choice)  # type: ignore[arg-type]
    with pytest.raises(AdapterStateError):
        adapters.merge(choice)  # type: ignore[arg-type]
    assert_unchanged(model, before)


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


@pytest.mark.parametrize("rows", ["sql", ["sql", "sqll"], 5, None], ids=str)
def test_rows_that_cannot_be(rows: object, adapters: Adapters, model: PreTrainedModel) -> None:
    before = trace(model)
    with (
        pytest.raises(AdapterStateError),
        adapters.per_sample(rows),  # type: ignore[arg-type]
    ):
        raise AssertionError("the block must not be entered")
    assert_unchanged(model, before)


# --- merging --------------------------------------------------------------------------------------


def test_a_merge_that_fails_midway(adapters: Adapters, model: PreTrainedModel) -> None:
    """The last layer's weight is quantised: no earlier layer may stay merged."""
    layer = model.model.layers[1].self_attn.v_proj
    layer.weight = nn.Parameter(layer.weight.data.mul(10).to(torch.int8), requires_grad=False)
    before = trace(model)
    with pytest.raises(AdapterStateError, match="int8"):
        adapters.merge("sql")
    assert_unchanged(model, before)
    assert not adapters.merged


# --- removing -------------------------------------------------------------------------------------


DETACHED_CALLS = {
    "activate": lambda adapters: adapters.activate("sql"),
    "disabled": lambda adapters: adapters.disabled().__enter__(),
    "per_sample": lambda adapters: adapters.per_sample(["sql", None]).__enter__(),
    "per_token": lambda adapters: adapters.per_token([(None, 14)]).__enter__(),
    "merge": lambda adapters: adapters.merge("sql"),
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
    with pytest.raises(AdapterStateError, match=r"This handle was detached .* latest attach"):
        call(adapters)
    adapters.detach()  # the new handle keeps its adapters
    assert handle_of(model) is again
    assert torch.equal(logits(model), expected)


def test_the_text_of_a_handle_and_of_a_stored_adapter(adapters: Adapters) -> None:
    assert repr(adapters) == "Adapters(sql, e2e; active: {'sql': 1.0})"
    stored = repr(adapters.stored("sql"))
    assert "rank=2" in stored
    assert "tensor(" not in stored
    adapters.detach()
    assert repr(adapters) == "Adapters(detached)"


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


@pytest.mark.parametrize("state", ["merged", "rows"])
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
    else:
        with adapters.per_sample(["dora", "sql"]):
            adapters.save(tmp_path / state, "dora")
    names = sorted(path.name for path in (tmp_path / "active").iterdir())
    assert names == sorted(path.name for path in (tmp_path / state).iterdir())
    for name in names:
        assert (tmp_path / "active" / name).read_bytes() == (tmp_path / state / name).read_bytes()


def test_loading_beside_what_acts_compares_with_the_base(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    """The fingerprint is that of the base, also while other tensors replace its weights."""
    source = attach(tiny_models.build("llama"), LoRA(rank=2))
    source.save(tmp_path / "adapter")
    adapters = attach(model, FullFineTuning(), name="other")
    randomise(adapters)
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
