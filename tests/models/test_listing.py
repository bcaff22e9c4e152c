"""The table of targets lists exactly the adaptable layers."""

from __future__ import annotations

import re

import pytest
import tiny_models
import torch
from torch import nn

from lorakit.models.layers import StackedWeight, why_not_adaptable
from lorakit.models.listing import TargetList, targets
from lorakit.models.places import find_places
from lorakit.models.tree import walk

LLAMA = """\
role         modules                               layers  weight (out, in)
attention.q  model.layers.{0..1}.self_attn.q_proj       2  (32, 32)
attention.k  model.layers.{0..1}.self_attn.k_proj       2  (16, 32)
attention.v  model.layers.{0..1}.self_attn.v_proj       2  (16, 32)
attention.o  model.layers.{0..1}.self_attn.o_proj       2  (32, 32)
mlp.gate     model.layers.{0..1}.mlp.gate_proj          2  (64, 32)
mlp.up       model.layers.{0..1}.mlp.up_proj            2  (64, 32)
mlp.down     model.layers.{0..1}.mlp.down_proj          2  (32, 64)
embedding    model.embed_tokens                         1  (99, 32)
head         lm_head                                    1  (99, 32)"""


def test_table_of_llama() -> None:
    with torch.device("meta"):
        model = tiny_models.build("llama")
    assert str(targets(model)) == LLAMA
    assert repr(targets(model)) == LLAMA


def test_fused_layers_show_their_rows() -> None:
    lines = str(targets(tiny_models.build("gpt-neox"))).splitlines()
    fused = [line for line in lines if "query_key_value" in line]
    assert [line.split("  ")[-1] for line in fused] == [
        "rows 0:8 of every 24",
        "rows 8:16 of every 24",
        "rows 16:24 of every 24",
    ]
    assert "(96, 32)  rows 32:64" in str(targets(tiny_models.build("gpt2")))


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_listed_roles_exist_and_listed_layers_are_called(arch: str) -> None:
    model = tiny_models.build(arch)
    listed = targets(model)
    assert len(listed) == len(set(listed))
    for role in listed:
        count = sum(row.count for row in listed.rows if row.role == role)
        assert len(find_places(model, role)) == count

    called = set()
    for at in walk(model):
        # A stacked weight of experts is used in their call.
        module = at.parent if isinstance(at.module, StackedWeight) else at.module
        module.register_forward_hook(lambda *_, path=at.path: called.add(path))
    with torch.no_grad():
        model(**tiny_models.example_batch(arch, model))
    adaptable = {at.path for at in walk(model) if why_not_adaptable(at.module) is None}
    # ESM has this head for `predict_contacts` alone.
    assert _paths(listed) - {"contact_head.regression"} == adaptable & called


def _paths(listed: TargetList) -> set[str]:
    """Expand ``a.{0..2}.b`` and ``a.{0,2}.b``."""
    paths = set()
    for row in listed.rows:
        expanded = [""]
        for part in _parts(row.modules):
            expanded = [
                f"{head}.{tail}".lstrip(".") for head in expanded for tail in _numbers(part)
            ]
        assert len(expanded) == row.count
        paths |= set(expanded)
    return paths


def _parts(pattern: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|[^.]+", pattern)


def _numbers(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    first, _, last = part.strip("{}").partition("..")
    return (
        [str(n) for n in range(int(first), int(last) + 1)] if last else part.strip("{}").split(",")
    )


def test_layers_without_a_role_are_listed_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    assert str(targets(model)).splitlines()[1:] == [
        "-     0             1  (3, 2)",
        "-     {2..3}        2  (3, 3)",
    ]
    assert list(targets(model)) == []
    assert targets(model)
    assert not targets(nn.ReLU())
