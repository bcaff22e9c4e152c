"""Paths of blocks, branches and outputs, compared with a run of the model."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from lorakit.errors import TargetError
from lorakit.models.blocks import block_outputs, residual_branches, stacks
from lorakit.models.places import find_places

ONE_MODULE_FOR_BOTH = ("phi", "vit")
"""Attention and MLP share one dropout, so an adapter on it would apply to both."""
NOT_IN_THE_TABLE = ("StableLm", "Mpt")
"""Their dropouts follow only one of the two projections; adapters come before them."""


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_stacks_match_the_forward_pass(arch: str) -> None:
    model = tiny_models.build(arch)
    called: list[str] = []
    for blocks in stacks(model).values():
        for path in blocks:
            block = model.get_submodule(path)
            block.register_forward_hook(lambda module, x, out, path=path: called.append(path))
    model(**tiny_models.example_batch(arch, model))
    assert called == [path for blocks in stacks(model).values() for path in blocks]
    two = model.config.is_encoder_decoder
    assert len(stacks(model)) == (2 if two else 1)
    assert len(called) == (4 if two else 2)


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_outputs_are_the_inputs_of_the_next_module(arch: str) -> None:
    """A branch ends with its last dropout; a block's output is that of its LayerNorm."""
    model = tiny_models.build(arch).train()
    producer: dict[int, str] = {}
    after: dict[str, set[str]] = {}
    outputs = []

    def watch(path: str):
        def hook(module: nn.Module, args: tuple, output) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(module, nn.Dropout) and id(args[0]) in producer:
                after.setdefault(producer[id(args[0])], set()).add(path)
            if not (path in blocks and id(output) in producer):
                producer[id(output)] = path
            else:
                after.setdefault(path, set()).add(producer[id(output)])
            outputs.append(output)  # keep it alive, so that no other tensor gets its id

        return hook

    blocks = {path for stack in stacks(model).values() for path in stack}
    projections = {p.path for role in ("attention.o",) for p in find_places(model, role)}
    if arch not in tiny_models.WITH_EXPERTS:
        projections |= {place.path for place in find_places(model, "mlp.down")}
    for path, module in model.named_modules():
        if path in blocks | projections or isinstance(module, (nn.Dropout, nn.LayerNorm)):
            module.register_forward_hook(watch(path))
    model(**tiny_models.example_batch(arch, model))

    norms = {path: next(iter(after.get(path, {path}))) for path in blocks}
    assert {site.block: site.path for site in block_outputs(model)} == norms
    if arch in tiny_models.WITH_EXPERTS:
        with pytest.raises(TargetError, match="lin or pfeiffer"):
            residual_branches(model)
        return
    branches = {next(iter(after.get(path, {path}))) for path in projections}
    if arch in (*ONE_MODULE_FOR_BOTH, *NOT_IN_THE_TABLE):
        branches = projections
    assert {site.path for site in residual_branches(model)} == branches
    assert {site.width for site in residual_branches(model)} == {32}
    assert {site.width for site in block_outputs(model)} == {32}


def test_opt_with_post_layer_norm() -> None:
    model = tiny_models.build("opt", do_layer_norm_before=False)
    assert [site.path.rpartition(".")[2] for site in block_outputs(model)] == 2 * [
        "final_layer_norm"
    ]


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(2, 2)])
        self.deep = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)] * 5) for _ in range(3)])


def test_the_longest_list_is_the_stack_of_an_unknown_architecture() -> None:
    assert stacks(Unknown()) == {"deep": ["deep.0", "deep.1", "deep.2"]}
    assert stacks(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("find", [residual_branches, block_outputs])
@pytest.mark.parametrize("generic", [False, True])
def test_unknown_blocks_are_rejected(find, generic: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if generic else Unknown()
    with pytest.raises(TargetError, match=r"blocks of the architecture \w+ are not known"):
        find(model)


def test_weights_are_not_needed() -> None:
    with torch.device("meta"):
        model = tiny_models.build("t5")
    assert len(residual_branches(model)) == 2 * 2 + 2 * 3
    assert len(block_outputs(model)) == 4
