"""A run reads its data once, hashes its base once, and looks for the targets of a batch once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import tiny_runs

from lorakit.adapters import formats
from lorakit.adapters.formats import fingerprint
from lorakit.adapters.installed import base_parameters
from lorakit.cli import main
from lorakit.compute import objective
from lorakit.data import DataConfig, examples
from lorakit.data.batches import collate
from lorakit.data.packing import pack
from lorakit.models import loading
from lorakit.planning.batches import language_examples
from lorakit.training.config import HeldOutConfig
from lorakit.training.loop import train
from lorakit.training.setup import prepare


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Count the calls of a function of a module."""

    def count(module: object, name: str) -> list[object]:
        counted: list[object] = []
        function = getattr(module, name)

        def counting(*args: object, **kwargs: object) -> object:
            counted.append(args[0] if args else None)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
        return counted

    return count


def test_a_run_and_its_use_repeat_no_work(tmp_path: Path, calls, capsys) -> None:
    base = tiny_runs.save_base(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "pairs.jsonl", tiny_runs.pairs(60))
    reads = calls(examples, "read_source")
    hashes = calls(fingerprint, "hash_weights")
    tokenizers = calls(loading, "tokenizer_of")
    config = tiny_runs.config(
        tmp_path,
        base,
        data=DataConfig(train=data, validation_fraction=0.2),
        evaluation=HeldOutConfig(every=2),
        epochs=1,
    )
    result = train(config)
    assert result.best_step  # best adapters were saved
    assert reads == [data]
    assert len(hashes) == len(tokenizers) == 1

    adapters = calls(formats, "read")
    main(["generate", "--adapter", str(result.adapter), "--prompt", "river:"])
    assert len(adapters) == 1
    main(
        [
            *("evaluate", "--adapter", str(result.adapter), "--data.test", data),
            *("--scores", '["loss"]', "--limit", "4"),
        ]
    )
    assert len(adapters) == 2
    assert "loss" in capsys.readouterr().out


def test_a_run_that_trains_a_head_hashes_each_weight_once(tmp_path: Path, calls) -> None:
    """A resumed run compares also the head, which the adapter's record leaves out."""
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    data = DataConfig(train=tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.labelled(8)))
    hashed = calls(fingerprint, "digests")
    job = prepare(tiny_runs.config(tmp_path, base, data=data, evaluation=HeldOutConfig()))
    assert job.inputs
    assert job.base_record.excluded
    assert len(hashed) == len(set(map(id, hashed))) == len(list(base_parameters(job.model)))


def test_the_targets_of_a_batch_are_looked_up_once(calls) -> None:
    model = tiny_models.build("llama")
    loss = objective.LanguageModellingLoss(path="fused")
    examples = language_examples(1, length=6, target_tokens=3)
    lookups = calls(objective, "targets_of")
    for batch in (collate(examples, 0), pack(examples, 0)):
        lookups.clear()
        assert loss.count(batch) == 3
        loss.loss_sum(model, batch).backward()
        assert len(lookups) == 1
