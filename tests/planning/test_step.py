"""The predicted memory of a step is compared with PyTorch's allocations in the real step."""

from __future__ import annotations

import contextlib
import functools

import pytest
import tiny_models
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from lorakit.compute.objective import ClassificationLoss, LanguageModellingLoss
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.models.faster import make_faster
from lorakit.ops.linear_cross_entropy import linear_cross_entropy
from lorakit.planning import step
from lorakit.planning.ledger import Ledger
from lorakit.planning.shape import new_mode, planning
from lorakit.planning.step import run_step, shorten
from lorakit.tasks import LabelledExample, LanguageExample
from lorakit.training.setup import enable_gradient_checkpointing


def decoder(arch: str, layers: int = 6, **settings):
    config = tiny_models.ARCHITECTURES[arch]()
    config.update(settings)
    config.update({"n_layer" if arch == "gpt2" else "num_hidden_layers": layers})
    config.max_position_embeddings = 256
    return AutoModelForCausalLM.from_config(config)


def packed_batch(count: int = 4, length: int = 48, shared: int = 12):
    examples = [
        LanguageExample(
            input_ids=[*range(5, 5 + shared), number + 40, *[7] * (length - shared - 1)],
            prompt="",
            completion="",
            loss_mask=[position > shared for position in range(length)],
            prompt_length=shared,
        )
        for number in range(count)
    ]
    return pack(examples, 0, step=32)


def labelled_batch(count: int = 8, length: int = 40):
    examples = [
        LabelledExample(input_ids=[5] * length, prompt="", completion="", label=number % 2)
        for number in range(count)
    ]
    return collate(examples, 0)


def planned(make, method, objective, batch, *, whole: bool = False, checkpointing: bool = False):
    fake = new_mode()
    with planning(fake):
        model = make()
        lorakit.attach(model, method)
        if checkpointing:
            enable_gradient_checkpointing(model)
        model.train()
        make_faster(model)
        blocks = [] if whole else shorten(model)
        return run_step(
            model,
            blocks,
            objective,
            batch,
            autocast=contextlib.nullcontext(),
            accumulates=False,
        )


def allocated(make, method, objective, batch) -> int:
    """Return the peak memory that PyTorch's allocator allocates in the same step, measured by the profiler."""
    model = make()
    lorakit.attach(model, method)
    model.train()
    make_faster(model)
    objective.loss_sum(model, batch).backward()  # fill caches
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective.loss_sum(model, batch).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


NARROW_VALUES = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
CASES = {
    "llama, q and v": (
        lambda: decoder("llama"),
        lorakit.LoRA(rank=4),
        LanguageModellingLoss(path="fused"),
        packed_batch,
    ),
    "gpt2, all linear, whole logits": (
        lambda: decoder("gpt2"),
        lorakit.LoRA(rank=4, targets="all-linear"),
        LanguageModellingLoss(path="whole logits"),
        packed_batch,
    ),
    "llama, full": (
        lambda: decoder("llama"),
        lorakit.FullFineTuning(),
        LanguageModellingLoss(path="whole logits"),
        packed_batch,
    ),
    "mixtral, experts": (
        lambda: decoder("mixtral"),
        lorakit.LoRA(rank=4),
        LanguageModellingLoss(path="fused"),
        packed_batch,
    ),
    "deepseek, narrow values": (
        lambda: AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**NARROW_VALUES)),
        lorakit.LoRA(rank=4, targets="all-linear"),
        LanguageModellingLoss(path="fused"),
        packed_batch,
    ),
    "falcon, a layer class of its own": (
        lambda: AutoModelForCausalLM.from_config(tiny_models.RELATIVES["Falcon"]()),
        lorakit.LoRA(rank=4),
        LanguageModellingLoss(path="fused"),
        packed_batch,
    ),
    "bert, dropout": (
        lambda: AutoModelForSequenceClassification.from_config(tiny_models.ARCHITECTURES["bert"]()),
        lorakit.LoRA(rank=4, targets="attention", dropout=0.1),
        ClassificationLoss(),
        labelled_batch,
    ),
}


CHECKPOINTED = ("llama, q and v", "mixtral, experts", "deepseek, narrow values", "bert, dropout")


@functools.cache
def shortened(name: str, checkpointing: bool = False):
    make, method, objective, batch = CASES[name]
    return planned(make, method, objective, batch(), checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_matches_the_allocator(name):
    make, method, objective, batch = CASES[name]
    peak = sum(shortened(name).peak.values())
    measured = allocated(make, method, objective, batch())
    # The allocator includes the workspace of operations.
    assert (
        0.9 * measured
        < peak
        < (1.1 if "full" not in name and "q and v" not in name else 1.04) * measured
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in CASES), *((name, True) for name in CHECKPOINTED)],
)
def test_a_shortened_model_equals_the_whole_one(name, checkpointing):
    make, method, objective, batch = CASES[name]
    short = shortened(name, checkpointing)
    whole = planned(make, method, objective, batch(), whole=True, checkpointing=checkpointing)
    assert sum(short.peak.values()) == pytest.approx(sum(whole.peak.values()), rel=0.01)
    assert short.work.operations == pytest.approx(whole.work.operations, rel=1e-6)
    assert short.work.drawn == pytest.approx(whole.work.drawn, rel=1e-6)
    assert short.work.calls == pytest.approx(whole.work.calls, rel=0.02)


def test_products_match_the_formula():
    width, inner, layers, vocabulary = 256, 1024, 6, 99
    batch = packed_batch()
    rows = batch["input_ids"].numel()
    step = planned(
        lambda: decoder("llama", hidden_size=width, intermediate_size=inner, head_dim=64),
        lorakit.LoRA(rank=1),
        LanguageModellingLoss(path="fused"),
        batch,
    )
    # q, o: width squared; k, v: half; gate, up, down.
    weights = layers * (3 * width * width + 3 * width * inner)
    needed = 4 * weights * rows + 4 * vocabulary * width * len(batch["targets"])
    # Attention and LoRA add to this; the first block needs no gradient of its input.
    assert 0.9 * needed < step.work.operations < 1.2 * needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_of_experts_count(dtype):
    def of(experts: int):
        def make():
            return decoder("mixtral", num_experts_per_tok=experts, dtype=dtype)

        return planned(make, lorakit.LoRA(rank=1), LanguageModellingLoss(path="fused"), batch)

    batch, layers, width, inner = packed_batch(), 6, 32, 64
    more = of(3).work.operations - of(1).work.operations
    # Two experts more, of three matrices, forward and backward. The first block needs no gradient of its input.
    expected = 2 * batch["input_ids"].numel() * 3 * width * inner * 4 * layers
    assert more == pytest.approx(expected, rel=0.1)


def test_dropout_draws_once_per_element():
    layers, width, batch = 6, 256, packed_batch()
    step = planned(
        lambda: decoder("llama", hidden_size=width, head_dim=64),
        lorakit.LoRA(rank=2, dropout=0.1, targets="attention.qv"),
        LanguageModellingLoss(path="fused"),
        batch,
    )
    assert step.work.drawn == layers * 2 * batch["input_ids"].numel() * width


@pytest.mark.slow
def test_checkpointing_saves_fewer_activations():
    usual = shortened("llama, q and v")
    checkpointed = shortened("llama, q and v", True)
    assert checkpointed.peak["activations"] < 0.5 * usual.peak["activations"]
    assert checkpointed.work.operations > 1.2 * usual.work.operations


def test_shared_prefixes_count_once():
    make, method, objective, _ = CASES["llama, q and v"]
    shared = planned(make, method, objective, packed_batch(shared=40))
    separate = planned(make, method, objective, packed_batch(shared=1))
    assert sum(shared.peak.values()) < 0.6 * sum(separate.peak.values())


def test_parameters_are_fake_tensors():
    with planning(new_mode()):
        model = decoder("llama")
    assert isinstance(next(model.parameters()), torch._subclasses.FakeTensor)


def test_a_shortened_loss_counts_every_chunk(monkeypatch):
    """Only the first and the last chunk of logits run; the work and the peak are those of all five."""
    monkeypatch.setattr(step.linear_cross_entropy, "CHUNK_BYTES", 32 * 4 * tiny_models.VOCABULARY)
    method, objective = lorakit.LoRA(), LanguageModellingLoss(path="fused")
    short = planned(lambda: decoder("llama"), method, objective, packed_batch())
    called = []
    monkeypatch.setattr(
        step, "_short_loss", lambda ledger: called.append(ledger) or contextlib.nullcontext()
    )
    whole = planned(lambda: decoder("llama"), method, objective, packed_batch())
    assert called
    assert short.peak == whole.peak
    assert short.work.operations == whole.work.operations
    assert short.work.calls == pytest.approx(whole.work.calls, rel=0.01)
    assert short.work.traffic == pytest.approx(whole.work.traffic, rel=0.01)


def test_a_real_loss_is_whole_while_another_thread_plans():
    hidden, W, targets = torch.randn(96, 8), torch.randn(50, 8), torch.arange(96) % 50
    expected = linear_cross_entropy(hidden, W, targets, chunk=16)
    with step._short_loss(Ledger([])):
        assert linear_cross_entropy(hidden, W, targets, chunk=16).equal(expected)
