"""Prefix methods compared with PEFT's prefix tuning and with float64 arithmetic, and inputs that they reject."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import tiny_models
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from random_adapters import randomise
from tiny_models import logits_with_cache, tensors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from lorakit import LoRA, PrefixEmbedding, PrefixLayer, attach
from lorakit.adapters.activation import Activation
from lorakit.adapters.entry import enter
from lorakit.errors import AdapterStateError, ConfigurationError, TargetError
from lorakit.methods.prefix_modules import PassState, VirtualPositions, VirtualVectors
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualTokens

WORDS = [[5, 17, 33, 8, 61, 22, 9], [40, 3, 71, 12, 90, 55, 6]]


def vectors(adapters, name: str = "default") -> list[Tensor]:
    """What enters each block at the virtual tokens, (prefix + infix, d) each."""
    modules = adapters.modules(name).values()
    return [module.vectors.detach() for module in modules if isinstance(module, VirtualVectors)]


def placed(tokens: VirtualTokens, rows=WORDS, **where) -> Tensor:
    return torch.tensor([tokens.place(row, **where) for row in rows])


def logits(model, ids: Tensor, **inputs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# --- references ----------------------------------------------------------------------------------


def gpt2_in_float64(state: dict[str, Tensor], entering: list[Tensor], ids: Tensor, at: Tensor):
    """GPT-2's logits (T, V) of one row, by the formulas alone.

    `at` (N,) are the columns of the virtual tokens, and `entering` holds for each block the (N, d) that takes their
    place; where it ends, nothing is replaced.
    """
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    length, heads = len(ids), 4
    x = w["transformer.wte.weight"][ids.where(ids < 99, 0)]
    x[at] = entering[0].double()
    x = x + w["transformer.wpe.weight"][:length]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for block in range(2):
        name = f"transformer.h.{block}"
        if 0 < block < len(entering):
            x[at] = entering[block].double()
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(x.shape[1], dim=1)
        q, k, v = (y.view(length, heads, -1).transpose(0, 1) for y in (q, k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, f"{name}.attn.c_proj")
        h = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("kind", [PrefixEmbedding, PrefixLayer])
def test_against_float64_arithmetic(kind) -> None:
    model = tiny_models.build("gpt2")
    state = tensors_of(model)
    adapters = attach(model, kind(prefix_length=3, infix_length=2), seed=1)
    randomise(adapters, scale=0.5)
    ids = placed(adapters.virtual_tokens, prompt=4)
    actual = logits(model, ids)
    expected = torch.stack(
        [
            gpt2_in_float64(
                state, vectors(adapters), row, (row >= PREFIX_START).nonzero().flatten()
            )
            for row in ids
        ]
    )
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    assert len(vectors(adapters)) == (1 if kind is PrefixEmbedding else 2)


def test_prefix_layer_is_peft_prefix_tuning_with_the_keys_and_values_of_its_vectors() -> None:
    model = tiny_models.build("gpt2")
    with warnings.catch_warnings():  # PEFT uses deprecated names of transformers
        warnings.simplefilter("ignore", FutureWarning)
        config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        other = get_peft_model(copy.deepcopy(model), config).eval()
    adapters = attach(model, PrefixLayer(prefix_length=3), seed=1)
    randomise(adapters, scale=0.5)
    pairs = []
    with torch.no_grad():
        for i, (block, entering) in enumerate(
            zip(model.transformer.h, vectors(adapters), strict=True)
        ):
            x = entering + model.transformer.wpe.weight[:3] if i == 0 else entering
            _, key, value = block.attn.c_attn(block.ln_1(x)).split(32, dim=1)
            pairs += [key, value]
        other.prompt_encoder["default"].embedding.weight.copy_(torch.cat(pairs, dim=1))
    actual = logits(model, placed(adapters.virtual_tokens))[:, 3:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = logits(other, torch.tensor(WORDS))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (actual - logits(other.get_base_model(), torch.tensor(WORDS))).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_the_cache_holds_is_what_whole_passes_compute(arch: str) -> None:
    model = tiny_models.build(arch)
    adapters = attach(model, PrefixLayer(prefix_length=2, infix_length=2), seed=1)
    randomise(adapters, scale=0.5)
    ids = placed(adapters.virtual_tokens, keep=1, prompt=5)
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split(
        [4, 5, 1, 1], dim=1
    ):  # the infix comes in the second, words alone in the others
        with torch.no_grad():
            pieces.append(logits_with_cache(model, piece, cache))
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_an_encoder_reads_the_vectors_wherever_they_stand() -> None:
    """DeBERTa has a convolution after the first block, which must not change the second block's vectors."""
    model = tiny_models.build("deberta-v2")
    adapters = attach(model, PrefixLayer(prefix_length=3, infix_length=1), seed=1)
    entered: list[Tensor] = []
    block = model.deberta.encoder.layer[1]
    block.attention.register_forward_hook(lambda layer, args, output: entered.append(args[0]))
    ids = placed(adapters.virtual_tokens, keep=1)
    logits(model, ids)
    virtual = ids >= PREFIX_START
    assert torch.equal(entered[0][virtual], vectors(adapters)[1].repeat(2, 1))


# --- with other adapters ---------------------------------------------------------------------------


def test_each_row_its_own_adapter() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, PrefixLayer(prefix_length=2), name="two", seed=1)
    attach(model, PrefixEmbedding(prefix_length=1, infix_length=1), name="one", seed=2)
    attach(model, LoRA(targets=("embedding", "attention")), name="thin", seed=3)
    randomise(adapters, "thin", scale=0.5)
    two, one = VirtualTokens(prefix=2), VirtualTokens(prefix=1, infix=1)
    rows = [two.place(WORDS[0]), [4, 4, *WORDS[0]], one.place(WORDS[1]), [7, 8, *WORDS[1]]]
    names = ["two", None, "one", "thin"]
    with adapters.per_sample(names):
        actual = logits(model, torch.tensor(rows))
    for name, row, result in zip(names, rows, actual, strict=True):
        adapters.activate(name)
        torch.testing.assert_close(result, logits(model, torch.tensor([row]))[0], atol=1e-5, rtol=1e-5)  # fmt: skip
    with (
        adapters.per_sample(["two", None, None, None]),
        pytest.raises(AdapterStateError, match="Row 2 of the ids holds 2 virtual tokens"),
    ):
        model(input_ids=torch.tensor(rows))


def test_one_leaves_and_the_others_stay() -> None:
    model = tiny_models.build("gpt2")
    base = logits(model, torch.tensor(WORDS))
    adapters = attach(model, PrefixLayer(prefix_length=2), name="first")
    attach(model, PrefixEmbedding(prefix_length=2), name="second", seed=1)
    attach(model, LoRA(), name="thin")
    adapters.activate("second")
    ids = placed(adapters.virtual_tokens)
    before = logits(model, ids)
    adapters.remove("first")
    assert torch.equal(logits(model, ids), before)
    adapters.remove("second")
    assert adapters.virtual_tokens.total == 0
    adapters.activate("thin")
    assert torch.equal(logits(model, torch.tensor(WORDS)), base)
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert set(hooks) == {enter}


# --- rejected inputs -------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    model = tiny_models.build("llama")
    return model, attach(model, PrefixLayer(prefix_length=2, infix_length=1))


def test_ids_without_virtual_tokens_are_refused(adapted) -> None:
    model, adapters = adapted
    with pytest.raises(AdapterStateError, match=r"holds no virtual token.*2 before and 1 after"):
        model(input_ids=torch.tensor(WORDS))
    one_of_two = torch.tensor([adapters.virtual_tokens.place(WORDS[0]), [*WORDS[1], 1, 1, 1]])
    with pytest.raises(AdapterStateError, match="Row 1 of the ids holds no virtual token"):
        model(input_ids=one_of_two)
    with pytest.raises(AdapterStateError, match=r"inputs_embeds.*\. Pass input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))
    adapters.activate(None)
    logits(model, torch.tensor(WORDS))


def test_virtual_tokens_that_nothing_gives_vectors_are_refused(adapted) -> None:
    model, adapters = adapted
    ids = placed(adapters.virtual_tokens)
    for wrong in (PREFIX_START + 2, INFIX_START + 1, INFIX_START + 7_000_000):
        with pytest.raises(AdapterStateError, match=f"holds the virtual token {wrong}"):
            model(input_ids=torch.cat([ids, torch.full((2, 1), wrong)], 1))
    for choice in (None, "thin"):
        if choice:
            attach(model, LoRA(), name=choice)
        adapters.activate(choice)
        with pytest.raises(AdapterStateError, match="no active adapter gives them vectors"):
            model(input_ids=ids)


def test_the_embedding_alone_can_be_called(adapted) -> None:
    model, adapters = adapted
    table = model.get_input_embeddings()
    assert torch.equal(table(torch.tensor(WORDS)), table.weight[torch.tensor(WORDS)])
    ids = placed(adapters.virtual_tokens)
    virtual = ids >= PREFIX_START
    assert torch.equal(table(ids)[virtual], vectors(adapters)[0].repeat(2, 1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_runs_again_with_the_places_of_its_own_pass(
    use_reentrant: bool,
) -> None:
    activation, moments = Activation(), []

    def block(x: Tensor) -> Tensor:
        moments.append(activation.current())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    positions = VirtualPositions.of(torch.tensor([[PREFIX_START, 5]]))
    activation.state = PassState(is_first=True, virtual=positions)
    output = checkpoint(block, x, use_reentrant=use_reentrant)
    activation.state = PassState(is_first=True)
    output.backward()
    first, again = moments
    assert again.state is first.state
    assert again.state.virtual is positions


@pytest.mark.parametrize("arch", ["t5", "bart", "vit"])
def test_models_without_one_sequence_of_tokens_are_refused(arch: str) -> None:
    with pytest.raises(TargetError, match=r"one sequence|no table of token embeddings"):
        attach(tiny_models.build(arch), PrefixLayer())


class OneOfBlocks(nn.Module):
    """A model of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)


def test_other_models_and_settings_are_refused() -> None:
    with pytest.raises(TargetError, match="text model of transformers"):
        attach(OneOfBlocks(), PrefixEmbedding())
    model = tiny_models.build("gpt2")
    model.config.n_layer = 3
    with pytest.raises(TargetError, match="no single list of its 3 blocks"):
        attach(model, PrefixLayer())
    for settings, message in (
        ({"prefix_length": -1}, "prefix_length is -1"),
        ({"prefix_length": 0}, "nothing to train"),
        ({"infix_length": 10**6}, "below 1000000"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            PrefixEmbedding(**settings)


# --- ids -------------------------------------------------------------------------------------------


def test_placing() -> None:
    tokens = VirtualTokens(prefix=2, infix=1)
    P, Q, X = PREFIX_START, PREFIX_START + 1, INFIX_START
    assert tokens.place([1, 7, 8, 9], keep=1, prompt=3) == [1, P, Q, 7, 8, X, 9]
    assert tokens.place([7, 8]) == [P, Q, 7, 8, X]
    assert tokens.place([7, 8], prompt=0) == [P, Q, X, 7, 8]
    assert tokens.place([1, 7], keep=1, prompt=0) == [1, P, Q, X, 7]
    assert tokens.place([-100, 8, 9], prompt=1, fill=-100) == [-100, -100, -100, -100, 8, 9]
    assert tokens.total == 3


def test_generation_by_a_model_whose_layers_are_all_recurrent():
    """Its cache counts no tokens."""
    config = transformers.MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=99
    )
    model = transformers.MambaForCausalLM(config).eval().double()
    adapters = attach(model, PrefixEmbedding(prefix_length=3))
    ids = placed(adapters.virtual_tokens)
    result = model.generate(
        ids,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = logits(model, result.sequences[:, :-1])[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(result.logits, 1), expected)
