"""`lorakit compress`, `combine` and `extract` write folders that load and record their inputs."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import tiny_runs
import torch
from random_adapters import randomise

import lorakit
from lorakit import analysis, storage
from lorakit.adapters import formats
from lorakit.analysis import saving
from lorakit.compute import base as compute_base
from lorakit.compute.adapter_file import AdapterFile, recorded_data, recorded_task
from lorakit.data import DataConfig
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.evaluation.scoring_config import ScoringConfig
from lorakit.formatting import number
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import HeldOutConfig
from lorakit.training.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny base, two adapters for it, a merged model, and data to score on."""
    folder = tmp_path_factory.mktemp("algebra")
    tiny_runs.save_base(folder / "base")
    base = lorakit.load_base(folder / "base", dtype="float32")
    model = base.model
    for name, seed in (("one", 1), ("two", 2)):
        handle = lorakit.attach(model, lorakit.LoRA(rank=4, targets="all-linear"), name=name)
        randomise(handle, name, scale=0.1, seed=seed)
        handle.save(
            folder / name,
            name,
            tokenizer=base.tokenizer,
            provenance={"task": "completion", "labels": []},
        )
    handle.activate("one")
    handle.merge(keep_base=False)
    model.save_pretrained(folder / "tuned")
    rows = [
        {"prompt": "The river:", "completion": " cheap food"},
        {"prompt": "A plane:", "completion": " list"},
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def logits(folder: Path, *adapters: tuple[Path, float]) -> torch.Tensor:
    loaded = lorakit.load_base(folder / "base", dtype="float32")
    batch = loaded.tokenizer("The river pub serves food.", return_tensors="pt")
    for i, (path, _) in enumerate(adapters):
        handle = lorakit.load(loaded.model, path, name=f"a{i}")
    handle.activate({f"a{i}": weight for i, (_, weight) in enumerate(adapters)})
    with torch.no_grad():
        return loaded.model(**batch).logits


def test_compress(call, folder, tmp_path):
    status, out, err = call("compress", folder / "one", tmp_path / "small", "--rank", "2")
    assert (status, err) == (0, "")
    assert "model.layers.*.self_attn.q_proj" in out
    stored = formats.read(tmp_path / "small")
    assert {layer.rank for layer in stored.layers.values()} == {2}
    assert stored.provenance["made_by"] == {"command": "compress", "rank": 2, "energy": None}
    (origin,) = stored.provenance["made_from"]
    assert origin["name"] == "one"
    assert origin["sha256"] is not None
    assert stored.provenance["task"] == "completion"
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert '"command": "compress"' in (tmp_path / "small" / "README.md").read_text()
    logits(folder, (tmp_path / "small", 1.0))  # loads on its base


def with_record(folder: Path, target: Path, **record: Any) -> Path:
    """Save the adapter `one` again, with this record of its training."""
    base = lorakit.load_base(folder / "base", dtype="float32")
    lorakit.load(base.model, folder / "one").save(target, provenance={"labels": [], **record})
    return target


def require_file(path: Path) -> AdapterFile:
    found = AdapterFile.read(path)
    assert found is not None
    return found


FORMATS: list[dict[str, Any]] = [
    {"task": "e2e_nlg", "encoding": "prompt"},
    {"task": "mine", "generic_task": "completion"},
    {
        "task": "completion",
        "config": {
            "base": {"dtype": "bfloat16"},
            "data": {"columns": {"prompt": "question"}, "prompt_template": "Question: {question}"},
        },
    },
]


@pytest.mark.parametrize("record", FORMATS, ids=lambda record: record["task"])
def test_the_result_is_used_as_the_original(call, folder, tmp_path, record) -> None:
    original = with_record(folder, tmp_path / "original", **record)
    for words in (["compress", "--rank", "2"], ["combine"], ["combine", "--weights", "[2]"]):
        output = tmp_path / f"{words[0]}-{len(words)}"
        status, _, err = call(words[0], original, "--output", output, *words[1:])
        assert (status, err) == (0, "")
        before, after = (require_file(path) for path in (original, output))
        assert recorded_task(after) == recorded_task(before)
        assert recorded_data(after) == recorded_data(before)
        assert after.stored.setting("base", "dtype") == before.stored.setting("base", "dtype")


def test_adapters_of_different_formats_have_none_in_common(call, folder, tmp_path) -> None:
    """Half a format, such as a task without the encoding of either, would be another one."""
    inputs = [
        with_record(folder, tmp_path / encoding, task="e2e_nlg", encoding=encoding)
        for encoding in ("prompt", "paper")
    ]
    status, _, err = call("combine", *inputs, "--output", tmp_path / "sum")
    assert (status, err) == (0, "")
    assert recorded_task(require_file(tmp_path / "sum")) is None


def test_combine(call, folder, tmp_path):
    # `lorakit train` saves each adapter in a folder of this name.
    run_adapter = shutil.copytree(folder / "two", tmp_path / "second" / "adapter")
    argv = ["combine", folder / "one", run_adapter, "--output", tmp_path / "sum"]
    status, _, err = call(*argv, "--weights", "[0.7, -0.2]")
    assert (status, err) == (0, "")
    expected = logits(folder, (folder / "one", 0.7), (folder / "two", -0.2))
    torch.testing.assert_close(
        logits(folder, (tmp_path / "sum", 1.0)), expected, rtol=1e-4, atol=1e-4
    )
    stored = formats.read(tmp_path / "sum")
    assert [origin["name"] for origin in stored.provenance["made_from"]] == ["one", "second"]
    assert '"name": "second"' in (tmp_path / "sum" / "README.md").read_text()
    assert stored.provenance["error"] == 0


def test_combine_one_is_the_same_files(call, folder, tmp_path):
    status, _, _ = call("combine", folder / "one", "--output", tmp_path / "same")
    assert status == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (folder / "one" / name).read_bytes()


def test_extract(call, folder, tmp_path, monkeypatch):
    argv = [
        "extract",
        folder / "tuned",
        tmp_path / "found",
        "--base.name",
        folder / "base",
        "--rank",
        "4",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        status, out, err = call(*argv)
    assert status == 0
    stages = [line.removesuffix("\033[K") for line in err.split("\r")]
    assert stages[1] == "reading the base ..."
    assert re.fullmatch(r"layer (\d+) of \1 \.\.\.", stages[-3])
    assert stages[-2:] == ["comparing the predictions ...", ""]
    assert "note:" not in out
    expected = logits(folder, (folder / "one", 1.0))
    torch.testing.assert_close(
        logits(folder, (tmp_path / "found", 1.0)), expected, rtol=1e-3, atol=1e-3
    )
    assert formats.read(tmp_path / "found").base is not None
    assert "token differs from the fine-tuned model's in none of " in " ".join(out.split())
    _, out, err = call(*argv[:-1], "1", "--overwrite", "--json")
    assert err == ""
    found = json.loads(out)["agreement"]
    assert found["predicts"] == "token"
    assert 0 < found["changed"] <= found["predictions"]


def test_peft_loads_what_was_extracted_from_full_fine_tuning(call, folder, tmp_path):
    model = lorakit.load_base(folder / "base", dtype="float32").model
    handle = lorakit.attach(model, lorakit.FullFineTuning(), name="full")
    randomise(handle, scale=0.1)
    handle.save(tmp_path / "full")
    assert not (tmp_path / "full" / "adapter_config.json").exists()
    argv = ["extract", tmp_path / "full", tmp_path / "found", "--base.name", folder / "base"]
    assert call(*argv, "--rank", "2")[0] == 0
    assert (tmp_path / "found" / "adapter_config.json").exists()


def test_alpha_is_that_of_the_loralib_files(call, folder, tmp_path):
    stored = formats.read(folder / "one")
    formats.write_loralib(stored, tmp_path / "one.safetensors")
    argv = ["combine", tmp_path / "one.safetensors", folder / "two", "--output", tmp_path / "sum"]
    alpha = 3 * stored.method.alpha
    assert call(*argv, "--alpha", alpha) == (0, ANY, "")
    expected = logits(folder, (folder / "one", 3.0), (folder / "two", 1.0))
    found = logits(folder, (tmp_path / "sum", 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scoring_holds_one_base_at_a_time(call, folder, tmp_path, monkeypatch):
    """The adapted base of the first score is gone when the second one is loaded."""
    opened, alive = [], []
    loading = compute_base.load_base

    def counted(*args: Any, **settings: Any) -> Any:
        alive.append(sum(ref() is not None for ref in opened))
        base = loading(*args, **settings)
        opened.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(compute_base, "load_base", counted)
    gc.disable()  # a collection by chance would hide it
    try:
        argv = ["compress", folder / "one", tmp_path / "small", "--energy", "0.5"]
        data = ["--data.test", folder / "test.jsonl", "--base.name", folder / "base"]
        assert call(*argv, *data)[0] == 0
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_results_are_scored_beside_their_inputs(call, folder, tmp_path):
    argv = ["compress", folder / "one", tmp_path / "small", "--energy", "0.5", "--json", "true"]
    status, out, _ = call(
        *argv,
        "--data.test",
        folder / "test.jsonl",
        "--base.name",
        folder / "base",
        "--base.dtype",
        "float32",
    )
    assert status == 0
    facts = json.loads(out)
    before, after = facts["scores"][str(folder / "one")], facts["scores"]["result"]
    assert before["loss"] != after["loss"]
    assert formats.read(tmp_path / "small").provenance["scores"] == after
    assert 0 < facts["error"] < 0.5**0.5
    card = (tmp_path / "small" / "README.md").read_text()
    assert "## Scores" in card

    status, out, _ = call(
        "evaluate",
        "--adapter",
        tmp_path / "small",
        "--data.test",
        folder / "test.jsonl",
        "--base.name",
        folder / "base",
        "--base.dtype",
        "float32",
        "--scores",
        "[loss]",
    )
    assert status == 0
    assert number(after["loss"]) in out


def test_scoring_completes_only_a_copy(folder, tmp_path, caplog) -> None:
    """Opening an adapter on its base adds notices to it, here that the base has another dtype."""
    source = saving.Input.read(folder / "one")
    assert source.stored is not None
    made = analysis.combine_adapters([source.stored])
    scored = analysis.save(
        made,
        tmp_path / "out",
        inputs=[source],
        settings={},
        scoring=ScoringConfig(data=DataConfig(test=str(folder / "test.jsonl"))),
        base=BaseConfig(name=str(folder / "base"), dtype="bfloat16"),
    ).scores
    assert scored[str(folder / "one")] == scored["result"]
    assert [message.partition(":")[0] for message in caplog.messages] == [
        str(folder / "one"),
        str(tmp_path / "out"),
    ]
    assert source.stored.notices == made.adapter.notices == []


def test_what_no_file_can_hold_is_found_before_the_scores(folder, tmp_path, monkeypatch) -> None:
    """Also where the file is written after the scores, because it replaces another."""
    output = shutil.copytree(folder / "two", tmp_path / "out")
    stored = formats.read(folder / "one")
    stored.base_copies["lm_head.weight"] = torch.ones(1)
    made = analysis.Derived(adapter=stored, layers={})
    monkeypatch.setattr(saving, "_score", lambda *_: pytest.fail("scored"))
    scoring = ScoringConfig(data=DataConfig(test=str(folder / "test.jsonl")))
    options: dict[str, Any] = {"settings": {}, "scoring": scoring, "overwrite": True}
    with pytest.raises(AdapterFileError, match="contains base weights"):
        analysis.save(made, output, inputs=[folder / "one"], **options)


def test_an_input_named_result_keeps_its_scores(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "one", tmp_path / "result")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "_score", lambda file, *_: {"rank": file.stored.method.rank})
    made = analysis.compress_adapter("result", rank=2)
    scoring = ScoringConfig(data=DataConfig(test="test.jsonl"))
    saved = analysis.save(made, "small", inputs=["result"], settings={}, scoring=scoring)
    assert saved.scores == {str(tmp_path / "result"): {"rank": 4}, "result": {"rank": 2}}


@pytest.mark.parametrize("command", ["compress", "combine"])
def test_an_input_that_a_training_replaces_meanwhile(
    call, folder, tmp_path, monkeypatch, command
) -> None:
    """The record, and the scores of the input, are of the tensors that the result comes from."""
    shutil.copytree(folder / "one", tmp_path / "best")
    name = f"{command}_adapter" + "s" * (command == "combine")
    compute = getattr(analysis, name)

    def compute_meanwhile(*args: Any, **settings: Any) -> analysis.Derived:
        shutil.rmtree(tmp_path / "best")
        shutil.copytree(folder / "two", tmp_path / "best")
        return compute(*args, **settings)

    scored = []
    monkeypatch.setattr(analysis, name, compute_meanwhile)
    monkeypatch.setattr(saving, "_score", lambda file, *_: scored.append(file.stored) or {})
    argv = [command, tmp_path / "best", "--output", tmp_path / "small", "--rank", "2"]
    status, _, err = call(*argv, "--data.test", folder / "test.jsonl")
    assert (status, err) == (0, "")
    used = folder / "one" / "adapter_model.safetensors"
    (origin,) = formats.read(tmp_path / "small").provenance["made_from"]
    assert origin == {"name": "best", "sha256": storage.sha256(used)}
    q_proj = scored[0].layers["model.layers.0.self_attn.q_proj"]
    assert q_proj.A.equal(formats.read(folder / "one").layers["model.layers.0.self_attn.q_proj"].A)


CALLS = {
    "compress": ["compress", "{one}", "{out}", "--rank", "2"],
    "combine": ["combine", "{one}", "{two}", "--output", "{out}"],
    "extract": ["extract", "{tuned}", "{out}", "--rank", "2", "--base.name", "{base}"],
}


def filled(words: list[str], folder: Path, out: Path) -> list[str]:
    names = {name: folder / name for name in ("one", "two", "base", "tuned")}
    return [word.format(**names, out=out) for word in words]


@pytest.mark.parametrize("command", CALLS)
def test_data_that_cannot_be_read_is_found_before_the_computation(
    call, folder, tmp_path, monkeypatch, command
) -> None:
    def compute(*_: Any, **__: Any) -> None:
        pytest.fail("the result was computed")

    for name in ("compress_adapter", "combine_adapters", "extract_adapter"):
        monkeypatch.setattr(analysis, name, compute)
    argv = [
        *filled(CALLS[command], folder, tmp_path / "out"),
        "--data.test",
        tmp_path / "tets.jsonl",
    ]
    status, _, err = call(*argv)
    assert status == 1
    assert "tets.jsonl" in err


def test_a_gguf_file_is_a_model_and_no_adapter(call, folder, tmp_path) -> None:
    tuned = tmp_path / "tuned.gguf"
    tuned.write_bytes(b"GGUF")
    argv = ["extract", tuned, tmp_path / "out", "--rank", "2", "--base.name", folder / "base"]
    status, _, err = call(*argv, "--data.test", tmp_path / "tets.jsonl")
    assert status == 1
    assert "tets.jsonl" in err


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("compress", ["--energy", "0.5"], "both are given"),
        ("extract", ["--energy", "0.5"], "both are given"),
        ("combine", ["--how", "ties"], "how is ties, which needs density"),
        ("combine", ["--weights", "1"], "2 adapters and 1 weights"),
    ],
)
def test_wrong_arguments_are_found_before_the_data_are_read(
    call, folder, tmp_path, command, more, message
) -> None:
    argv = [*filled(CALLS[command], folder, tmp_path / "out"), *more]
    status, _, err = call(*argv, "--data.test", tmp_path / "tets.jsonl")
    assert status == 1
    assert message in err


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("command", CALLS)
def test_a_result_is_kept_if_its_scoring_ends(
    call, folder, tmp_path, monkeypatch, caplog, command, error
) -> None:
    def score(*_: Any) -> dict[str, float]:
        raise error

    output = tmp_path / "out"
    monkeypatch.setattr(saving, "_score", score)
    argv = [*filled(CALLS[command], folder, output), "--data.test", folder / "test.jsonl"]
    assert call(*argv)[0] != 0
    (warning,) = caplog.messages
    assert warning.startswith(f"the computed adapter is in {output}, without scores")
    stored = formats.read(output)
    assert stored.provenance["made_by"]["command"] == command
    assert "scores" not in stored.provenance


def test_an_output_that_exists_is_kept_until_the_scores_are_known(
    folder, tmp_path, monkeypatch
) -> None:
    """It may be an input."""
    output = tmp_path / "one"
    shutil.copytree(folder / "one", output)
    ranks = []

    def score(file: AdapterFile, *_: Any) -> dict[str, float]:
        ranks.append(max(layer.rank for layer in file.stored.layers.values()))
        if len(ranks) == 1:
            raise ConfigurationError("no score")
        return {"loss": 1.0}

    monkeypatch.setattr(saving, "_score", score)
    small = analysis.compress_adapter(output, rank=2)
    scoring = analysis.ScoringConfig(data=DataConfig(test=str(folder / "test.jsonl")))
    settings: dict[str, Any] = {"settings": {}, "scoring": scoring, "overwrite": True}
    with pytest.raises(ConfigurationError, match=r"^no score$"):
        analysis.save(small, output, inputs=[output], **settings)
    assert max(layer.rank for layer in formats.read(output).layers.values()) == 4
    analysis.save(small, output, inputs=[output], **settings)
    assert ranks == [4, 4, 2]
    assert {layer.rank for layer in formats.read(output).layers.values()} == {2}


def test_a_file_that_is_added_during_the_scoring_is_kept(
    call, folder, tmp_path, monkeypatch
) -> None:
    output = tmp_path / "out"

    def score(*_: Any) -> dict[str, float]:
        (output / "notes.txt").write_text("mine")
        return {"loss": 1.0}

    monkeypatch.setattr(saving, "_score", score)
    argv = [*filled(CALLS["compress"], folder, output), "--data.test", folder / "test.jsonl"]
    status, _, err = call(*argv)
    assert status == 1
    assert "holds files that are not" in err
    assert (output / "notes.txt").read_text() == "mine"
    assert "scores" not in formats.read(output).provenance


def test_one_path_as_inputs_is_an_error(folder, tmp_path) -> None:
    """A text is a sequence of its characters."""
    small = analysis.compress_adapter(folder / "one", rank=2)
    for path in (folder / "one", str(folder / "one")):
        with pytest.raises(ConfigurationError, match=r"one'; a list of paths was expected"):
            analysis.save(small, tmp_path / "small", inputs=path, settings={})


def test_names_of_inputs_are_no_markup(call, folder, tmp_path):
    named = tmp_path / "[red]one"
    shutil.copytree(folder / "one", named)
    status, out, _ = call(
        *("compress", named, tmp_path / "small", "--rank", "1", "--scores", "[loss]"),
        *("--data.test", folder / "test.jsonl", "--base.name", folder / "base"),
    )
    assert status == 0
    assert "[red]one" in "".join(out.split())  # long names fold


@pytest.mark.slow
def test_a_checkpoint_counts_as_an_adapter(call, tmp_path):
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base, max_steps=4, evaluation=HeldOutConfig())
    run_folder = train(config).folder
    step = run_folder / "checkpoints" / "step-000004"
    status, out, _ = call(
        *("compress", step, tmp_path / "small", "--rank", "2", "--json", "true"),
        *("--data.test", tmp_path / "validation.jsonl", "--scores", "[loss]"),
    )
    assert status == 0
    scores = json.loads(out)["scores"]
    expected = json.loads((run_folder / "result.json").read_text())["scores"]["loss"]
    assert scores[str(step)]["loss"] == pytest.approx(
        expected, rel=0.05
    )  # result.json is from float32
    assert "result" in scores
    (made_from,) = formats.read(tmp_path / "small").provenance["made_from"]
    assert made_from == {
        "name": f"{run_folder.name}/step-000004",
        "sha256": storage.sha256(step / "weights.safetensors"),
    }
    assert (tmp_path / "small" / "tokenizer_config.json").exists()


def test_what_peft_cannot_load_stays_so(call, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, dilation=2))
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="0"), name="a")
    randomise(handle)
    handle.save(tmp_path / "one")
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    status, out, _ = call("compress", tmp_path / "one", tmp_path / "small", "--rank", "1")
    assert status == 0
    assert not (tmp_path / "small" / "adapter_config.json").exists()
    assert "Only lorakit can load this folder" in out
    assert formats.read(tmp_path / "small").layers["0"].rank == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compress", "{one}", "{out}"], "neither"),
        (["compress", "{one}", "{one}", "--rank", "2"], "already exists"),
        (["compress", "{base}", "{out}", "--rank", "2"], "holds no adapter"),
        (["combine", "{one}", "--output", "{out}", "--how", "mean"], "how"),
        (["combine", "--output", "{out}"], "adapters"),
        (["extract", "{tuned}", "{out}", "--rank", "2"], "base"),
        (
            [
                "compress",
                "{one}",
                "{out}",
                "--rank=2",
                "--data.validation=x",
                "--split=test",
            ],
            "split is test",
        ),
        (
            ["extract", "{tuned}", "{out}", "--rank=2", "--base.name={base}", "--data.train=x"],
            "There is no data to score",
        ),
        (
            ["compress", "{one}", "{out}", "--rank", "2", "--batch_size", "0"],
            "batch_size is 0",
        ),
        (
            ["extract", "{base}", "{out}", "--base.name", "{base}", "--rank", "2"],
            "nothing to extract",
        ),
        (["compress", "{one}", "{base}", "--rank", "2", "--overwrite", "true"], "not an adapter's"),
    ],
)
def test_a_wrong_call_is_one_clear_message(call, folder, tmp_path, argv, message):
    names = {name: folder / name for name in ("one", "two", "base", "tuned")} | {
        "out": tmp_path / "out"
    }
    status, _, err = call(*(word.format(**names) for word in argv))
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
