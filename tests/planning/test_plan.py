"""`lorakit.planning.plan` predicts a run from its configuration, without weights."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
import threading
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import PACKED_STEP, collator, padded_step
from lorakit.data import DataConfig
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.errors import BaseModelError, ConfigurationError, DataError
from lorakit.methods import registry
from lorakit.methods.lora import layer as lora_layer
from lorakit.models import dtype_choice, dtypes
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import Shape, shape_of
from lorakit.ops import linear_cross_entropy
from lorakit.planning import batches as batches_module
from lorakit.planning import plan, planner
from lorakit.planning.batches import from_data, from_lengths, language_examples
from lorakit.planning.gpt3 import arithmetic
from lorakit.planning.machine import TOKEN_BYTES, UPDATE_BYTES, Machine
from lorakit.planning.products import Timings
from lorakit.planning.shape import build, new_mode, planning
from lorakit.planning.simulate import simulate
from lorakit.training import opening
from lorakit.training.config import HeldOutConfig
from lorakit.training.schedule import Share
from lorakit.training.setup import prepare

OWN_METHOD = f"{Path(__file__).parents[2] / 'examples' / 'own_method.py'}:IA3"

MACHINE = Machine(
    products=1e9,
    traffic=1e9,
    draws=1e9,
    call=0.0,
    software=1000,
    slack=0.5,
    packed=0.0,
    origin="made up",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Return a folder with a configuration and a tokenizer, but no weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = tiny_models.ARCHITECTURES["llama"]()
    config.update(
        {"vocab_size": len(tokenizer), "num_hidden_layers": 5, "max_position_embeddings": 512}
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return str(folder)


@pytest.mark.slow
def test_counts_match_the_trained_run(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base, max_steps=1, epochs=1)
    planned = plan(config, machine=MACHINE)
    run = lorakit.train(config)
    (file,) = (run.folder / "adapter").glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned.chosen.file_bytes == file.stat().st_size - header
    assert planned.chosen.memory.adapter == planned.chosen.file_bytes
    assert planned.chosen.memory.optimizer == 2 * planned.chosen.file_bytes
    assert planned.steps == 1


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_saved_file_is_in_the_form_of_peft(tmp_path, init):
    """Its slices of GPT-2's fused projection have zeros, and PiSSA has twice the rank."""
    base = tiny_runs.save_base(tmp_path / "base", "gpt2")
    lora = lorakit.LoRA(rank=2, targets="attention.qv", init=init)
    planned = plan(tiny_runs.config(tmp_path, base, lora=lora), length=8, machine=MACHINE)
    adapters = lorakit.attach(lorakit.load_base(base, dtype="float32").model, lora)
    assert planned.chosen.file_bytes == adapters.summary().file_bytes
    assert planned.chosen.file_bytes > 4 * planned.chosen.trained


@pytest.mark.slow
def test_products_are_timed_on_this_machine_only(base, tmp_path, monkeypatch):
    """Each product takes a million seconds; the rates alone predict almost none."""
    config = tiny_runs.config(tmp_path, base, accumulation=1)
    fast = dataclasses.replace(MACHINE, products=1e15, traffic=1e15, draws=1e15)
    timed = []

    def time_products(steps, device, estimate):
        (products,) = steps
        timed.append((sum(products.values()), device))
        return Timings(dict.fromkeys(products, 1e6), extrapolated=True)

    monkeypatch.setattr("lorakit.planning.planner.time_products", time_products)
    assert plan(config, length=64, compare=False, machine=fast).chosen.seconds < 1
    assert not timed
    here = dataclasses.replace(fast, here=True)
    planned = plan(config, length=64, compare=False, machine=here)
    ((count, device),) = timed
    assert planned.chosen.seconds == pytest.approx(1e6 * count)
    assert planned.machine.origin == "made up; long products with fewer rows, extrapolated"
    assert device == torch.device("cpu")


@pytest.mark.slow
def test_any_number_of_targets_is_planned(base, tmp_path):
    config = tiny_runs.config(tmp_path, base, batch_size=7)
    planned = [
        plan(config, length=50, target_tokens=n, machine=MACHINE).chosen for n in (17, 19, 23)
    ]
    assert planned[0].seconds < planned[1].seconds < planned[2].seconds


@pytest.mark.slow
def test_the_optimizer_update_takes_time(base, tmp_path):
    config = tiny_runs.config(tmp_path, base, accumulation=1)
    slow = dataclasses.replace(MACHINE, products=1e15, traffic=1.0)
    slow_update = plan(config, length=64, compare=False, machine=slow).chosen
    fast = dataclasses.replace(MACHINE, products=1e15, traffic=1e30)
    fast_update = plan(config, length=64, compare=False, machine=fast).chosen
    assert slow_update.seconds > UPDATE_BYTES * slow_update.trained > fast_update.seconds


@pytest.mark.slow
def test_no_weights_are_needed(base, tmp_path):
    planned = plan(tiny_runs.config(tmp_path, base), machine=MACHINE)
    vocabulary = len(tiny_tokenizer())
    model = tiny_models.build("llama", vocab_size=vocabulary, num_hidden_layers=5)
    assert planned.parameters == model.num_parameters()
    # The base also has the rotary frequencies.
    assert 0 <= planned.chosen.memory.base - 4 * planned.parameters < 100
    assert "train.jsonl" in planned.lengths
    assert planned.steps == 18


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_the_plan_has_the_batches_of_the_run(tmp_path, batch_size, accumulation):
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base, batch_size=batch_size, accumulation=accumulation)
    batches = from_data(config)
    job = prepare(config)
    run = [
        [job.train[i].input_ids for i in batch]
        for step in job.step_plan.steps()
        for batch in job.share(step)
    ]
    longest, middle, _ = batches.fullest_and_middle(packed=False)
    assert [example.input_ids for example in middle] in run[: len(run) // 2]  # the first epoch
    # No later batch is larger.
    assert len(longest) == batch_size
    lengths = sorted(map(len, job.train), reverse=True)
    assert sorted(map(len, longest), reverse=True) == lengths[:batch_size]
    assert max(map(len, longest)) * batch_size >= max(max(map(len, b)) * len(b) for b in run)
    assert batches.steps == job.step_plan.total == 18
    # All batches of a single epoch are known.
    single = from_data(dataclasses.replace(config, epochs=1))
    fullest, *_ = single.fullest_and_middle(packed=False)
    assert [example.input_ids for example in fullest] in run[: len(run) // 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0; it must be a whole number of 2 or more"),
        ({"processes": 0}, "processes is 0; it must be a whole number of 1 or more"),
        (
            {"length": 8, "target_tokens": 0},
            "target_tokens is 0; it must be a whole number of 1 or more",
        ),
        ({"target_tokens": 4}, "target_tokens counts tokens of length"),
    ],
)
def test_the_library_checks_what_the_command_checks(tmp_path, settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(tiny_runs.config(tmp_path, "base"), **settings)


@pytest.mark.slow
def test_labels_and_length_of_a_run_are_those_of_all_rows(tmp_path, monkeypatch):
    """The first rows of sorted data have one label; one of them may be empty, or hold several examples."""
    monkeypatch.setattr(batches_module, "ROWS", 10)
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    rows = [{"text": f"river {i}", "label": f"{i // 5}"} for i in range(30)]
    file = tiny_runs.write_rows(tmp_path / "sorted.jsonl", rows)
    config = tiny_runs.config(
        tmp_path, base, data=DataConfig(train=file), evaluation=HeldOutConfig()
    )
    planned = from_data(config)
    assert planned.task.labels == ("0", "1", "2", "3", "4", "5")
    assert planned.steps is None
    read = sum(len(example) for batch in planned.batches for example in batch)
    assert planned.kept_tokens == 3 * read
    decoder = tiny_runs.save_base(tmp_path / "decoder")
    rows = [{"dialogue": "" if i == 3 else f"pub {i}", "summary": "park"} for i in range(15)]
    dialogues = tiny_runs.write_rows(tmp_path / "dialogues.jsonl", rows)
    data = DataConfig(task="samsum", train=dialogues)
    assert from_data(tiny_runs.config(tmp_path, decoder, data=data)).steps is None


@pytest.mark.slow
def test_prompts_that_return_late_are_seen_in_grouped_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "ROWS", 8)
    base = tiny_runs.save_base(tmp_path / "base")
    rows = [{"prompt": f"river {i % 8}", "completion": f" pub {i}"} for i in range(32)]
    data = DataConfig(train=tiny_runs.write_rows(tmp_path / "rows.jsonl", rows))
    prompts = {}
    for sampling in ("random", "grouped"):
        config = tiny_runs.config(
            tmp_path, base, data=data, evaluation=HeldOutConfig(), batch_size=4, sampling=sampling
        )
        planned = from_data(config)
        prompts[sampling] = {len({e.prompt for e in batch}) for batch in planned.batches}
        fullest, *_ = planned.fullest_and_middle(packed=True)
        prompts[sampling].add(len({example.prompt for example in fullest}))
    assert prompts == {"random": {4}, "grouped": {1}}


@pytest.mark.parametrize(
    ("model_type", "architecture", "labelled"),
    [
        ("xlm-roberta", "XLMRobertaModel", True),
        ("xlm-roberta", "XLMRobertaForMaskedLM", True),
        ("bert", None, True),
        ("llama", "LlamaForCausalLM", False),
        ("llama", "LlamaForSequenceClassification", True),
        ("mistral", "MistralModel", False),  # an encoder of sentences; only its use shows it
        ("gpt2", "GPT2LMHeadModel", False),
        ("t5", "T5ForConditionalGeneration", False),
        ("t5", "T5Model", False),
        ("gemma3", "Gemma3ForConditionalGeneration", False),  # a decoder of images and text
    ],
)
def test_a_plan_without_data_is_for_what_the_model_does(
    tmp_path, model_type, architecture, labelled
):
    config = transformers.CONFIG_MAPPING[model_type](
        architectures=None if architecture is None else [architecture]
    )
    shape = Shape("base", "", config)
    planned = planner._batches(tiny_runs.config(tmp_path, "base"), shape, 8, None, 1)
    assert (planned.task.name == "classification") == labelled


def test_a_plan_never_asks_whether_to_run_code(monkeypatch):
    """transformers asks on standard input, for a head that only code of the repository has."""
    code = {"AutoModelForSequenceClassification": "own.Own"}
    shape = Shape("mamba", "", transformers.MambaConfig(auto_map=code))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(BaseModelError, match=r"'mamba' cannot be built .* custom code"):
        build(shape, BaseConfig(name="mamba"), "sequence-classification", 2, dtype=torch.float32)
    assert sys.stdin.read() == "y\n"


def test_sizes_are_those_of_the_collator(tmp_path):
    """Padded batches differ in rows and rounded width, packed ones in rounded tokens."""
    lengths = [8, 9, 12, 13, 100, 101, 104, 105]
    batches = [language_examples(2, length, 2) for length in lengths]
    batches.append(language_examples(1, 8, 2))
    planned = dataclasses.replace(
        from_lengths(tiny_runs.config(tmp_path, "base"), 8, 4, labelled=False), batches=batches
    )
    shapes = {
        tuple(collate(b, 0, step=padded_step(max(map(len, b))))["input_ids"].shape) for b in batches
    }
    assert planned.sizes(packed=False, is_encoder_decoder=False) == len(shapes) == 6
    packed = {pack(batch, 0, step=PACKED_STEP)["input_ids"].numel() for batch in batches}
    assert planned.sizes(packed=True, is_encoder_decoder=False) == len(packed)


def test_sizes_of_an_encoder_decoder_are_those_of_the_collator(tmp_path):
    collate_pairs = collator(
        lorakit.load_base(tiny_runs.save_base(tmp_path / "t5", "t5"), task="seq2seq-lm")
    )
    lengths = ((8, 2), (9, 2), (9, 3), (8, 2), (12, 5))
    batches = [language_examples(2, length, targets) for length, targets in lengths]
    planned = dataclasses.replace(
        from_lengths(tiny_runs.config(tmp_path, "base"), 8, 4, labelled=False), batches=batches
    )
    made = map(collate_pairs, batches)
    shapes = {(batch["input_ids"].shape, batch["labels"].shape) for batch in made}
    assert planned.sizes(packed=False, is_encoder_decoder=True) == len(shapes) == 4


def test_the_fullest_batch_is_that_of_packing_or_padding(tmp_path):
    """Packing computes the long prompt of the first batch once."""
    shared = [
        dataclasses.replace(example, input_ids=[7] * 50 + [number, 1])
        for number, example in enumerate(language_examples(4, 52, 2))
    ]
    separate, few = language_examples(4, 30, 2), language_examples(2, 40, 2)
    batches = [shared, separate, few]
    planned = dataclasses.replace(
        from_lengths(tiny_runs.config(tmp_path, "base"), 8, 4, labelled=False), batches=batches
    )
    assert planned.fullest_and_middle(packed=False) == (shared, separate, 136 / 120)
    assert planned.fullest_and_middle(packed=True) == (separate, few, 86 / 80)
    widths = [pack(batch, 0)["input_ids"].numel() for batch in batches]
    assert max(widths) == widths[1]


@pytest.mark.slow
def test_the_examples_of_the_data_set_stay_in_memory(base, tmp_path, monkeypatch):
    """Of data without labels, they are those of the rows that the plan reads, and its text says so."""
    config = tiny_runs.config(tmp_path, base)
    tokens = sum(len(example) for batch in from_data(config).batches for example in batch)
    planned, without = (plan(config, length=n, compare=False, machine=MACHINE) for n in (None, 32))
    assert planned.chosen.memory.software == 1000 + TOKEN_BYTES * tokens
    assert planned.loading == without.loading + TOKEN_BYTES * tokens
    assert without.chosen.memory.software == 1000
    assert "memory excludes" not in planned.lengths
    data = dataclasses.replace(config.data, validation=None, validation_fraction=0.25)
    held_out = from_data(dataclasses.replace(config, data=data))
    assert held_out.kept_tokens == pytest.approx(tokens, rel=0.1)
    monkeypatch.setattr(batches_module, "ROWS", 24)
    first = from_data(config)
    assert first.kept_tokens == pytest.approx(tokens / 3, rel=0.2)
    assert "(from the first rows; memory excludes those of the others)" in first.source


@pytest.mark.slow
def test_the_time_is_that_of_mean_batches(tmp_path, monkeypatch):
    """Of eight batches, two have five times the tokens: the median batch would take half of the mean time."""
    wide = tiny_models.ARCHITECTURES["llama"]()
    wide.update({"architectures": ["LlamaForCausalLM"], "intermediate_size": 2048})
    wide.save_pretrained(tmp_path / "base")
    config = tiny_runs.config(tmp_path, str(tmp_path / "base"), accumulation=1)
    seconds = {}
    for name, lengths in {"short": [8], "long": [40], "mixed": [8] * 6 + [40] * 2}.items():
        skewed = dataclasses.replace(
            from_lengths(config, 8, 4, labelled=False),
            batches=[language_examples(4, length, length // 2) for length in lengths],
        )
        monkeypatch.setattr(planner, "_batches", lambda *_, skewed=skewed: skewed)
        seconds[name] = plan(config, compare=False, machine=MACHINE).chosen.seconds
    mean = (6 * seconds["short"] + 2 * seconds["long"]) / 8
    assert seconds["mixed"] == pytest.approx(mean, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_several_processes_have_the_batches_of_the_run(tmp_path, accumulation):
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base, batch_size=4, accumulation=accumulation)
    batches = from_data(config, 2)
    job = prepare(config)
    of_rank = [Share(job.train, batch_size=BatchSize(4), rank=rank, count=2) for rank in range(2)]
    shares = [
        [[job.train[i].input_ids for i in batch] for batch in share(step)]
        for share in of_rank
        for step in itertools.islice(job.step_plan.steps(), job.step_plan.steps_per_epoch)
    ]
    computed = [batch for share in shares for batch in share]
    _, middle, _ = batches.fullest_and_middle(packed=True)
    assert [example.input_ids for example in middle] in computed
    tokens = [max(map(len, batch)) * len(batch) for batch in computed]
    fullest, *_ = batches.fullest_and_middle(packed=False)
    assert max(map(len, fullest)) * len(fullest) >= max(tokens)
    assert len(fullest) == max(map(len, computed))
    assert batches.per_step == max(map(len, shares))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_bases_of_all_processes_fit_into_the_memory(base, tmp_path, monkeypatch, processes):
    """The plan has the dtype of the run."""
    shape = transformers.AutoConfig.from_pretrained(base)
    shape.dtype = torch.bfloat16
    shape.save_pretrained(tmp_path / "base")
    auto = BaseConfig(name=str(tmp_path / "base"), device="cpu")
    config = dataclasses.replace(tiny_runs.config(tmp_path, base), base=auto)
    parameters = plan(config, length=8, compare=False, machine=MACHINE).parameters
    monkeypatch.setattr(dtype_choice, "available_memory", lambda _: 4 * parameters)
    planned = plan(config, length=8, compare=False, processes=processes, machine=MACHINE)
    assert planned.dtype == {1: "float32", 2: "bfloat16"}[processes]
    with opening._open_locked(config, processes) as run:
        assert run.config.base.dtype == planned.dtype


@pytest.mark.slow
def test_several_processes_share_a_step(base, tmp_path):
    """Each computes half of the examples, holds the whole base, and sends its gradients."""
    config = tiny_runs.config(tmp_path, base, batch_size=8, accumulation=1)
    exact = dataclasses.replace(MACHINE, sent=1e6)
    one, two, four = (
        plan(config, length=64, compare=False, processes=n, machine=exact) for n in (1, 2, 4)
    )
    assert (one.rows * one.width, two.rows * two.width) == (8 * 64, 4 * 64)
    assert one.tokens == two.tokens == four.tokens == 8 * 64
    memories = [planned.chosen.memory for planned in (one, two)]
    assert memories[0].base == memories[1].base
    assert memories[0].optimizer == memories[1].optimizer
    assert memories[1].activations < 0.6 * memories[0].activations
    gradients = 4 * one.chosen.trained
    assert [p.chosen.sent for p in (one, two, four)] == [0, gradients, 1.5 * gradients]
    sending = two.chosen.seconds - gradients / 1e6
    assert 0.4 * one.chosen.seconds < sending < 0.6 * one.chosen.seconds


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sharded_weights(base, tmp_path, method):
    """Each of two processes holds half of the blocks, and one whole block while it computes."""
    config = tiny_runs.config(tmp_path, base, method=method, batch_size=8, accumulation=1)
    sharded = dataclasses.replace(config, shard=True)
    whole, half = (
        plan(c, length=64, compare=False, processes=2, machine=MACHINE).chosen
        for c in (config, sharded)
    )
    model = tiny_models.build("llama", vocab_size=len(tiny_tokenizer()), num_hidden_layers=5)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    if method == "lora":
        assert whole.memory.base - half.memory.base == 4 * (blocks // 2 - blocks // 5)
        assert half.memory.adapter == whole.memory.adapter
        assert half.memory.optimizer == whole.memory.optimizer
        assert half.sent - whole.sent == 4 * blocks
    else:
        gone = whole.memory.base - half.memory.base
        assert gone == pytest.approx(4 * (blocks - blocks // 5), rel=1e-3)
        assert whole.memory.adapter - half.memory.adapter == 2 * blocks
        assert whole.memory.optimizer - half.memory.optimizer == 4 * blocks
        assert half.sent - whole.sent == pytest.approx(2 * blocks, rel=1e-3)
    assert half.trained == whole.trained
    assert half.file_bytes == whole.file_bytes
    assert half.seconds - whole.seconds == pytest.approx(
        (half.sent - whole.sent) / MACHINE.sent
        - (4 * blocks // 8 * 40 / 1e9 if method == "full" else 0),
        rel=1e-3,
    )


@pytest.mark.slow
def test_a_copy_of_the_gradients_can_be_the_peak(base, tmp_path):
    """The processes add their gradients in a flat copy, which exceeds the activations of a small batch."""
    config = tiny_runs.config(tmp_path, base, method="full", batch_size=2, accumulation=1)
    memory = plan(config, length=4, compare=False, processes=2, machine=MACHINE).chosen.memory
    assert (memory.gradients, memory.temporary) == (memory.adapter, memory.adapter)
    assert memory.activations == 0


@pytest.mark.slow
def test_a_checkpoint_of_sharded_copies_can_be_the_peak(base, tmp_path):
    """The first process gathers them with their means on the CPU, and made them whole before."""
    config = tiny_runs.config(
        tmp_path, base, method="full", shard=True, batch_size=2, accumulation=1
    )
    tight = dataclasses.replace(MACHINE, slack=0.1)
    planned = plan(config, length=4, compare=False, processes=2, machine=tight)
    model = tiny_models.build("llama", vocab_size=len(tiny_tokenizer()), num_hidden_layers=5)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    memory = planned.chosen.memory
    assert memory.temporary == 12 * blocks
    assert memory.activations == memory.gradients == memory.allocator == 0
    whole = dataclasses.replace(config, shard=False)
    usual = plan(whole, length=4, compare=False, processes=2, machine=MACHINE)
    assert planned.loading - usual.loading == 4 * planned.parameters


@pytest.mark.slow
def test_a_data_set_smaller_than_a_step_has_fewer_batches(base, tmp_path, monkeypatch):
    rows = tiny_runs.write_rows(tmp_path / "few.jsonl", tiny_runs.pairs(6))
    settings = {"data": DataConfig(train=rows, validation=rows), "batch_size": 4}
    small, large = (
        plan(tiny_runs.config(tmp_path, base, accumulation=n, **settings), machine=MACHINE)
        for n in (2, 64)
    )
    assert (small.steps, small.tokens) == (large.steps, large.tokens)
    assert small.chosen == large.chosen
    one = tiny_runs.config(tmp_path, base, accumulation=64, **settings | {"batch_size": 6})
    assert from_data(one).per_step == 1
    monkeypatch.setattr(lorakit.planning.batches, "ROWS", 5)  # the data set may have more rows
    assert from_data(one).per_step == 64


@pytest.mark.slow
def test_the_parts_add_up_to_the_total(base, tmp_path):
    planned = plan(tiny_runs.config(tmp_path, base), length=64, machine=MACHINE)
    record = planned.as_dict()
    json.dumps(record)
    for name in ("chosen", "full"):
        parts = dict(record[name]["memory"])
        assert parts.pop("total") == sum(parts.values())
        assert parts["software"] == 1000
        assert record[name]["peak"] == max(record["loading"], sum(parts.values()))
    step_parts = ("activations", "gradients", "logits", "temporary")
    memory = planned.chosen.memory
    assert memory.allocator == pytest.approx(
        0.5 * sum(getattr(memory, name) for name in step_parts), abs=1
    )


@pytest.mark.slow
def test_cached_kernels_are_part_of_the_plan(base, tmp_path, monkeypatch):
    """Each size of a batch has its own kernels, up to the bound of the cache."""
    config = tiny_runs.config(tmp_path, base)

    def kernels(**settings):
        totals = [
            plan(config, compare=False, machine=dataclasses.replace(MACHINE, kernel=n), **settings)
            for n in (0, 10**6)
        ]
        return (totals[1].chosen.memory.allocator - totals[0].chosen.memory.allocator) / 10**6

    monkeypatch.setattr("lorakit.planning.planner.KERNELS", 10**6)
    one, several = kernels(length=32), kernels()
    assert 10 < one < 60
    assert several >= 2 * one - 20
    monkeypatch.setattr("lorakit.planning.planner.KERNELS", 7)
    assert kernels() == 7


@pytest.mark.slow
def test_full_fine_tuning_is_predicted_for_comparison(base, tmp_path):
    config = tiny_runs.config(tmp_path, base, lora=lorakit.LoRA(rank=2))
    planned = plan(config, length=64, machine=MACHINE)
    assert planned.full is not None
    assert planned.full.trained == planned.parameters
    assert planned.full.memory.optimizer == 8 * planned.parameters
    assert planned.full.memory.gradients >= 0.9 * 4 * planned.parameters
    assert planned.full.memory.total > planned.chosen.memory.total
    alone = plan(
        dataclasses.replace(config, method="full", lora=lorakit.LoRA()), length=64, machine=MACHINE
    )
    assert alone.full is None
    assert alone.chosen == planned.full


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        lambda: lorakit.LoRA(rank=2),
        lambda: lorakit.Combined(methods=(lorakit.LoRA(rank=2), lorakit.PrefixEmbedding())),
        lambda: registry.user_method(OWN_METHOD, {"targets": ["mlp.up"]}),
    ],
    ids=["lora", "combined", "of one's own"],
)
def test_a_run_that_starts_from_an_adapter(tmp_path, monkeypatch, method):
    monkeypatch.setattr(registry, "_OWN", {})
    base = tiny_runs.save_base(tmp_path / "base", "llama")
    model = lorakit.load_base(base, dtype="float32").model
    adapters = lorakit.attach(model, method())
    adapters.save(tmp_path / "adapter")
    config = tiny_runs.config(tmp_path, base, from_adapter=str(tmp_path / "adapter"))
    planned = plan(config, length=32, machine=MACHINE)
    assert planned.chosen.trained == adapters.summary().counts.trainable
    assert planned.full is not None


@pytest.mark.slow
def test_a_run_that_starts_from_a_peft_adapter_with_names_of_other_models(tmp_path):
    """`lorakit train` loads it: the tensors decide which layers it adapts."""
    base = tiny_runs.save_base(tmp_path / "base", "llama")
    model = lorakit.load_base(base, dtype="float32").model
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2, targets="q_proj"))
    folder = adapters.save(tmp_path / "adapter")
    (folder / "lorakit.json").unlink()
    options = json.loads((folder / "adapter_config.json").read_text())
    options["target_modules"] += ["qkv_proj", "gate_up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(options))
    config = tiny_runs.config(tmp_path, base, from_adapter=str(folder))
    planned = plan(config, length=32, compare=False, machine=MACHINE)
    assert planned.chosen.trained == adapters.summary().counts.trainable


@pytest.mark.slow
def test_a_custom_method_is_compared_with_full_fine_tuning(base, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_OWN", {})
    settings = {"targets": ["mlp.up"]}
    config = tiny_runs.config(tmp_path, base, method=OWN_METHOD, method_settings=settings)
    planned = plan(config, length=32, machine=MACHINE)
    assert planned.chosen.trained == 5 * 64
    assert planned.full is not None
    assert planned.full.trained == planned.parameters


@pytest.mark.slow
def test_longer_larger_and_wider_runs_need_more(base, tmp_path):
    def total(**changes):
        config = tiny_runs.config(tmp_path, base, accumulation=1)
        length = changes.pop("length", 64)
        config = dataclasses.replace(config, **changes)
        return plan(config, length=length, compare=False, machine=MACHINE).chosen

    usual = total()
    for more in (
        total(length=128),
        total(batch_size=8),
        total(lora=lorakit.LoRA(rank=16)),
        total(lora=lorakit.LoRA(targets="all-linear")),
        total(lora=lorakit.LoRA(dropout=0.1)),
    ):
        assert more.memory.total > usual.memory.total
        assert more.seconds >= usual.seconds
    half = total(base=BaseConfig(name=base, dtype="bfloat16", device="cpu"))
    assert half.memory.base == pytest.approx(usual.memory.base / 2, abs=100)
    assert half.memory.total < usual.memory.total
    assert total(gradient_checkpointing=True).memory.activations < usual.memory.activations
    twice = total(accumulation=2)
    assert twice.seconds == pytest.approx(2 * usual.seconds, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_quantised_base_takes_the_bytes_of_the_loaded_one(tmp_path, dtype):
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base)
    config = dataclasses.replace(config, base=BaseConfig(name=base, dtype=dtype, device="cpu"))
    planned = plan(config, length=32, machine=MACHINE)
    model = lorakit.load_base(base, dtype=dtype).model
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    scales = [t.quant_state.absmax for t in tensors if getattr(t, "quant_state", None) is not None]
    loaded = sum(t.nbytes for t in (*tensors, *scales))
    assert planned.chosen.memory.base == pytest.approx(loaded, rel=0.02)


def quantised_checkpoint(folder: Path, **settings) -> str:
    """Save the configuration of a checkpoint that another library has quantised."""
    config = tiny_models.ARCHITECTURES["llama"]()
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": torch.float32})
    config.quantization_config = settings
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kind"), [("load_in_4bit", "nf4"), ("load_in_8bit", "int8")])
def test_a_quantised_checkpoint_takes_its_bytes(tmp_path, monkeypatch, option, kind):
    """Its plan is that of a base that lorakit quantises, without the unquantised file."""
    monkeypatch.setattr(planner, "compute_dtype", lambda *_: torch.float32)

    def planned(name: str, dtype: str, **settings):
        base = quantised_checkpoint(tmp_path / name, **settings)
        config = tiny_runs.config(tmp_path, base)
        config = dataclasses.replace(config, base=dataclasses.replace(config.base, dtype=dtype))
        return plan(config, length=32, compare=False, machine=MACHINE)

    bits = {"quant_method": "bitsandbytes", option: True}
    stored, made = planned("stored", "float32", **bits), planned("made", kind)
    assert stored.chosen.memory == made.chosen.memory
    assert stored.loading < made.loading
    assert stored.note == ""
    skipped = planned("skipped", "float32", **bits, llm_int8_skip_modules=["lm_head", "mlp"])
    whole = planned("whole", "float32").chosen.memory
    assert stored.chosen.memory.base < skipped.chosen.memory.base < whole.base
    other = planned("other", "float32", quant_method="gptq", bits=4)
    assert other.chosen.memory.base == whole.base
    assert other.note == (
        "its checkpoint is quantised (gptq), but the plan assumes unquantised weights"
    )


@pytest.mark.slow
@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
def test_loading_maps_the_unquantised_weights(tmp_path, monkeypatch, computed):
    """Whatever the dtype of the computation, they stay in that of the file until they are quantised."""
    config = tiny_models.ARCHITECTURES["llama"]()
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": torch.bfloat16})
    config.save_pretrained(tmp_path)
    names = {"nf4": computed, "bfloat16": "bfloat16"}
    monkeypatch.setattr(planner, "compute_dtype", lambda name, _: getattr(torch, names[name]))
    plans = {
        name: plan(
            dataclasses.replace(
                tiny_runs.config(tmp_path, str(tmp_path)),
                base=BaseConfig(name=str(tmp_path), dtype=name, device="cpu"),
            ),
            length=32,
            compare=False,
            machine=MACHINE,
        )
        for name in names
    }
    quantised = plans["nf4"].chosen.memory.base
    assert plans["nf4"].loading == pytest.approx(plans["bfloat16"].loading + quantised, abs=1000)


def test_an_encoder_is_planned_as_a_classifier(tmp_path):
    config = tiny_models.ARCHITECTURES["bert"]()
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    planned = plan(tiny_runs.config(tmp_path, str(tmp_path)), length=32, machine=MACHINE)
    head = 32 * 2 + 2 + 32 * 32 + 32  # classifier and pooler
    assert planned.chosen.trained > head
    assert not planned.packed


def test_errors_name_the_setting(base, tmp_path):
    config = tiny_runs.config(tmp_path, base)
    with pytest.raises(DataError, match="context"):
        plan(config, length=4096, machine=MACHINE)
    with pytest.raises(ConfigurationError, match="target_tokens is 64"):
        plan(config, length=64, target_tokens=64, machine=MACHINE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="cannot be read"):
        plan(
            dataclasses.replace(config, base=BaseConfig(name=str(tmp_path / "empty"))),
            length=8,
            machine=MACHINE,
        )


def simulated_on(device: str, config, length: int, target_tokens: int | None = None):
    """Return the simulated run on a device that this machine may lack."""
    batches = from_lengths(config, length, target_tokens, labelled=False)
    settings = {"dtype": torch.bfloat16, "device": torch.device(device)}
    return simulate(config, shape_of(config.base), batches, **settings)


@pytest.mark.slow
def test_an_absent_gpu_is_assumed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: False)
    config = tiny_runs.config(tmp_path, base)
    config = dataclasses.replace(config, base=BaseConfig(name=base, device="cuda"))
    planned = plan(config, length=64)
    assert (planned.device, planned.dtype) == ("cuda", "bfloat16")
    assert planned.chosen.memory.software == 0
    assert planned.chosen.seconds > 0
    # A GPU computes the model's own layers, which keep more for the backward pass.
    on_cpu, on_gpu = (simulated_on(device, config, 64) for device in ("cpu", "cuda"))
    assert on_gpu.fullest.peak["activations"] > on_cpu.fullest.peak["activations"]


@pytest.mark.slow
def test_attention_on_a_gpu_is_arithmetic(base, tmp_path):
    """Its fused kernel computes two products forward and five backward, and stores no scores."""
    config = tiny_runs.config(tmp_path, base, batch_size=1, accumulation=1)
    layers, width = 5, 32
    for length in (128, 256):
        run = simulated_on("cuda", config, length)
        products = run.fullest.work.products.items()
        attention = sum(p.operations * n for p, n in products if "attention" in p.name)
        assert run.width >= length - 1
        assert attention == 14 * run.width**2 * width * layers


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_a_gpu_computes_large_chunks(base, tmp_path, monkeypatch, dora):
    """The chunks that keep the loss and DoRA in a CPU's cache would be thousands of launches."""
    lora = lorakit.LoRA(rank=2, dora=dora)
    config = tiny_runs.config(tmp_path, base, lora=lora, batch_size=1, accumulation=1)

    def calls(device: str) -> int:
        return simulated_on(device, config, 128, 120).fullest.work.calls

    large = {device: calls(device) for device in ("cpu", "cuda")}
    if dora:
        monkeypatch.setattr(lora_layer, "_CHUNK", 64)
    else:
        monkeypatch.setattr(linear_cross_entropy, "CACHE_BYTES", 16 * len(tiny_tokenizer()))
    assert calls("cpu") > large["cpu"]
    assert calls("cuda") == large["cuda"]


def test_plans_of_two_threads_restore_the_limits_of_a_cpu() -> None:
    usual, gpu = linear_cross_entropy.CACHE_BYTES, torch.device("cuda")
    first_ended = threading.Event()

    def second() -> None:
        with planning(new_mode(), gpu):
            first_ended.wait(5)

    thread = threading.Thread(target=second)
    with planning(new_mode(), gpu):
        thread.start()
        thread.join(0.1)  # time to enter
    first_ended.set()
    thread.join()
    assert usual == linear_cross_entropy.CACHE_BYTES


@pytest.mark.slow
def test_the_papers_arithmetic():
    text = "\n".join(arithmetic())
    for figure in ("18,874,368", "37.7 MB", "36.0 MiB", "9,285 times", "350.5 GB", "1,052 GB"):
        assert figure in text


@pytest.mark.slow
def test_gpt3_is_planned_without_a_checkpoint(tmp_path):
    config = tiny_runs.config(
        tmp_path, "gpt3-175b", lora=lorakit.LoRA(rank=4), accumulation=1, batch_size=1
    )
    config = dataclasses.replace(config, base=BaseConfig(name="gpt3-175b", dtype="bfloat16"))
    planned = plan(config, length=64, compare=False, machine=MACHINE)
    assert planned.parameters == 174_604_259_328
    assert planned.chosen.trained == 18_874_368
    assert planned.chosen.memory.base == pytest.approx(349.2e9, rel=0.001)
    assert planned.paper
    assert not Path("gpt3-175b").exists()


@pytest.mark.slow
def test_an_encoder_decoder_that_generates_is_planned(tmp_path):
    config = tiny_models.ARCHITECTURES["t5"]()
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    planned = plan(tiny_runs.config(tmp_path, str(tmp_path)), length=32, machine=MACHINE)
    assert planned.chosen.memory.activations > 0
    assert planned.chosen.memory.logits > 0
    assert not planned.packed


def test_a_forward_pass_that_depends_on_values_is_not_planned(tmp_path):
    config = tiny_models.ARCHITECTURES["t5"]()  # its classifier searches for the end of each text
    config.save_pretrained(tmp_path)
    run = tiny_runs.config(tmp_path, str(tmp_path))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, task="classification"))
    with pytest.raises(BaseModelError, match="depends on the values of tensors"):
        plan(run, length=32, machine=MACHINE)


def test_a_model_that_cannot_run_on_simulated_tensors_is_named(base, tmp_path, monkeypatch):
    def forward(*args, **options):
        raise RuntimeError("no kernel\nfor this type")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    expected = "cannot be planned: RuntimeError: no kernel for this type. Train a few steps"
    with pytest.raises(BaseModelError, match=expected):
        plan(tiny_runs.config(tmp_path, base), length=32, compare=False, machine=MACHINE)
