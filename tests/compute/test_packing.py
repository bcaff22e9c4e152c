"""Packed batches have the same loss and gradients as separate examples."""

import dataclasses
import random
import re
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.compute.adapted import TEXT
from lorakit.compute.batching import PACKED_STEP, attention_windows
from lorakit.compute.computation import choose_computation
from lorakit.compute.objective import LanguageModellingLoss, confirm_loss_path
from lorakit.compute.trials import shortened, why_not_packed
from lorakit.data import packing
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.tasks import LanguageExample

PACKABLE = ["llama", "qwen3", "phi3", "gemma", "gpt2", "opt", "gpt-neox", "smollm3", "granite"]
VOCABULARY = 20


def example(ids, prompt, mask=None):
    mask = mask or [i >= prompt for i in range(len(ids))]
    return LanguageExample(
        input_ids=ids, loss_mask=mask, prompt_length=prompt, prompt="", completion=""
    )


@st.composite
def forests(draw):
    """Generate examples that share prefixes of any length, also in completions, and duplicates.

    The targets are one or several runs of tokens, such as the assistant's turns of a conversation.
    """
    token = st.integers(1, VOCABULARY - 1)
    stems = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=3))
    examples = []
    for _ in range(draw(st.integers(1, 7))):
        stem = draw(st.sampled_from(stems))
        tail = draw(st.lists(token, min_size=1, max_size=6))
        ids = [*stem, *tail]
        edges = draw(st.sets(st.integers(1, len(ids) - 1), min_size=1, max_size=5))
        mask = [sum(edge <= i for edge in edges) % 2 == 1 for i in range(len(ids))]
        examples.append(example(ids, max(edges), mask))
    return examples


def conversations():
    """Return conversations of several assistant turns.

    A prefix of one is another, one answer is another user's words, and two end in the same answer.
    """
    turns = (([1, 5, 3], [8, 2]), ([7, 9], [4, 2]), ([6, 3, 3], [9, 9, 2]))
    other = (([1, 5, 3], [8, 2]), ([7, 7], [5, 2]), ([6, 3, 3], [9, 9, 2]))
    questions = (([1, 5, 3, 8, 2, 7], [9, 4, 2]),)
    examples = []
    for rows in (turns, turns[:2], other, questions, turns[1:]):
        ids = [token for user, assistant in rows for token in (*user, *assistant)]
        mask = [
            target
            for user, assistant in rows
            for target in (*[False] * len(user), *[True] * len(assistant))
        ]
        examples.append(example(ids, len(ids) - len(rows[-1][1]), mask))
    return examples


def loss_and_gradients(model, batch):
    loss = LanguageModellingLoss(path="fused").loss_sum(model, batch)
    model.zero_grad()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def in_float64(model):
    """Disable the float32 casts in Llama's norm and eager attention, whose rounding would hide an error."""
    model.set_attn_implementation("sdpa")
    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            twin = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
            twin.load_state_dict(norm.state_dict())
            model.set_submodule(name, twin.requires_grad_(False))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def adapted(request):
    model = tiny_models.build(request.param, "causal-lm").double()
    in_float64(model)
    handle = lorakit.attach(
        model, lorakit.LoRA(rank=2, targets="all-linear"), dtype=torch.float64, seed=0
    )
    for parameter in handle.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@settings(max_examples=40)
@given(examples=forests())
def test_loss_and_all_gradients_are_those_of_the_separate_examples(adapted, cut, examples):
    with pytest.MonkeyPatch.context() as patch:
        if cut:  # every branch
            patch.setattr(packing, "ROW_LENGTH", 0)
            patch.setattr(packing, "PAIRS_OF_A_COPY", 0)
        batch = pack(examples, pad_id=0)
    packed, gradients = loss_and_gradients(adapted, batch)
    parts = [loss_and_gradients(adapted, collate([e], pad_id=0)) for e in examples]
    assert packed == pytest.approx(sum(loss for loss, _ in parts), rel=1e-12)
    separate = [sum(part[1][i] for part in parts) for i in range(len(gradients))]
    scale = max(gradient.norm() for gradient in separate)
    for ours, theirs in zip(gradients, separate, strict=True):
        assert (ours - theirs).norm() <= 1e-11 * scale


def test_padding_changes_neither_the_loss_nor_a_gradient(adapted):
    exact, padded = (pack(conversations(), pad_id=0, step=step) for step in (1, PACKED_STEP))
    assert padded["input_ids"].numel() > exact["input_ids"].numel()
    loss, gradients = loss_and_gradients(adapted, exact)
    same_loss, same_gradients = loss_and_gradients(adapted, padded)
    assert same_loss == pytest.approx(loss, rel=1e-12)
    for ours, theirs in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shared", "rows", "tokens"),
    [
        (1, 16, 16 * 1023),  # a token that begins every text: one copy for each
        (800, 1, 800 + 16 * 223),  # a prompt
    ],
)
def test_a_short_prefix_does_not_join_a_batch_in_one_long_row(shared, rows, tokens):
    start, targets = [1] * shared, [*[False] * 900, *[True] * 124]
    examples = [example([*start, *[2 + i] * (1024 - shared)], 900, targets) for i in range(16)]
    batch = pack(examples, pad_id=0)
    assert len(batch["input_ids"]) == rows
    assert (batch["input_ids"] != 0).sum() == tokens
    assert batch["target_weights"].sum() == 16 * 124


def test_a_target_in_a_copied_prefix_counts_once_for_each_example():
    """The examples train on all their tokens, and share the first two of 600."""
    ids = [[1, 1, *[2 + i] * 598] for i in range(4)]
    batch = pack([example(row, 1) for row in ids], pad_id=0)
    assert len(batch["input_ids"]) == 4
    shared = batch["targets"] == 1
    assert batch["target_weights"][shared].tolist() == [4]
    assert batch["target_weights"].sum() == 4 * 599


def test_random_batches_have_few_sizes():
    """A CPU library caches kernels for each: 300 batches have at most 16 sizes."""
    draw = random.Random(0)
    sizes = set()
    for _ in range(300):
        lengths = [draw.randint(20, 80) for _ in range(8)]
        trees = [example([t + 1, *[t] * (n - 1)], 1) for t, n in enumerate(lengths)]
        sizes.add(pack(trees, pad_id=0, step=PACKED_STEP)["input_ids"].numel())
    assert 1 < len(sizes) <= 16


@pytest.mark.parametrize("arch", PACKABLE)
def test_conversations_have_the_loss_and_gradients_of_separate_examples(arch):
    """In float32, up to rounding: 1e-5 of the loss and of the largest gradient."""
    model = tiny_models.build(arch, "causal-lm")
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="all-linear"), seed=0)
    for parameter in handle.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    batch = pack(conversations(), pad_id=0)
    assert (batch["input_ids"] != 0).sum() < 0.7 * sum(map(len, conversations()))
    packed, gradients = loss_and_gradients(model, batch)
    parts = [loss_and_gradients(model, collate([e], pad_id=0)) for e in conversations()]
    assert packed == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)
    separate = [sum(part[1][i] for part in parts) for i in range(len(gradients))]
    scale = max(gradient.norm() for gradient in separate)
    for ours, theirs in zip(gradients, separate, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * scale


@settings(max_examples=60)
@given(examples=forests())
def test_every_token_before_a_target_sees_its_own_example_up_to_itself(examples):
    batch = pack(examples, pad_id=0)
    ids, positions, mask = batch["input_ids"], batch["position_ids"], batch["attention_mask"][:, 0]
    seen = set()
    for r in range(len(ids)):
        for at in range(ids.shape[1]):
            visible = mask[r, at].nonzero().flatten()
            assert positions[r, visible].tolist() == list(range(len(visible)))
            seen.add(tuple(ids[r, visible].tolist()))
    prefixes = set()
    for e in examples:
        last = max(i for i, is_target in enumerate(e.loss_mask) if is_target)
        prefixes |= {tuple(e.input_ids[:end]) for end in range(1, last + 1)}
    assert prefixes <= seen
    assert seen - prefixes <= {(0,)}  # padding sees itself
    assert int(batch["target_weights"].sum()) == sum(sum(e.loss_mask) for e in examples)


def test_a_shared_prompt_is_computed_once():
    prompt = list(range(1, 19))
    batch = pack([example([*prompt, 1, t, t], 18) for t in (3, 4, 5)], pad_id=0)
    assert (batch["input_ids"] != 0).sum() == 18 + 1 + 3 * 1


def test_tokens_without_a_target_behind_them_stand_in_no_row():
    turn = LanguageExample(
        input_ids=[1, 2, 3, 4, 5, 6],
        loss_mask=[False, False, True, True, False, False],
        prompt_length=2,
        prompt="",
        completion="",
    )
    batch = pack([turn], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["targets"].tolist() == [3, 4]
    assert batch["target_at"].tolist() == [1, 2]


def test_an_example_without_targets_is_its_first_token():
    batch = pack([dataclasses.replace(example([4, 5], 1), loss_mask=[False, False])], pad_id=0)
    assert batch["input_ids"].tolist() == [[4]]
    assert not len(batch["targets"])


def test_long_trees_stand_in_rows_of_like_length():
    lengths = (500, 490, 300, 280, 260, 240)  # four rows of 540; three rows would need 750
    trees = [example([t, *[t] * (n - 1)], 1) for t, n in enumerate(lengths, start=1)]
    batch = pack(trees, pad_id=0)
    assert batch["input_ids"].shape[1] <= 1024
    assert (batch["input_ids"] != 0).sum() == sum(n - 1 for n in lengths)
    assert batch["input_ids"].numel() <= 1.05 * sum(lengths)


def test_trees_of_one_length_stand_in_rows_without_room_between_them():
    """Two trees together are longer than half of the total; three rows, filled in order, would be a third empty."""
    trees = [example([t] * n, 1) for t, n in enumerate((330, 331, 334, 348), start=1)]
    batch = pack(trees, pad_id=0, step=32)
    assert batch["input_ids"].shape == (4, 352)


def test_a_tree_longer_than_a_row_is_a_row():
    batch = pack([example([1] * 1500, 1)], pad_id=0)
    assert batch["input_ids"].shape == (1, 1499)


def test_widths_are_multiples_of_a_step():
    examples = [example([1, 5, 3, 8, 2], 2), example([1, 5, 4], 2)]
    assert pack(examples, pad_id=0, step=32)["input_ids"].shape == (1, 32)
    assert collate(examples, pad_id=0, step=8)["labels"].shape == (2, 8)


@pytest.mark.parametrize("arch", PACKABLE)
def test_these_architectures_pack(arch):
    model = tiny_models.build(arch, "causal-lm")
    assert why_not_packed(model, example([1, 5, 3, 8, 2, 7, 9, 4, 6], 5)) == ""


ANY_EXAMPLE = {
    "several turns": conversations()[0],
    "an answer of one token": example([1, 5, 3], 2),
    "the shortest": example([4, 7], 1),
    "one token alone": example([4], 1, [False]),
    "no prompt": example([4, 7, 5], 0, [False, True, True]),
    "no completion": example([4, 7, 5], 3, [False, True, True]),
    "one token repeated": example([0] * 6, 3),
    "the same in both directions": example([1, 2, 5, 9, 5], 2),
    "equal ends": example([1, 2, 5, 3, 9, 5], 2),
    "a token after the last target": example(
        [1, 2, 5, 3, 9], 2, [False] * 2 + [True] * 2 + [False]
    ),
    "no target": example([1, 2, 5, 3], 2, [False] * 4),
}


@pytest.mark.parametrize("name", ANY_EXAMPLE)
def test_the_trial_works_for_any_example(name):
    model = tiny_models.build("llama", "causal-lm")
    assert why_not_packed(model, ANY_EXAMPLE[name]) == ""
    if len(ANY_EXAMPLE[name]) > 1:  # the attention of equal tokens does not depend on their number
        assert "differ" in why_not_packed(careless(model), ANY_EXAMPLE[name])


@pytest.mark.parametrize("arch", PACKABLE)
def test_the_structure_of_these_allows_packing(arch):
    choice = choose_computation(
        tiny_models.build(arch, "causal-lm"), TEXT, training=True, packing=True
    )
    assert choice.packed
    assert choice.note == ""


@pytest.mark.parametrize(("arch", "kind"), [("bloom", "bloom"), ("GPTNeo", "gpt_neo")])
def test_these_do_not_and_say_why(arch, kind):
    """A trial shorter than the window of GPT-Neo's local layers would not show that they count it by row."""
    model = tiny_models.build(arch, "causal-lm")
    choice = choose_computation(model, TEXT, training=True, packing=True)
    assert not choice.packed
    assert choice.note == f"batches padded, not packed: {kind} counts positions by row"


@pytest.mark.parametrize("name", ["Lfm2", "Qwen3Next", "Bamba", "FalconH1"])
def test_a_convolution_over_tokens_is_not_packed(name):
    """A trial compares hidden states, in which a small convolution does not show."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1}
    layers = {"layer_types": ["conv", "full_attention"] * 2} if name == "Lfm2" else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **layers, **mamba, num_experts=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    choice = choose_computation(model, TEXT, training=True, packing=True)
    assert not choice.packed
    assert re.fullmatch(r"batches padded, .*conv.* reads the tokens beside each token", choice.note)


def decoder(config_class, dtype, **settings):
    """Return a tiny decoder of transformers."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes, **heads, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        ("MistralConfig", {"sliding_window": 64}),
        ("Gemma3TextConfig", {"sliding_window": 64, "head_dim": 8, "query_pre_attn_scalar": 8}),
    ],
)
def test_a_window_shorter_than_an_example_is_read_from_the_configuration(
    config_class, settings, dtype
):
    """Its effect on the hidden states is smaller than the rounding of a deep model in bfloat16."""
    model = decoder(config_class, dtype, **settings)
    ids = random.Random(0).choices(range(3, 99), k=65)
    assert why_not_packed(model, example(ids[:64], 20)) == ""
    assert why_not_packed(model, example(ids, 20), example(ids[:24], 16)) == (
        "its attention reaches back 64 tokens, and the longest example has 65"
    )


@pytest.mark.parametrize(
    ("kind", "settings", "windows"),
    [
        ("llama", {}, set()),
        ("mistral", {"sliding_window": 64}, {64}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, set()),
        ("gemma2", {"sliding_window": 64, "layer_types": ["full_attention"] * 26}, set()),
        ("llama4_text", {"attention_chunk_size": 32}, {32}),
        ("gpt_oss", {}, {128}),
        ("gemma4_text", {"sliding_window": 64}, {64}),  # has fields that differ between layers
    ],
)
def test_the_windows_of_a_configuration(kind, settings, windows):
    config = transformers.AutoConfig.for_model(kind, **settings)
    assert attention_windows(SimpleNamespace(config=config)) == windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_leaks_into_the_next_completion_is_found_out_in_long_ones_too(dtype):
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = decoder("Lfm2Config", dtype, layer_types=kinds, block_auto_adjust_ff_dim=False)
    longest = example(random.Random(0).choices(range(3, 99), k=408), 8)
    assert "differ" in why_not_packed(model, longest, shortened(longest))


@pytest.mark.parametrize(
    ("one", "ids", "prompt"),
    [
        (example(list(range(40)), 30), [*range(16), *range(30, 38)], 16),
        (example([4, 7, 5], 0, [False, True, True]), [4, 7, 5], 1),
        (example([4, 7, 5], 3, [False, True, True]), [4, 7, 5], 2),
        (example([4], 1, [False]), [4], 1),
    ],
)
def test_a_shortened_example_has_the_start_of_prompt_and_completion(one, ids, prompt):
    short = shortened(one)
    assert (short.input_ids, short.prompt_length) == (ids, prompt)
    assert short.loss_mask == [i >= prompt for i in range(len(ids))]


def careless(model):
    """Return `model`, changed to ignore the mask."""
    forward = model.model.forward

    def without_mask(input_ids, attention_mask=None, position_ids=None, **kwargs):
        return forward(input_ids, position_ids=position_ids, **kwargs)

    model.model.forward = without_mask
    return model


def test_a_model_that_ignores_the_mask_is_found_out():
    model = careless(tiny_models.build("llama", "causal-lm"))
    assert "differ" in why_not_packed(model, example([1, 5, 3, 8, 2, 7, 9, 4, 6], 5))


@pytest.mark.parametrize("path", ["fused", "own head", "whole logits"])
def test_every_path_of_the_loss_takes_packed_batches(path):
    model = tiny_models.build("llama", "causal-lm")
    examples = [example([1, 5, 3, 8, *tail], 3) for tail in ([2], [2, 7], [9, 9, 4])]
    objective = confirm_loss_path(model, collate(examples[:2], pad_id=0), label_smoothing=0.1)
    objective.path = path
    packed, padded = pack(examples, pad_id=0), collate(examples, pad_id=0)
    assert objective.count(packed) == objective.count(padded)
    torch.testing.assert_close(
        objective.loss_sum(model, packed), objective.loss_sum(model, padded), rtol=1e-5, atol=1e-5
    )
