"""Decoding steps with shared products compute what the layers compute one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from random_adapters import randomise
from tiny_models import logits_with_cache
from torch import Tensor
from transformers import DynamicCache

from lorakit.adapters import Adapters, attach, decoding
from lorakit.adapters.attach import handle_for
from lorakit.methods import AdapterModule, LoRA, Method
from lorakit.methods.lora.embedding import EmbeddingLoRA
from lorakit.methods.module import LowRank

Change = Callable[[Adapters], Any]

PROMPT = torch.tensor([[5, 8, 13, 21, 34], [2, 55, 9, 30, 7]])
NEXT = torch.tensor([[3], [11]])


def adapted(arch: str = "llama", *names: str, method: Method | None = None) -> tuple[Any, Adapters]:
    model = tiny_models.build(arch)
    method = method or LoRA(rank=2, alpha=3, targets="all-linear")
    for seed, name in enumerate(names or ("a",)):
        randomise(attach(model, method, name=name, seed=seed), name, seed=seed)
    model.double()
    return model, handle_for(model)


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Compute no step with shared products: the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "FEW_TOKENS", 0)
        patch.setattr(decoding, "FEW_MIXED_TOKENS", 0)
        yield


def steps(adapters: Adapters, change: Change | None = None, *, before: int = 3) -> Tensor:
    """Return the logits of decoding steps after a prompt, with a change between two of them."""
    model: Any = adapters.model
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        logits_with_cache(model, PROMPT, cache)
        for number in range(2 * before):
            if number == before and change:
                change(adapters)
            logits.append(logits_with_cache(model, NEXT, cache).double())
    return torch.stack(logits)


def stacked_layers(adapters: Adapters) -> int:
    """Return how many layers the stacks computed in the last step."""
    found = adapters._activation.decoding._stacks
    return len(found._arrangement.parts) if found and found._arrangement else 0


METHODS = {
    "rank 2": LoRA(rank=2, targets="all-linear"),
    "different ranks": LoRA(rank=2, rank_pattern={"k_proj": 3}, targets="all-linear"),
    "PiSSA": LoRA(rank=2, init="pissa", targets="all-linear"),
    "DoRA": LoRA(rank=2, dora=True, targets="all-linear"),
    "with the embedding": LoRA(rank=2, targets=("attention.qv", "embedding")),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods(method):
    _, adapters = adapted(method=method)
    found = steps(adapters)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(adapters))


@pytest.mark.parametrize("arch", ["gpt2", "gpt-neox", "bloom", "qwen3", "gemma"])
def test_architectures(arch):
    _, adapters = adapted(arch)
    found = steps(adapters)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(adapters))


def test_bfloat16_rounds_no_more_than_layer_by_layer():
    """The roundings of both are independent, so their errors differ by chance."""
    _, adapters = adapted()
    exact = steps(adapters)
    adapters.model.to(torch.bfloat16)
    for layer in adapters.model.modules():
        if hasattr(layer, "lora_A"):
            layer.float()
    error = (steps(adapters) - exact).norm()
    assert stacked_layers(adapters)
    with layer_by_layer():
        assert error < 2 * (steps(adapters) - exact).norm()
    assert error < 0.05 * exact.norm()


# --- a change between two steps ----------------------------------------------------------------------


def edit(adapters: Adapters) -> None:
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.mul_(-1.5)


def edit_one_b(adapters: Adapters) -> None:
    with torch.no_grad():
        adapters.model.get_parameter("model.layers.1.mlp.up_proj.adapters.a.lora_B").zero_()


def optimizer_step(adapters: Adapters) -> None:
    parameters = list(adapters.trainable_parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    torch.optim.AdamW(parameters, lr=0.3).step()


def fused_optimizer_step(adapters: Adapters) -> None:
    parameters = list(adapters.trainable_parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    torch.optim.AdamW(parameters, lr=0.3, fused=True).step()


def load_state_dict(adapters: Adapters) -> None:
    state = {
        name: tensor + 0.5 if "lora_" in name else tensor
        for name, tensor in adapters.model.state_dict().items()
    }
    adapters.model.load_state_dict(state)


def assign_state_dict(adapters: Adapters) -> None:
    state = {
        name: tensor + 0.5 if "lora_" in name else tensor
        for name, tensor in adapters.model.state_dict().items()
    }
    adapters.model.load_state_dict(state, assign=True)


def there_and_back(adapters: Adapters) -> None:
    """Round the adapter to bfloat16. The last tensors may get the addresses of the first."""
    layers = [m for m in adapters.model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.to(torch.bfloat16)
    for layer in layers:
        layer.double()


def new_parameter(adapters: Adapters) -> None:
    module = adapters.model.get_submodule("model.layers.0.self_attn.q_proj.adapters.a")
    module.lora_A = torch.nn.Parameter(module.get_parameter("lora_A").detach() + 1)


def new_scaling(adapters: Adapters) -> None:
    adapters.model.get_submodule("model.layers.0.self_attn.q_proj.adapters.a").scaling = 7.0  # type: ignore[assignment]


def nothing(adapters: Adapters) -> None:
    adapters.activate(None)


def other(adapters: Adapters) -> None:
    attach(adapters.model, LoRA(rank=3, targets="all-linear"), name="b", seed=3)
    randomise(adapters, "b", seed=3)
    adapters.activate("b")


def blend(adapters: Adapters) -> None:
    other(adapters)
    adapters.activate({"a": 0.3, "b": -2.0})


def remove_and_attach(adapters: Adapters) -> None:
    adapters.remove("a")
    adapters = attach(adapters.model, LoRA(rank=2, targets="all-linear"), name="a", seed=5)
    randomise(adapters, "a", seed=5)


def merge(adapters: Adapters) -> None:
    """The one change without an effect on the logits."""
    adapters.merge()


CHANGES = (
    edit,
    edit_one_b,
    optimizer_step,
    fused_optimizer_step,
    load_state_dict,
    assign_state_dict,
    there_and_back,
    new_parameter,
    new_scaling,
    nothing,
    other,
    blend,
    remove_and_attach,
    merge,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_acts_in_the_next_step(change):
    _, ours = adapted()
    _, plain = adapted()
    found = steps(ours, change)
    with layer_by_layer():
        expected = steps(plain, change)
    torch.testing.assert_close(found, expected)
    if change is not merge:
        assert (found[-1] - steps(adapted()[1])[-1]).norm() > 1e-3


class TwoLayers(AdapterModule):
    """A module of a user: its tensors are in modules inside it, and its factor belongs to the class."""

    by_token = True
    factor = 0.5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = torch.nn.Linear(32, 2, bias=False), torch.nn.Linear(2, 32, bias=False)
        self.gate = torch.ones(())

    def adapt(self, layer: Any, x: Tensor, output: Tensor, weight: float) -> Tensor:
        return output + weight * self.factor * self.gate * self.up(self.down(x))

    def low_rank(self) -> LowRank:
        return LowRank(self.down.weight, self.gate * self.up.weight, self.factor)


@dataclass(frozen=True, kw_only=True)
class OnQueries:
    def modules(self, model: Any, dtype: torch.dtype) -> dict[str, AdapterModule]:
        return {f"model.layers.{i}.self_attn.q_proj": TwoLayers() for i in range(2)}

    def trained_parameters(self, model: Any) -> list[str]:
        return []


def first(adapters: Adapters) -> Any:
    return adapters.model.get_submodule("model.layers.0.self_attn.q_proj.adapters.a")


def new_child(adapters: Adapters) -> None:
    first(adapters).down = torch.nn.Linear(32, 2, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(first(adapters).down.weight, 0.5)


def set_factor(adapters: Adapters) -> None:
    first(adapters).factor = 3.0


def set_gate(adapters: Adapters) -> None:
    first(adapters).gate = torch.zeros(())


def edit_gate(adapters: Adapters) -> None:
    first(adapters).gate.mul_(2)


@pytest.mark.parametrize("change", [edit, new_child, set_factor, set_gate, edit_gate])
def test_a_change_of_a_users_module(change: Change) -> None:
    logits = []
    for context in (contextlib.nullcontext(), layer_by_layer()):
        _, adapters = adapted(method=OnQueries())
        with context:
            logits.append(steps(adapters, change))
        if not logits[1:]:
            assert stacked_layers(adapters) == 2
    torch.testing.assert_close(*logits)
    assert (logits[0][-1] - steps(adapted(method=OnQueries())[1])[-1]).norm() > 1e-3


def new_embedding(adapters: Adapters) -> None:
    for module in adapters.modules().values():
        if isinstance(module, EmbeddingLoRA):
            module.lora_B = torch.nn.Parameter(-module.lora_B.detach())


@pytest.mark.parametrize("change", [edit, new_embedding])
def test_a_change_of_an_embedding_that_the_head_shares(change: Change) -> None:
    logits = []
    for context in (contextlib.nullcontext(), layer_by_layer()):
        model = tiny_models.build("llama", tie_word_embeddings=True)
        adapters = attach(model, LoRA(rank=2, targets="embedding", tie_head=True), name="a", seed=0)
        randomise(adapters)
        model.double()
        with context:
            logits.append(steps(adapters, change))
        if not logits[1:]:
            assert stacked_layers(adapters) == 1
    torch.testing.assert_close(*logits)


def test_an_edit_of_data_acts_from_the_next_prompt_on():
    """PyTorch does not count it, so no step can see it."""
    _, adapters = adapted()
    steps(adapters)
    for parameter in adapters.trainable_parameters():
        parameter.data.mul_(-1.5)
    found = steps(adapters)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(adapters))


def test_dropout_acts_in_a_step_of_a_model_in_training_mode():
    _, adapters = adapted(method=LoRA(rank=2, dropout=0.5, targets="all-linear"))
    found = steps(adapters, lambda a: a.model.train())
    assert not torch.equal(found[-1], found[-2])
    assert not stacked_layers(adapters)


# --- inside a step -----------------------------------------------------------------------------------


def test_an_input_that_changes_between_two_layers_is_read_again():
    """A model may write into a tensor that two layers read."""
    model, adapters = adapted()
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda layer, args: (args[0].add_(0.5),))
    found = steps(adapters)
    assert stacked_layers(adapters)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(adapters))


def test_gradients_of_a_step():
    model, adapters = adapted()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(4):
            logits_with_cache(model, NEXT, cache)
    assert stacked_layers(adapters)
    with torch.enable_grad():
        logits_with_cache(model, NEXT, cache).sum().backward()
    assert all(p.grad is not None for p in adapters.trainable_parameters())


def test_inference_mode():
    _, adapters = adapted()
    with torch.inference_mode():
        found = steps(adapters)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(adapters))


def test_rows_with_different_adapters_between_two_steps():
    """A block of `per_sample` computes by rows, and the steps around it go on."""
    _, ours = adapted("llama", "a", "b")
    _, plain = adapted("llama", "a", "b")

    def by_row(adapters: Adapters) -> None:
        with adapters.per_sample(["a", None]):
            adapters.model(input_ids=PROMPT)

    found = steps(ours, by_row)
    with layer_by_layer():
        torch.testing.assert_close(found, steps(plain, by_row))


def test_generate_gives_the_same_tokens():
    model, adapters = adapted()
    options: dict = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = model.generate(PROMPT, pad_token_id=0, **options)
    assert stacked_layers(adapters)
    with layer_by_layer():
        assert torch.equal(found, model.generate(PROMPT, pad_token_id=0, **options))


def test_a_model_whose_layers_are_all_recurrent():
    """Its cache counts no tokens."""
    config = transformers.MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=99
    )
    model: Any = transformers.MambaForCausalLM(config).eval()
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="all-linear"), name="a")
    randomise(adapters, "a")
    model.double()
    options: dict = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(PROMPT, **options)
    assert stacked_layers(adapters)
    adapters.merge()
    merged = model.generate(PROMPT, **options)
    assert torch.equal(found.sequences, merged.sequences)
    torch.testing.assert_close(found.logits, merged.logits)
