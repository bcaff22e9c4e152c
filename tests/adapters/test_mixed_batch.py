"""Rows are rows: a layer sees whole rows in order, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.method import LoRA

Rows = list[str | None]


def adapted(model: nn.Module, targets: str | tuple[str, ...], **options) -> Adapters:
    """Attach three adapters of different ranks and scalings."""
    for seed, name in enumerate(("a", "b", "c")):
        method = LoRA(rank=seed + 1, alpha=3.0 + seed, targets=targets, **options)
        adapters = attach(model, method, name=name)
        randomise(adapters, name, seed=seed)
    adapters.activate(None)
    return adapters


def separately(adapters: Adapters, rows: list, call: Callable[[], Tensor], axis: int = 0) -> Tensor:
    """The rows of one run for each adapter."""
    outputs = []
    for i, choice in enumerate(rows):
        adapters.activate(choice)
        outputs.append(call().select(axis, i))
    adapters.activate(None)
    return torch.stack(outputs, dim=axis)


def refuses(adapters: Adapters, rows: list, call: Callable[[], Tensor], name: str) -> None:
    with adapters.per_sample(rows), pytest.raises(AdapterStateError, match=f"'{name}' cannot use"):
        call()


# --- the number of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch"), [(["a"], 3), (["a", "a"], 4), (["a", "b"], 4), (["a", "b"], 1), ([], 2)]
)
def test_another_number_of_rows_is_an_error(rows: Rows, batch: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = adapted(model, "0")
    with (
        adapters.per_sample(rows),
        pytest.raises(AdapterStateError, match=rf"names {len(rows)} rows.*batch of {batch}"),
    ):
        model(torch.randn(batch, 4))


@pytest.mark.parametrize("batch", [2, 6])
def test_a_stated_repeat(batch: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(batch, 4)
    adapters = adapted(model, "0")
    rows = [name for name in ("a", "b") for _ in range(batch // 2)]
    with adapters.per_sample(["a", "b"], repeat=3):
        actual = model(x)
    torch.testing.assert_close(actual, separately(adapters, rows, lambda: model(x)))
    with adapters.per_sample(["a", "b"], repeat=3), pytest.raises(AdapterStateError):
        model(torch.randn(4, 4))


def test_beams_are_repeats_that_generate_states() -> None:
    model = tiny_models.build("llama")
    adapters = adapted(model, "all-linear")
    ids = torch.arange(3, 17).view(2, 7)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generate() -> Tensor:
        return model.generate(ids, num_beams=3, num_return_sequences=2, **options)

    with adapters.per_sample(["a", "b"]):
        actual = generate()
    expected = separately(adapters, ["a", "a", "b", "b"], generate)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("gradients", [False, True])
def test_empty_batches(shape: tuple[int, ...], gradients: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(shape, requires_grad=gradients)
    adapters = adapted(model, "0")
    with torch.set_grad_enabled(gradients):
        adapters.activate("a")
        assert model(x).shape == shape
        for rows in ([], ["a"] * shape[0], ["a", "b"][: shape[0]]):
            if len(rows) == shape[0]:
                with adapters.per_sample(rows):
                    output = model(x)
                    assert output.shape == shape
        with adapters.per_token([]), pytest.raises(AdapterStateError, match="0 tokens"):
            model(torch.randn(2, 4, 4))
        with adapters.per_token([]):
            assert model(x).shape == shape
    if gradients:
        output.sum().backward()


# --- layers that see something else than rows ----------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts: every token goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        choice = self.gate(tokens).argmax(-1)
        output = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            routed = (choice == i).nonzero().flatten().flip(0)
            output = output.index_copy(0, routed, expert(tokens[routed]))
        return output.view_as(x)


@pytest.mark.parametrize("seed", range(4))
def test_experts_on_routed_tokens(seed: int) -> None:
    """The number of routed tokens may equal the number of rows, or a multiple."""
    torch.manual_seed(seed)
    model, x = Experts(), torch.randn(2, 2, 4)
    adapters = adapted(model, ("experts.0", "experts.1"))
    refuses(adapters, ["a", "b"], lambda: model(x), r"experts\.\d")
    with adapters.per_sample(["a", "a"]):  # the same for all rows
        actual = model(x)
    torch.testing.assert_close(actual, separately(adapters, ["a", "a"], lambda: model(x)))


@pytest.mark.parametrize("gradients", [False, True])
def test_rows_of_lora_around_a_row_of_dora(gradients: bool) -> None:
    """The rows of LoRA are gathered into a copy of the output, and LoRA adds its product to that copy in place."""
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 2, 4)
    adapters = adapted(model, ("0",))
    attach(model, LoRA(rank=2, targets=("0",), dora=True), name="dora")
    randomise(adapters, "dora", seed=3)
    rows = ["a", "dora", "a"]
    with torch.set_grad_enabled(gradients):
        with adapters.per_sample(rows):
            actual = model(x)
        torch.testing.assert_close(actual, separately(adapters, rows, lambda: model(x)))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("length", [2, 4, 3])
def test_sequence_first_inputs(length: int) -> None:
    model, x = SequenceFirst(), torch.randn(2, length, 4)
    adapters = adapted(model, "layer")
    refuses(adapters, ["a", "b"], lambda: model(x), "layer")
    with adapters.per_sample(["b", "b"]):
        actual = model(x)
    torch.testing.assert_close(actual, separately(adapters, ["b", "b"], lambda: model(x)))


def test_square_batches_are_known_once_rows_came_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = adapted(model, "0")
    rows: Rows = ["a", "b"]
    square = torch.randn(2, 2, 4)
    refuses(adapters, rows, lambda: model(square), "0")
    with adapters.per_sample(rows):
        model(torch.randn(2, 3, 4))
        actual = model(square)
    torch.testing.assert_close(actual, separately(adapters, rows, lambda: model(square)))


def encoder(*, batch_first: bool) -> Adapters:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    return adapted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "mlp")


@pytest.mark.parametrize("length", [2, 4, 5])
def test_relative_positions_of_t5(length: int) -> None:
    """Its input (queries, keys) may have as many entries as the batch has rows."""
    model = tiny_models.build("t5")
    adapters = adapted(model, "relative_attention_bias")
    ids = torch.arange(3, 3 + 2 * length).view(2, length)

    def call() -> Tensor:
        return model(input_ids=ids, decoder_input_ids=ids).logits

    refuses(adapters, ["a", "b"], call, r"encoder\.block\.0.*relative_attention_bias")
    with adapters.per_sample(["a", "a"]):
        actual = call()
    torch.testing.assert_close(actual, separately(adapters, ["a", "a"], call))


@pytest.mark.parametrize("batch", [1, 2])
def test_relative_embeddings_of_deberta(batch: int) -> None:
    """They have one row, whatever the batch has."""
    model = tiny_models.build("deberta-v2")
    adapters = adapted(model, "query_proj")
    inputs = {name: t[:batch] for name, t in tiny_models.example_batch("deberta-v2", model).items()}

    def call() -> Tensor:
        return model(**inputs).logits

    if batch > 1:
        refuses(adapters, ["a", "b"], call, r".*query_proj")
    with adapters.per_sample(["b"] * batch):
        actual = call()
    torch.testing.assert_close(actual, separately(adapters, ["b"] * batch, call))


def test_positions_that_all_rows_share() -> None:
    model = tiny_models.build("gpt2")
    adapters = adapted(model, "wpe")
    ids = torch.arange(3, 7).view(2, 2)  # as many positions as rows
    refuses(adapters, ["a", "b"], lambda: model(ids).logits, r"transformer\.wpe")


def test_tokens_in_one_axis_of_a_known_model() -> None:
    """OPT's feed-forward layers see them so, in the order of the rows."""
    model = tiny_models.build("opt")
    adapters = adapted(model, "all-linear")
    ids = torch.arange(3, 17).view(2, 7)
    rows: Rows = ["a", "c"]
    with adapters.per_sample(rows):
        actual = model(ids).logits
    torch.testing.assert_close(
        actual, separately(adapters, rows, lambda: model(ids).logits), atol=1e-5, rtol=1e-4
    )


class Pooling(nn.Module):
    """A module with parameters of its own that mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x @ self.scores).softmax(-1).unsqueeze(-1)


def test_a_trained_module_that_mixes_tokens_is_refused_by_token() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Pooling()), torch.randn(2, 3, 4)
    adapters = attach(model, LoRA(rank=1, targets="0", train_modules="1"), name="t")
    attach(model, LoRA(rank=1, targets="0"), name="a")
    randomise(adapters)
    for active in (None, "t"):
        adapters.activate(active)
        with (
            adapters.per_token([("t", 2), (None, 4)]),
            pytest.raises(AdapterStateError, match=r"'1' cannot use.*mix the tokens"),
        ):
            model(x)
    rows: Rows = ["t", "a"]
    with adapters.per_sample(rows):
        actual = model(x)
    torch.testing.assert_close(actual, separately(adapters, rows, lambda: model(x)))


def test_images_are_not_rows() -> None:
    """Both images are in the first row."""
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "image_size": 8, "patch_size": 4},
    )
    text = LlamaConfig(
        **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        num_attention_heads=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        **{"image_token_index": 98, "image_seq_length": 4, "vision_feature_layer": -1},
    )
    model = LlavaForConditionalGeneration(config).eval()
    adapters = adapted(model, ("linear_1", "q_proj"))
    image = 98
    patches = [image] * 4
    ids = torch.tensor([[1, *patches, 5, *patches, 6, 7], [1, *range(5, 16)]])
    pixels = torch.randn(2, 3, 8, 8)

    def call() -> Tensor:
        return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits

    refuses(adapters, ["a", "b"], call, r"model\.vision_tower.*")


# --- products by segments ------------------------------------------------------------------------------

MIXED = ["a", None, {"a": 0.5, "c": -2.0}, "b", "a", "c"]


def mixed_model(**options) -> tuple[nn.Module, Adapters, Tensor]:
    """Adapters of different ranks, scalings and targets on two layers."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    targets = {"a": ("0", "2"), "b": "0", "c": "2"}
    for seed, (name, target) in enumerate(targets.items()):
        method = LoRA(rank=seed + 1, alpha=1.5 + seed, targets=target, **options)
        adapters = attach(model, method, name=name, dtype=torch.float64)
        randomise(adapters, name, seed=seed)
    adapters.activate(None)
    return model, adapters, torch.randn(6, 3, 8, dtype=torch.float64, requires_grad=True)


def by_row(adapters: Adapters):
    return adapters.per_sample(MIXED)


def by_token(adapters: Adapters):
    return adapters.per_token([(choice, 3) for choice in MIXED])


@pytest.mark.parametrize("mixed", [by_row, by_token])
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["low-rank", "dora"])
def test_forward_and_backward_equal_separate_runs(mixed, options) -> None:
    model, adapters, x = mixed_model(**options)
    choices = MIXED if not options else ["a", None, "b", "b", "a", "c"]  # DoRA cannot be blended
    parameters = [p for name in adapters.names for p in adapters.trainable_parameters(name)]
    expected = separately(adapters, choices, lambda: model(x))
    expected_gradients = torch.autograd.grad(expected.tanh().sum(), (x, *parameters))
    block = (
        adapters.per_sample(choices)
        if mixed is by_row
        else adapters.per_token([(choice, 3) for choice in choices])
    )
    with block:
        actual = model(x)
        gradients = torch.autograd.grad(actual.tanh().sum(), (x, *parameters))
        with torch.no_grad():
            without = model(x)
        with torch.inference_mode():
            inference = model(x)
    tight = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(actual, expected, **tight)
    torch.testing.assert_close(without, expected, **tight)
    torch.testing.assert_close(inference, expected, **tight)
    torch.testing.assert_close(gradients, expected_gradients, **tight)


def test_a_mixed_batch_in_bfloat16() -> None:
    """Each token differs from its separate run by at most one rounding of each product (2 ** -8)."""
    model, adapters, x = mixed_model()
    model.bfloat16()
    x = x.detach().bfloat16()
    expected = separately(adapters, MIXED, lambda: model(x))
    with adapters.per_sample(MIXED):
        actual = model(x)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * 2**-8 * scale)


def test_spans_that_cross_rows() -> None:
    model, adapters, x = mixed_model()
    spans = [("a", 4), (None, 1), ("c", 0), ("b", 10), ({"a": 2.0, "c": 1.0}, 3)]
    by_token = [choice for choice, count in spans for _ in range(count)]
    expected = separately(adapters, by_token, lambda: model(x.flatten(0, 1)))
    with adapters.per_token(spans):
        actual = model(x)
    torch.testing.assert_close(actual.flatten(0, 1), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("total", [17, 19])
def test_another_number_of_tokens_is_an_error(total: int) -> None:
    model, adapters, x = mixed_model()
    with (
        adapters.per_token([("a", total)]),
        pytest.raises(AdapterStateError, match=rf"names {total} tokens.*18 tokens"),
    ):
        model(x)


@pytest.mark.parametrize("spans", ["a", [("a", -1)], [("a", 1.0)], ["ab"], [("a",)], [("d", 1)]])
def test_spans_that_cannot_be(spans) -> None:
    _, adapters, _ = mixed_model()
    with pytest.raises(AdapterStateError), adapters.per_token(spans):
        raise AssertionError("the block must not be entered")


def test_an_adapter_that_mixes_tokens_is_refused_by_token() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1))
    adapters = adapted(model, "0")
    x = torch.randn(2, 3, 4)
    with (
        adapters.per_token([("a", 3), ("b", 3)]),
        pytest.raises(AdapterStateError, match="'0' cannot use"),
    ):
        model(x)
    rows: Rows = ["a", "b"]
    with adapters.per_sample(rows):
        actual = model(x)
    torch.testing.assert_close(actual, separately(adapters, rows, lambda: model(x)))


@pytest.mark.parametrize("mixed", [by_row, by_token])
@pytest.mark.parametrize("gradients", [False, True])
def test_nan_of_one_adapter_stays_in_its_rows(mixed, gradients: bool) -> None:
    model, adapters, x = mixed_model()
    with torch.no_grad():
        for parameter in adapters.trainable_parameters("b"):
            parameter.fill_(float("nan"))
    with torch.set_grad_enabled(gradients), mixed(adapters):
        output = model(x)
    assert output[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert output[others].isfinite().all()
    if gradients:
        output.sum().backward()
        assert x.grad is not None
        assert x.grad[others].isfinite().all()
        for name in ("a", "c"):
            assert all(p.grad.isfinite().all() for p in adapters.trainable_parameters(name))


def test_rows_of_a_bottleneck_and_lora() -> None:
    model = tiny_models.build("llama")
    attach(model, BottleneckAdapter(kind="houlsby", size=3), name="wide")
    adapters = attach(model, LoRA(rank=2, targets="all-linear"), name="thin")
    randomise(adapters)
    ids = torch.arange(3, 24).view(3, 7)
    rows: Rows = ["wide", None, "thin"]
    with adapters.per_sample(rows):
        actual = model(ids).logits
    torch.testing.assert_close(
        actual, separately(adapters, rows, lambda: model(ids).logits), atol=1e-5, rtol=1e-4
    )


def test_a_packed_row_by_token() -> None:
    """Two sequences in one row, with positions and a mask that separate them."""
    model = tiny_models.build("llama")
    adapters = adapted(model, "all-linear")
    lengths, choices = (4, 3), ("a", {"b": 0.5, "c": 1.5})
    ids = torch.arange(3, 10)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    visible = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths])[None, None]
    mask = (1 - visible) * torch.finfo().min
    with adapters.per_token(list(zip(choices, lengths, strict=True))):
        packed = model(ids, position_ids=positions, attention_mask=mask).logits[0]
    for choice, piece, output in zip(
        choices, ids[0].split(lengths), packed.split(lengths), strict=True
    ):
        adapters.activate(choice)
        torch.testing.assert_close(output, model(piece[None]).logits[0], atol=1e-5, rtol=1e-4)
