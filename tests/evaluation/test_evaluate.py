"""`lorakit evaluate` from a model folder, an adapter folder and a data file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import lorakit
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.compute.adapter_file import AdapterFile, as_recorded, recorded_data
from lorakit.compute.base import open_base
from lorakit.compute.finite import why_not_finite
from lorakit.data import DataConfig, DataTask, load_examples
from lorakit.errors import (
    AdapterFileError,
    ConfigurationError,
    DataError,
    LorakitError,
    RunFolderError,
    WrongBaseError,
)
from lorakit.evaluation import evaluate as evaluate_module
from lorakit.evaluation import inputs
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.formatting import number
from lorakit.models.base_config import BaseConfig
from lorakit.reporting.evaluation_report import answered
from lorakit.tasks import Completion
from lorakit.training.config import OptimizerConfig
from lorakit.training.loop import train

SHORT = Decoding(max_new_tokens=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter, and its base."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_runs.config(folder, tiny_runs.save_base(folder / "base")))
    return folder


def settings(folder: Path, **overrides) -> EvaluateConfig:
    data = DataConfig(
        train=str(folder / "train.jsonl"),
        validation=str(folder / "validation.jsonl"),
        test=str(folder / "validation.jsonl"),
    )
    values = {
        "base": BaseConfig(name=str(folder / "base"), dtype="float32", device="cpu"),
        "data": data,
        "decoding": SHORT,
        **overrides,
    }
    return EvaluateConfig(**values)


def test_long_rows_are_refused_before_the_base_is_loaded(trained, monkeypatch) -> None:
    monkeypatch.setattr(evaluate_module, "open_adapted", lambda *_, **__: pytest.fail("opened"))
    config = settings(trained, adapter=str(trained / "run" / "adapter"))
    data = dataclasses.replace(config.data, max_length=2)
    with pytest.raises(DataError, match="are longer than max_length 2"):
        evaluate(dataclasses.replace(config, data=data))


def test_the_loss_is_that_which_training_reported(trained: Path) -> None:
    result = json.loads((trained / "run" / "result.json").read_text())
    base = evaluate(settings(trained, scores=("loss",)))
    assert base.scores["loss"] == pytest.approx(result["scores_before"]["loss"], rel=1e-5)
    adapted = evaluate(
        settings(trained, scores=("loss",), adapter=str(trained / "run" / "adapter"))
    )
    assert adapted.scores["loss"] == pytest.approx(result["scores"]["loss"], rel=1e-5)
    assert adapted.scores["loss"] < base.scores["loss"]


def save_with_data(trained: Path, folder: Path, **data) -> str:
    """Write an adapter that records a training on completions with these settings of its data."""
    base = lorakit.load_base(trained / "base", dtype="float32").model
    handle = lorakit.attach(base, lorakit.LoRA(rank=1))
    record = {"task": "completion", "labels": [], "encoding": None, "config": {"data": data}}
    return str(handle.save(folder, provenance=record))


@pytest.mark.parametrize(
    "data",
    [
        {"prompt_template": "Q: {question} A:", "completion_template": " {answer}"},
        {"columns": {"prompt": "question", "completion": "answer"}},
    ],
    ids=["templates", "columns"],
)
def test_rows_are_read_by_the_settings_of_training(trained, tmp_path, caplog, data) -> None:
    rows = [{"question": "river food", "answer": "pub"}, {"question": "park", "answer": "flute"}]
    test = tiny_runs.write_rows(tmp_path / "qa.jsonl", rows)
    config = settings(
        trained,
        adapter=save_with_data(trained, tmp_path / "adapter", **data),
        scores=("loss",),
        compare=False,
        data=DataConfig(test=test),
    )
    named = dataclasses.replace(config, data=DataConfig(test=test, **data))
    assert evaluate(config).scores == evaluate(named).scores
    assert caplog.text == ""
    own = tiny_runs.write_rows(tmp_path / "own.jsonl", tiny_runs.pairs(3))
    assert evaluate(dataclasses.replace(config, data=DataConfig(test=own))).examples == 3
    assert ("trained with the prompt_template 'Q: {question} A:'" in caplog.text) == (
        "prompt_template" in data
    )


def test_settings_beside_recorded_ones_replace_those_of_the_same_name(trained, tmp_path) -> None:
    recorded = {"prompt_template": "Q: {question} A:", "completion_template": " {answer}"}
    adapter = AdapterFile.read(save_with_data(trained, tmp_path / "a", **recorded))
    named = DataConfig(task="completion", test="x.jsonl", completion_template="{reply}")
    found = as_recorded(named, adapter, ["question", "answer", "reply"])
    assert found.prompt_template == "Q: {question} A:"
    assert found.completion_template == "{reply}"

    mapped = {"prompt": "question", "completion": "answer"}
    adapter = AdapterFile.read(save_with_data(trained, tmp_path / "b", columns=mapped))
    named = DataConfig(task="completion", test="x.jsonl", columns={"completion": "reply"})
    found = as_recorded(named, adapter, ["question", "answer", "reply"])
    assert found.columns == {"prompt": "question", "completion": "reply"}


def with_record(record: dict[str, Any]) -> AdapterFile:
    head = {"head.weight": torch.zeros(1)}
    stored = StoredAdapter(method=lorakit.FullFineTuning(), trained=head, provenance=record)
    return AdapterFile("x", stored)


def test_a_named_text_takes_the_place_of_a_recorded_pair() -> None:
    columns = {"sentence1": "a", "sentence2": "b", "label": "gold"}
    record = {"task": "classification", "config": {"data": {"columns": columns}}}
    adapter = with_record(record)
    named = DataConfig(task="classification", test="x.jsonl", columns={"text": "review"})
    found = as_recorded(named, adapter, ["a", "b", "gold", "review"])
    assert found.columns == {"label": "gold", "text": "review"}


def test_settings_of_a_custom_task_are_those_recorded_if_it_is_named(tmp_path) -> None:
    (tmp_path / "my.py").write_text(
        "from lorakit.tasks import TASKS\nclass Chats(TASKS['samsum']):\n    name = 'chats'\n"
    )
    columns = {"dialogue": "talk"}
    record = {"task": "chats", "encoding": "prompt", "config": {"data": {"columns": columns}}}
    adapter = with_record(record)
    assert recorded_data(adapter) == DataConfig()
    found = recorded_data(adapter, f"{tmp_path}/my.py:Chats")
    assert (found.encoding, found.columns) == ("prompt", columns)


def test_a_checkpoint_with_its_classes_in_another_order_is_named(tmp_path) -> None:
    """Its head says other classes than the indices of the data mean."""
    base = tiny_runs.save_base(tmp_path / "base", "bert", "sequence-classification", num_labels=2)
    task = DataTask(name="classification", labels=("dry", "wet"))
    assert open_base(BaseConfig(name=base), task).notices == []
    for names in (["DRY", "Wet"], ["_dry", "wet!"], ["wet", "dry"]):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        model.save_pretrained(base)
        notices = open_base(BaseConfig(name=base), task).notices
        expected = "has the classes wet, dry. The data's are dry, wet, in this order"
        assert [expected in notice for notice in notices] == [True] * (names[0] == "wet")
    indices = DataTask(name="classification", labels=("0", "1"))
    assert open_base(BaseConfig(name=base), indices).notices == []


@pytest.mark.parametrize("of_base", [False, True])
def test_tokens_without_embeddings_are_refused_unless_the_base_has_them(tmp_path, of_base) -> None:
    """The tokenizer of Gemma 3 1B has one more token than the model has embeddings."""
    folder = tiny_runs.save_base(tmp_path / "base")
    base = lorakit.load_base(folder, dtype="float32")
    adapters = lorakit.attach(base.model, lorakit.LoRA(rank=2))
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["[OWN]"]})
    adapters.save(
        tmp_path / "a", tokenizer=base.tokenizer, provenance={"task": "completion", "labels": []}
    )
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", tiny_runs.pairs(2))
    config = EvaluateConfig(
        adapter=str(tmp_path / "a"), data=DataConfig(test=test), scores=("loss",), compare=False
    )
    if of_base:
        base.tokenizer.save_pretrained(folder)
        evaluate(config)
        return
    with pytest.raises(AdapterFileError, match=r"has \d+ tokens, and the base has \d+ embeddings"):
        evaluate(config)


def test_invalid_recorded_settings_are_an_error(trained, tmp_path) -> None:
    adapter = save_with_data(trained, tmp_path / "adapter", columns="question")
    with pytest.raises(AdapterFileError, match=r"records invalid settings .* data\.columns is"):
        evaluate(settings(trained, adapter=adapter, scores=("loss",)))


def test_the_loss_is_the_mean_over_all_targets(trained, tmp_path) -> None:
    """Completions of 1 to 15 words, in batches of two: a mean of the means of batches differs."""
    words = tiny_runs.WORDS
    rows = [
        {"prompt": "food:", "completion": "".join(f" {words[i % 13]}" for i in range(count))}
        for count in (1, 15, 2, 9, 1)
    ]
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", rows)
    config = settings(trained, scores=("loss",), batch_size=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=test))
    model = AutoModelForCausalLM.from_pretrained(trained / "base").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    with torch.no_grad():
        examples = load_examples(config.data, "test", tokenizer)
        losses = [tiny_runs.summed_loss(model, example) for example in examples]
    mean = float(sum(loss for loss, _ in losses)) / sum(count for _, count in losses)
    assert evaluate(config).scores["loss"] == pytest.approx(mean, rel=1e-5)


def test_rows_that_share_a_prompt_are_one_input_with_several_references(trained, tmp_path) -> None:
    rows = [
        {"prompt": "river pub:", "completion": " river"},
        {"prompt": "food:", "completion": " food"},
        {"prompt": "river pub:", "completion": " the river"},
    ]
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", rows)
    config = settings(trained, output=str(tmp_path / "out.jsonl"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=test))
    result = evaluate(config)
    assert set(result.scores) == {"loss", "perplexity", "bleu", "rouge_l"}
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records == result.outputs
    assert [r["prompt"] for r in records] == ["river pub:", "food:"]
    assert [r["references"] for r in records] == [["river", "the river"], ["food"]]
    first = evaluate(dataclasses.replace(config, limit=1, output=None))
    assert first.outputs == result.outputs[:1]
    assert first.scores["loss"] != pytest.approx(result.scores["loss"], rel=1e-4)


def test_a_limit_takes_evenly_spaced_prompts_and_ignores_the_other_rows(trained, tmp_path) -> None:
    """Neighbours in a file are similar; WebNLG's is sorted by the number of triples."""
    rows = [{"prompt": f"river {n // 2}:", "completion": f" pub {n}"} for n in range(20)]
    rows[-1]["completion"] = " pub" * 100  # does not fit into the context of 64 tokens
    data = DataConfig(test=tiny_runs.write_rows(tmp_path / "test.jsonl", rows))
    config = settings(trained, data=data, scores=("loss",), limit=5)
    assert evaluate(config).examples == 10
    scored = evaluate_module._read(config, None).examples
    assert [example.prompt for example in scored[::2]] == [f"river {n}:" for n in (0, 2, 4, 6, 8)]
    with pytest.raises(LorakitError, match="context"):
        evaluate(dataclasses.replace(config, limit=None))


def test_scores_are_shown_if_the_outputs_cannot_be_written(trained, tmp_path, monkeypatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapter, output = str(trained / "run" / "adapter"), str(tmp_path / "out.jsonl")
    config = settings(trained, adapter=adapter, output=output, scores=("loss",), compare=True)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="disk full") as refused:
        evaluate(config)
    _, scores, of_base = str(refused.value).split("\n")
    result = evaluate(dataclasses.replace(config, output=None))
    for line, expected in ((scores, result.scores), (of_base, result.base_scores)):
        assert line.endswith(
            f": loss {number(expected['loss'])}, perplexity {number(expected['perplexity'])}"
        )


@pytest.mark.parametrize(("context", "kept"), [(512, 40), (40, 36)])
def test_the_length_of_a_reference_does_not_change_the_prompt(
    trained, tmp_path, monkeypatch, context: int, kept: int
) -> None:
    """A long reference leaves less room for the prompt in training, not in generation."""
    prompt, received = "river pub:" * 20, []
    rows = [{"prompt": prompt, "completion": " food" * count} for count in (1, 5, 100)]
    data = DataConfig(
        test=tiny_runs.write_rows(tmp_path / "test.jsonl", rows), max_length=40, too_long="truncate"
    )
    monkeypatch.setattr(inputs, "context_length", lambda model: context)

    def recording(model, tokenizer, prompts, *args, **kwargs):
        received.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(evaluate_module, "generate", recording)
    (record,) = evaluate(settings(trained, data=data, scores=("text",))).outputs
    assert record["references"] == [row["completion"].strip() for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    assert received == [tokenizer(prompt)["input_ids"][-kept:]]


def test_a_prompt_near_the_context_is_cut_like_a_longer_one(trained, tmp_path) -> None:
    """In a context of 64 tokens, of which the answers need 20."""
    rows = [{"prompt": "z" * count, "completion": " z"} for count in (30, 50, 58, 100)]
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", rows)
    data = DataConfig(test=test, max_length=64, too_long="truncate")
    config = settings(trained, data=data, decoding=Decoding(max_new_tokens=20))
    assert len(evaluate(config).outputs) == 4


def test_a_prompt_without_room_for_an_answer_stops_before_the_losses(trained, tmp_path) -> None:
    rows = [{"prompt": "z" * count, "completion": " z"} for count in (30, 58)]
    data = DataConfig(test=tiny_runs.write_rows(tmp_path / "test.jsonl", rows))
    config = settings(trained, data=data, decoding=Decoding(max_new_tokens=20))
    with pytest.raises(
        DataError, match=r"test\.jsonl:2 has 58 tokens; with max_new_tokens 20 that"
    ):
        evaluate(config, progress=lambda *_: pytest.fail("scored"))
    data = dataclasses.replace(data, too_long="truncate")
    config = settings(trained, data=data, decoding=Decoding(max_new_tokens=64))
    with pytest.raises(DataError, match=r"test\.jsonl:1 has 30 tokens; with max_new_tokens 64"):
        evaluate(config)


def test_answers_that_are_cut_are_counted(trained, monkeypatch, caplog) -> None:
    def answers(model, tokenizer, prompts, *_, on_cut, **__):
        on_cut(1)
        return ["river\n\npub"] * len(prompts)

    monkeypatch.setattr(evaluate_module, "generate", answers)
    config = settings(trained, scores=("text",), limit=3)
    result = evaluate(config)
    assert result.cut == 1
    assert answered(result) == ", 3 prompts answered, 1 cut at max_new_tokens"
    assert "decoding.max_new_tokens (4) cut 1 of 3 answers, which lowers their" in caplog.text
    caplog.clear()
    first = classmethod(lambda cls, text: text.split("\n\n")[0])  # as the tasks of the paper
    monkeypatch.setattr(Completion, "answer", first)
    assert evaluate(config).cut == 0
    assert caplog.text == ""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a classifier with named labels."""
    folder = tmp_path_factory.mktemp("classifier")
    base = tiny_runs.save_base(folder / "base", "bert", "base")
    names = ("dry", "wet")
    rows = [{**row, "label": names[row["label"]]} for row in tiny_runs.labelled(80)]
    tiny_runs.write_rows(folder / "train.jsonl", rows[:60])
    tiny_runs.write_rows(folder / "validation.jsonl", rows[60:])
    train(
        tiny_runs.config(
            folder, base, optimizer=OptimizerConfig(learning_rate=2e-2), epochs=10, seed=1
        )
    )
    return folder


@pytest.mark.slow
def test_a_classifier_is_scored_with_the_labels_it_was_trained_with(classifier, tmp_path) -> None:
    result = json.loads((classifier / "run" / "result.json").read_text())
    config = settings(classifier, adapter=str(classifier / "run" / "adapter"))
    scores = evaluate(config).scores
    assert scores == pytest.approx(result["scores"], rel=1e-5)
    assert scores["accuracy"] > 0.7
    # Evaluation needs no training file, and data with only one label does not change the order of the classes.
    rows = [json.loads(line) for line in (classifier / "validation.jsonl").read_text().splitlines()]
    wet = tiny_runs.write_rows(tmp_path / "wet.jsonl", [r for r in rows if r["label"] == "wet"])
    data = DataConfig(train=str(tmp_path / "gone.jsonl"), test=wet)
    outputs = evaluate(dataclasses.replace(config, data=data)).outputs
    assert {record["label"] for record in outputs} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "base"])
@pytest.mark.parametrize("kind", ["trained", "classifier"])
def test_no_training_data_is_needed(kind: str, adapter: bool, request) -> None:
    """Task and labels come from the adapter or from the scored data."""
    folder = request.getfixturevalue(kind)
    config = settings(folder, adapter=str(folder / "run" / "adapter") if adapter else None)
    alone = dataclasses.replace(config, data=DataConfig(test=config.data.test))
    assert evaluate(alone).scores == evaluate(config).scores


@pytest.mark.slow
def test_a_label_that_was_not_trained_is_an_error(classifier, tmp_path) -> None:
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", [{"text": "river", "label": "damp"}])
    config = settings(classifier, adapter=str(classifier / "run" / "adapter"))
    config = dataclasses.replace(config, data=DataConfig(train=test, test=test))
    with pytest.raises(DataError, match=r"damp.*dry, wet"):
        evaluate(config)


def test_another_base_is_refused_unless_allowed(trained, tmp_path) -> None:
    other = tiny_runs.save_base(tmp_path / "other", seed=5)
    config = settings(
        trained,
        base=BaseConfig(name=other, dtype="float32", device="cpu"),
        adapter=str(trained / "run" / "adapter"),
        scores=("loss",),
    )
    with pytest.raises(WrongBaseError):
        evaluate(config)
    assert evaluate(dataclasses.replace(config, allow_other_base=True)).scores["loss"] > 0


def test_data_of_another_task_is_refused(classifier: Path) -> None:
    config = settings(classifier, adapter=str(classifier / "run" / "adapter"))
    data = dataclasses.replace(config.data, task="completion")
    with pytest.raises(ConfigurationError, match="trained for classification"):
        evaluate(dataclasses.replace(config, data=data))


def test_an_encoder_decoder_is_scored(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "t5")
    tiny_runs.config(tmp_path, base)  # writes the data
    result = evaluate(settings(tmp_path))
    assert set(result.scores) == {"loss", "perplexity", "bleu", "rouge_l"}


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("completion", "sacrebleu.metrics.bleu"),
        ("samsum", "rouge_score.rouge_scorer"),
        ("classification", "sklearn"),
        ("regression", "scipy"),
    ],
)
def test_a_missing_package_shows_before_the_model_runs(tmp_path, monkeypatch, kind, module) -> None:
    rows = {
        "completion": tiny_runs.pairs(2),
        "samsum": [{"dialogue": "A: hi", "summary": "A greets."}],
        "classification": [{"text": "a", "label": "dry"}, {"text": "b", "label": "wet"}],
        "regression": [{"text": "a", "score": 1.5}],
    }[kind]
    labels = kind in ("classification", "regression")
    tiny_runs.save_base(tmp_path / "base", *(("bert", "base") if labels else ()))
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", rows)
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("generate", "held_out"):
        monkeypatch.setattr(evaluate_module, name, lambda *_, **__: pytest.fail("ran the model"))
    config = settings(tmp_path, data=DataConfig(task=kind, test=test))
    if not labels:
        config = dataclasses.replace(config, scores=("text",))
    with pytest.raises(ConfigurationError, match=r'pip install "lorakit\[train\]"'):
        evaluate(config)


def test_an_error_in_a_score_of_labels_shows_before_the_base_is_loaded(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "mine.py").write_text("""
from lorakit.tasks import Classification

class Mine(Classification):
    name = "mine"

    @classmethod
    def score(cls, outputs, examples, **settings):
        assert settings == {"classes": 2}
        assert outputs == [example.label for (example,) in examples] == [1, 0, 1]
        raise ZeroDivisionError
""")
    tiny_runs.save_base(tmp_path / "base", "bert", "base")
    rows = [{"text": text, "label": label} for text, label in zip("abc", "yny", strict=True)]
    test = tiny_runs.write_rows(tmp_path / "test.jsonl", rows)
    monkeypatch.setattr(evaluate_module, "open_adapted", lambda *_, **__: pytest.fail("loaded"))
    data = DataConfig(task=f"{tmp_path / 'mine.py'}:Mine", test=test)
    with pytest.raises(ZeroDivisionError):
        evaluate(settings(tmp_path, data=data))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"scores": ()}, "scores is empty"), ({"limit": 0}, "limit"), ({"split": "train"}, "split")],
)
def test_settings_that_cannot_work_say_why(trained, overrides, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings(trained, **overrides)


def test_a_model_whose_output_is_not_finite_says_so(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base")
    tiny_runs.config(tmp_path, base)  # writes the data
    broken = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    broken.save_pretrained(base)
    with pytest.raises(LorakitError, match=r"loss is nan.*'lm_head\.weight' holds NaN"):
        evaluate(settings(tmp_path, scores=("loss",)))


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "Set base.dtype float32"),
        (torch.bfloat16, "Use another base"),  # it has the range of float32
        (torch.float32, "Use another base"),
    ],
)
def test_only_float16_is_advised_to_change(dtype: torch.dtype, advice: str) -> None:
    assert advice in why_not_finite(nn.Linear(2, 2).to(dtype))


@pytest.mark.parametrize(
    ("data", "split"),
    [
        ({"task": "mrpc"}, "validation"),
        ({"task": "samsum"}, "test"),
        ({"task": "mrpc", "test": "mine.jsonl"}, "test"),
        ({"task": "samsum", "validation": "mine.jsonl"}, "validation"),
        ({"task": "samsum", "train": "mine.jsonl", "validation_fraction": 0.1}, "test"),
        ({"task": "mrpc", "test": "mine.jsonl", "validation": "v.jsonl"}, "validation"),
        ({"train": "mine.jsonl", "validation_fraction": 0.1}, "validation"),
    ],
)
def test_a_file_that_is_named_is_scored_before_a_published_split(data, split: str) -> None:
    assert EvaluateConfig(data=DataConfig(**data)).scored_split() == split
    with pytest.raises(ConfigurationError, match="There is no data to score"):
        EvaluateConfig().scored_split()


def test_outputs_do_not_go_where_the_report_goes(trained):
    with pytest.raises(ConfigurationError, match=r"ends in \.jsonl"):
        settings(trained, output="w/o.html")


@pytest.mark.slow
def test_an_output_of_another_process_stays(trained, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out.jsonl"
    score = evaluate_module._score

    def score_meanwhile(*args, **options):
        output.write_text("first")
        return score(*args, **options)

    monkeypatch.setattr(evaluate_module, "_score", score_meanwhile)
    config = settings(trained, output=str(output), scores=("loss",), limit=1)
    with pytest.raises(RunFolderError, match="in the meantime"):
        evaluate(config)
    assert output.read_text() == "first"


@pytest.mark.slow
def test_plain_text_is_trained_and_scored_by_its_loss_alone(tmp_path, capsys) -> None:
    base = tiny_runs.save_base(tmp_path / "base")
    rows = [{"text": f"the river pub {n % 3}"} for n in range(24)]
    data = DataConfig(
        train=tiny_runs.write_rows(tmp_path / "texts.jsonl", rows),
        test=tiny_runs.write_rows(tmp_path / "held.jsonl", rows[:3]),
        validation_fraction=0.3,
    )
    train(tiny_runs.config(tmp_path, base, data=data))
    assert "task      text: plain text" in capsys.readouterr().err
    adapter = str(tmp_path / "run" / "adapter")
    result = evaluate(settings(tmp_path, data=data, adapter=adapter))
    assert set(result.scores) == {"loss", "perplexity"}
    before = evaluate(settings(tmp_path, data=data))
    assert result.base_scores == pytest.approx(before.scores)
    with pytest.raises(ConfigurationError, match="task text has no references"):
        evaluate(settings(tmp_path, data=data, scores=("text",)))
    assert result.scores["loss"] < before.scores["loss"]
    limited = evaluate(settings(tmp_path, data=data, adapter=adapter, limit=1))
    assert limited.scores["loss"] != result.scores["loss"]
