"""`lorakit predict` on rows without labels."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
import tiny_runs
import torch

import lorakit
from lorakit.cli import main
from lorakit.compute.adapted import open_adapted
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.batching import collator
from lorakit.data import DataConfig, DataTask
from lorakit.data.readers import read_jsonl
from lorakit.data.rows import Row
from lorakit.errors import (
    AdapterFileError,
    ConfigurationError,
    DataError,
    DivergenceError,
    RunFolderError,
)
from lorakit.evaluation import predict
from lorakit.evaluation.evaluate import Evaluation
from lorakit.evaluation.predict import Predictions
from lorakit.models.base_config import BaseConfig
from lorakit.tasks.classification import Classification
from lorakit.training.config import HeldOutConfig

NAMES = ("wet", "dry")
TEXTS = [row["text"] for row in tiny_runs.labelled(12, seed=5)]


@pytest.fixture(scope="module", params=["classification", "regression"])
def trained(request, tmp_path_factory) -> Path:
    """A folder with a base and an adapter for labels that is one step old."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_runs.save_base(folder / "base", "bert", "base")
    rows = tiny_runs.labelled(16)
    if request.param == "classification":
        rows = [{"text": row["text"], "label": NAMES[row["label"]]} for row in rows]
    else:
        rows = [{"text": row["text"], "score": row["label"] + 0.5} for row in rows]
    data = DataConfig(train=tiny_runs.write_rows(folder / "train.jsonl", rows))
    lorakit.train(
        tiny_runs.config(
            folder, base, data=data, max_steps=1, evaluation=HeldOutConfig(), batch_size=8
        )
    )
    return folder


def settings(folder: Path, rows: list[dict], tmp_path: Path, **data):
    return lorakit.PredictConfig(
        base=BaseConfig(name=str(folder / "base"), dtype="float32", device="cpu"),
        adapter=str(folder / "run" / "adapter"),
        data=DataConfig(test=tiny_runs.write_rows(tmp_path / "new.jsonl", rows), **data),
        output=str(tmp_path / "out.jsonl"),
        batch_size=5,
    )


def test_the_last_line_of_a_notebook_s_cell_shows_no_rows() -> None:
    rows = [{"text": "river"}] * 600
    for result in (Evaluation(outputs=rows), Predictions(rows=rows, report="600 rows")):
        assert "river" not in repr(result)


def test_rows_are_read_by_the_columns_of_training(trained, tmp_path, monkeypatch) -> None:
    config = settings(trained, [{"body": TEXTS[0], "text": 7}], tmp_path)
    adapter = AdapterFile.read(config.adapter)
    assert adapter is not None
    adapter.provenance["config"]["data"]["columns"] = {"text": "body", "label": "stars"}
    monkeypatch.setattr(AdapterFile, "read", lambda path: adapter)
    assert len(lorakit.predict(config).rows) == 1


@pytest.mark.slow
def test_predictions_are_those_of_the_model_and_stand_beside_their_rows(trained, tmp_path) -> None:
    rows = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
    config = settings(trained, rows, tmp_path, columns={"text": "body"})
    result = lorakit.predict(config)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == result.rows
    assert [{"id": row["id"], "body": row["body"]} for row in written] == rows

    labels = {"label": "wet"} if trained.name.startswith("class") else {"score": 1.5}
    known = [{"text": text, **labels} for text in TEXTS]
    evaluated = lorakit.evaluate(
        lorakit.EvaluateConfig(
            base=config.base,
            adapter=config.adapter,
            data=DataConfig(test=tiny_runs.write_rows(tmp_path / "known.jsonl", known)),
        )
    )
    if "label" in labels:
        outputs = [record["output_name"] for record in evaluated.outputs]
        assert [row["prediction"] for row in written] == outputs
        for row in written:
            assert set(row["probabilities"]) == set(NAMES)
            assert sum(row["probabilities"].values()) == pytest.approx(1)
            assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]
        mean = sum(torch.log(torch.tensor([r["probabilities"]["wet"] for r in written]))) / 12
        assert evaluated.scores["loss"] == pytest.approx(-float(mean), rel=1e-5)
        assert sum(result.counts.values()) == 12
    else:
        outputs = [record["output"] for record in evaluated.outputs]
        assert [row["prediction"] for row in written] == pytest.approx(outputs, rel=1e-5)
        assert result.counts == {}


def with_hook(monkeypatch, hook) -> None:
    """Let `predict` open a base with a forward hook on its embedding."""

    def opened(*args, **settings):
        base = open_adapted(*args, **settings)
        base.model.get_input_embeddings().register_forward_hook(hook)
        return base

    monkeypatch.setattr(predict, "open_adapted", opened)


@pytest.mark.slow
def test_rows_are_predicted_in_halved_batches(trained, tmp_path, monkeypatch) -> None:
    config = settings(trained, [{"text": text} for text in TEXTS], tmp_path)
    rows = lorakit.predict(config).rows
    sizes = []

    def limit(module, args, output) -> None:
        sizes.append(len(args[0]))
        if sizes[-1] > 2:
            raise MemoryError

    with_hook(monkeypatch, limit)
    limited = lorakit.predict(dataclasses.replace(config, overwrite=True)).rows
    assert sizes[:3] == [5, 2, 2]
    for one, other in zip(rows, limited, strict=True):
        numbers = "probabilities" if "probabilities" in one else "prediction"
        assert other[numbers] == pytest.approx(one[numbers], rel=1e-5)


@pytest.mark.slow
def test_output_that_is_not_finite_has_its_cause(trained, tmp_path, monkeypatch) -> None:
    with_hook(monkeypatch, lambda module, args, output: output * math.nan)
    with pytest.raises(DivergenceError, match="not finite: all weights are finite, but an activ"):
        lorakit.predict(settings(trained, [{"text": "x"}], tmp_path))


@pytest.mark.slow
def test_the_command_writes_the_file_and_counts_the_classes(trained, tmp_path, capsys) -> None:
    data = tmp_path / "new.csv"
    data.write_text("text\nriver pub\ncheap food\n")
    output = tmp_path / "out.jsonl"
    line = f"predict --adapter {trained / 'run' / 'adapter'} --data.test {data} --output {output}"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert f"{data}: 2 of 2 rows" in out
    assert ("predictions" in out) == trained.name.startswith("class")
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"body": "x"}],
            r"its columns are body; task \w+ predicts from text or sentence1 and sen",
        ),
        ([{"text": "x"}, {"text": " "}], r"new\.jsonl:2: 'text' is empty"),
        ([{"text": "x", "prediction": 1}], "has a column 'prediction'"),
    ],
)
def test_rows_that_cannot_be_predicted_are_named(trained, tmp_path, rows, message) -> None:
    config = settings(trained, rows, tmp_path)
    with pytest.raises(DataError, match=message):
        lorakit.predict(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("new.csv", b"text,author\nriver pub,caf\xe9\nx,y\n", r"new\.csv:2: 'author' is not UTF-8"),
        (
            "new.jsonl",
            b'{"text": "x", "ids": ["\\ud800"]}\n',
            r"new\.jsonl:1: 'ids' contains half of",
        ),
        ("new.jsonl", b'{"text": "x"}\n{"text"}\n', r"new\.jsonl:2: not valid JSON"),
        ("new.jsonl", b'{"text": "x", "probabilities": 1}\n', "has a column 'probabilities'"),
        ("new.jsonl", b'{"text": "' + b"x " * 1000 + b'"}\n', "are longer than max_length"),
    ],
)
def test_rows_that_cannot_be_used_show_before_the_base_is_loaded(
    trained, tmp_path, monkeypatch, name, content, problem
) -> None:
    monkeypatch.setattr(predict, "open_adapted", lambda *_, **__: pytest.fail("opened the base"))
    config = settings(trained, [], tmp_path)
    (tmp_path / name).write_bytes(content)
    data = DataConfig(test=str(tmp_path / name))
    with pytest.raises(DataError, match=problem):
        lorakit.predict(dataclasses.replace(config, data=data))


@pytest.mark.slow
def test_the_output_has_the_rows_and_values_that_json_can_hold(trained, tmp_path) -> None:
    numbers = [math.nan, math.inf, 2.5]
    table = pyarrow.table(
        {"text": TEXTS[:3], "price": numbers, "parts": [[{"x": n}] for n in numbers]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    (tmp_path / "new.csv").write_bytes(b"text,author\nriver pub,caf\xe9\ncheap food,ok\n")
    data = DataConfig(
        test=[str(tmp_path / "new.parquet"), str(tmp_path / "new.csv")], bad_rows="skip"
    )
    config = dataclasses.replace(settings(trained, [], tmp_path), data=data)
    result = lorakit.predict(config)
    written = list(read_jsonl(Path(config.output)))
    assert [row.values for row in written if isinstance(row, Row)] == result.rows
    assert [row.get("price") for row in result.rows] == [None, None, 2.5, None]
    assert [row.get("parts") for row in result.rows[:3]] == [[{"x": n}] for n in (None, None, 2.5)]
    assert result.rows[3]["author"] == "ok"
    assert "1 bad, skipped" in result.report


@pytest.mark.slow
def test_an_existing_output_stays(trained, tmp_path) -> None:
    config = settings(trained, [{"text": "x"}], tmp_path)
    Path(config.output).write_text("mine")
    with pytest.raises(RunFolderError):
        lorakit.predict(config)
    assert Path(config.output).read_text() == "mine"


@pytest.mark.slow
def test_an_output_of_another_process_stays(trained, tmp_path, monkeypatch) -> None:
    config = settings(trained, [{"text": "x"}], tmp_path)
    compute = predict._logits

    def compute_meanwhile(*args):
        Path(config.output).write_text("first")
        return compute(*args)

    monkeypatch.setattr(predict, "_logits", compute_meanwhile)
    with pytest.raises(RunFolderError, match="in the meantime"):
        lorakit.predict(config)
    assert Path(config.output).read_text() == "first"


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"task": "chat", "labels": []}, "run lorakit generate --adapter .*adapter --file .*new"),
        ({}, "records no task"),
    ],
)
def test_an_adapter_without_labels_is_refused(tmp_path, provenance, message) -> None:
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2))
    adapters.save(tmp_path / "run" / "adapter", provenance=provenance)
    with pytest.raises(ConfigurationError, match=message):
        lorakit.predict(settings(tmp_path, [{"text": "x"}], tmp_path))


def test_evaluating_rows_without_labels_names_predict(trained, tmp_path, capsys) -> None:
    new = tiny_runs.write_rows(tmp_path / "new.jsonl", [{"id": 1, "text": "a"}])
    adapter = str(trained / "run" / "adapter")
    base = str(trained / "base")
    assert main(["evaluate", "--adapter", adapter, "--base.name", base, "--data.test", new]) == 1
    message = capsys.readouterr().err
    target = "label" if trained.name.startswith("class") else "score"
    assert f"its columns are id, text, without a {target} to compare with." in message
    assert f"run lorakit predict --adapter {adapter} --data.test {new} --output" in message


@pytest.mark.slow
def test_a_new_head_is_trained_and_saved_beside_the_modules_that_the_user_names(tmp_path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "bert", "masked-lm")  # without a pooler too
    data = DataConfig(train=tiny_runs.write_rows(tmp_path / "train.jsonl", tiny_runs.labelled(16)))
    method = lorakit.LoRA(rank=2, train_modules="output.LayerNorm")
    run = tiny_runs.config(
        tmp_path, base, data=data, lora=method, max_steps=2, seed=3, evaluation=HeldOutConfig()
    )
    result = lorakit.train(run)
    stored = AdapterFile.read(str(result.adapter)).stored
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= stored.trained.keys()
    lorakit.predict(settings(tmp_path, [{"text": text} for text in TEXTS], tmp_path))


def test_a_decoder_finds_the_padding_of_the_adapters_own_tokenizer(tmp_path) -> None:
    """It classifies the last token that is no padding. Folders of Trainer have a tokenizer that may pad otherwise."""
    base = tiny_runs.save_base(tmp_path / "base", "llama", "sequence-classification", num_labels=2)
    file, model = tmp_path / "adapter", lorakit.load_base(base, task="sequence-classification")
    lorakit.attach(model.model, lorakit.LoRA(rank=2)).save(file)
    tokenizer = model.text_tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(file)
    opened = open_adapted(
        BaseConfig(name=base, dtype="float32", device="cpu"),
        AdapterFile.read(str(file)),
        task=DataTask(name="classification", labels=NAMES),
    )
    task = Classification(tokenizer, max_length=64, labels=NAMES)
    rows = [task.encode_unlabelled({"text": text}) for text in ("river pub", "a longer river pub")]
    batch = collator(opened)(rows)
    with torch.no_grad():
        together = opened.model(**{**batch, "labels": None}).logits
        alone = opened.model(input_ids=torch.tensor([rows[0].input_ids])).logits
    torch.testing.assert_close(together[:1], alone)


def test_an_adapter_without_the_head_that_its_base_lacks_is_refused(tmp_path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    model = lorakit.load_base(base, task="sequence-classification", num_labels=2).model
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    provenance = {"task": "classification", "labels": ["dry", "wet"]}
    adapters.save(tmp_path / "run" / "adapter", provenance=provenance)
    with pytest.raises(AdapterFileError, match="which the base lacks: its answers would be random"):
        lorakit.predict(settings(tmp_path, [{"text": text} for text in TEXTS], tmp_path))
