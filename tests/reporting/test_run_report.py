"""The page of a run shows the numbers of its folder."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import HOSTILE

from lorakit import LoRA, storage
from lorakit.configuration import as_dict
from lorakit.errors import RunFolderError
from lorakit.evaluation.score import DIRECTIONS
from lorakit.formatting import number
from lorakit.methods.registry import SECTIONS
from lorakit.reporting import RunRecord, measures, read_run, run_page
from lorakit.reporting.comparison import comparison_page
from lorakit.reporting.page import Section, Table, cell_text
from lorakit.reporting.run_settings import main_settings, settings_text
from lorakit.reporting.run_summary import describe_method, in_sentence


def text_of(page: str) -> str:
    """Return the visible text of a page."""
    body = page.split("<body>")[1].split("<script>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_change_is_relative_only_where_that_means_something() -> None:
    assert measures.change(3.0, 4.0) == "-1.000 (-25.0 %)"
    assert measures.change(-0.3, -0.2) == "-0.1000 (-50.0 %)"
    assert measures.change(0.27, -0.01) == "+0.2800"  # the signs differ: no relative change
    assert measures.change(0.5, 0.0) == "+0.5000"


@pytest.mark.parametrize("name", ["BLEU", "ROUGE-L", "F1", "Matthews correlation"])
def test_names_that_stay_as_they_are_in_a_sentence(name) -> None:
    assert in_sentence(name) == name
    assert in_sentence("Mean squared error") == "mean squared error"


def test_the_numbers_of_a_run_are_on_its_page(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    page = run_page(read_run(run))
    text = text_of(page.render())
    before, after = result["scores_before"], result["scores"]
    for score in ("loss", "perplexity", "bleu", "rouge_l"):
        assert number(float(after[score])) in text
        assert number(float(before[score])) in text
    assert (
        f"On held-out data, loss of 12 examples fell from {number(before['loss'])} to {number(after['loss'])}"
        in text
    )
    assert "A LoRA adapter of rank 8" in text
    assert "44 steps" in text
    assert f"{result['computed_tokens']:,}" in text
    weights = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{weights / 1000:.3g} kB" in text
    record = json.loads((run / "adapter" / "lorakit.json").read_text())
    assert record["provenance"]["data"]["train"]["sha256"] in text
    assert record["base"]["exact"] in text
    assert "batch_size: 4" in text


@pytest.mark.parametrize(
    ("validation", "expected"),
    [
        ({"examples": 1200, "training_examples": 0}, "None of its examples is used for training."),
        (
            {"examples": 1200, "training_examples": 3},
            "3 of its 1,200 examples are used for training too, so the scores partly measure memorisation.",
        ),
        ({}, ""),
        ({"examples": "many", "training_examples": 3}, ""),
    ],
)
def test_scores_on_training_rows_are_called_so(
    run: Path, validation: dict[str, Any], expected: str
) -> None:
    record = read_run(run)
    written = record.provenance["data"]["validation"]
    rows = [json.loads(line) for line in Path(written["source"]).read_text().splitlines()]
    training = Path(record.provenance["data"]["train"]["source"]).read_text().splitlines()
    repeated = sum(row in map(json.loads, training) for row in rows)
    assert (written["examples"], written["training_examples"]) == (len(rows), repeated)
    data = {"validation": validation}
    record = dataclasses.replace(record, provenance={**record.provenance, "data": data})
    assert record.memorisation == expected
    assert f"Scores on the validation data. {expected}".strip() in text_of(
        run_page(record).render()
    )


@pytest.mark.parametrize(("times", "note"), [(0.5, None), (1.0, None), (40.0, "40 times as large")])
def test_a_base_is_compared_with_a_smaller_adapter_only(run: Path, times, note) -> None:
    record = read_run(run)
    sizes = {**record.sizes, "base_bytes": int(times * record.adapter_bytes)}
    record = dataclasses.replace(record, sessions=[{**record.sessions[-1], "sizes": sizes}])
    text = text_of(run_page(record).render())
    assert ("times as large" in text) == (note is not None)
    assert note is None or note in text


def test_several_files_of_data_are_named_below_the_title(run: Path) -> None:
    record = read_run(run)
    data = {**record.config["data"], "train": ["a.jsonl", "b.jsonl"]}
    record = dataclasses.replace(record, config={**record.config, "data": data})
    assert run_page(record).subtitle.endswith(" · a.jsonl, b.jsonl")


def test_the_curves_hold_every_step(run: Path) -> None:
    page = html.unescape(run_page(read_run(run)).render())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record["step"]
        if record["split"] == "train":
            assert f'"loss of a step, step {step}: {number(record["loss"])}"' in page
            assert f'"learning rate, step {step}: {number(record["learning_rate"])}"' in page
        else:
            assert f"step {step}: {number(record['rouge_l'])}" in page


def test_samples_stand_side_by_side_with_their_differences(run: Path) -> None:
    records = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    page = run_page(read_run(run)).render()
    samples = page.split('id="samples"')[1].split("</section>")[0]
    assert samples.count('<article class="sample">') == 4
    assert "Before training" in samples
    assert "After 44 steps" in samples
    assert "<mark>" in samples
    text = " ".join(html.unescape(re.sub(r"</?mark>", "", samples)).split())
    for record in records:
        if record["step"] in (0, 44):
            assert " ".join(record["output"].split()) in text
            assert record["references"][0] in text


def test_a_long_prompt_is_whole_on_the_page_with_its_middle_folded(run: Path) -> None:
    record = read_run(run)
    prompt = f"<|go|>first {' '.join(f'word{i}' for i in range(400))} last<|stop|>"
    samples = [{**s, "prompt": prompt, "special_tokens": ["<|stop|>"]} for s in record.samples]
    page = run_page(dataclasses.replace(record, samples=samples)).render()
    shown = page.split('<pre class="prompt" dir="auto">')[1].split("</pre>")[0]
    start, rest = shown.split("<details")
    folded, end = rest.split("</details>")
    folded = folded.split("</summary>")[1]
    assert "first" in start
    assert 'last<span class="special">&lt;|stop|&gt;</span>' in end
    assert " characters</summary>" in rest
    whole = re.sub(r"<[^>]+>", "", start.split("Prompt: </span>")[1] + folded + end)
    assert html.unescape(whole) == prompt
    assert "special" not in start  # the run recorded that its tokenizer has one such token


def test_the_special_tokens_of_prompts_are_recorded(run: Path) -> None:
    assert all(record["special_tokens"] == [] for record in read_run(run).samples)


def test_texts_from_outside_stay_text(run: Path) -> None:
    page = run_page(read_run(run)).render()
    assert HOSTILE not in page
    assert html.escape(HOSTILE, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")
    assert page.count("<script") == 1
    assert page.count("<img") == 0


def test_predictions_stand_beside_the_measurements(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    predicted = {"seconds": result["seconds"] / 2, "peak_memory": result["peak_memory"] * 2.0}
    page = run_page(dataclasses.replace(read_run(run), predicted=predicted))
    (table,) = [
        b
        for s in page.sections
        for b in s.blocks
        if isinstance(b, Table) and s.anchor == "speed-and-memory"
    ]
    rows = {row[0]: row for row in table.rows}
    assert rows["Time in training steps"][3] == "2.00"
    assert rows["Peak memory"][3] == "0.50"
    assert rows["Adapter file"][1] is None


def test_the_size_of_the_base_is_recorded(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    record = read_run(run)
    model = AutoModelForCausalLM.from_pretrained(record.config["base"]["name"])
    assert record.sizes["base_parameters"] == model.num_parameters()
    assert record.sizes["base_bytes"] == 4 * model.num_parameters()
    stored = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert stored["r"] == 8
    assert 0 < record.sizes["trained_parameters"] < model.num_parameters()


def test_the_settings_leave_out_methods_that_are_not_used(run: Path) -> None:
    settings = settings_text(read_run(run))
    assert "lora:\n" in settings
    assert not re.findall(
        r"^(?:full|bitfit|bottleneck|prefix_\w+|method_settings):", settings, re.M
    )


@pytest.mark.parametrize(
    ("method", "subject", "rows"),
    [
        (
            {"name": "LoRA", "rank": 64, "targets": ["mlp"]},
            "A LoRA adapter of rank 64 from out/a",
            {"method": "lora", "lora.rank": "64", "lora.targets": "mlp"},
        ),
        ({"name": "FullFineTuning"}, "The whole model from out/a", {"method": "full"}),
        (
            {"name": "Combined", "methods": [{"name": "LoRA", "rank": 2}, {"name": "BitFit"}]},
            "A LoRA adapter of rank 2 with bitfit from out/a",
            {"method": "lora+bitfit", "lora.rank": "2"},
        ),
        ({"name": "IA3", "targets": []}, "The method IA3 from out/a", {"method": "IA3"}),
        (None, "The adapter out/a", {}),
        ("damaged", "The adapter out/a", {}),
    ],
)
def test_a_run_from_an_adapter_has_the_method_of_the_adapter(
    run: Path, tmp_path: Path, method: Any, subject: str, rows: dict[str, str]
) -> None:
    """Its configuration has the default method and the default section of LoRA, which have no effect."""
    folder = tmp_path / "further"
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"from_adapter": "out/a", "method": "lora", "lora": as_dict(LoRA())}
    (folder / "config.yaml").write_text(storage.dump_yaml(config))
    file = folder / "adapter" / "lorakit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "method": method}))
    record = read_run(folder)
    assert describe_method(record) == subject
    shown = dict(main_settings(record))
    assert shown["from_adapter"] == "out/a"
    names = ("method", "lora.rank", "lora.targets")
    assert {name: shown[name] for name in names if name in shown} == rows
    settings = yaml.safe_load(settings_text(record))
    assert settings["from_adapter"] == "out/a"
    assert settings.keys().isdisjoint({"method", "method_settings", *SECTIONS})


def test_settings_of_an_unused_method_are_called_so(run: Path) -> None:
    one = read_run(run)
    lora = {**one.config["lora"], "rank": 64}
    runs = [
        dataclasses.replace(one, label="a", config={**one.config, "lora": lora}),
        dataclasses.replace(one, label="b", config={**one.config, "method": "full"}),
    ]
    assert differing(runs) == {"method": ("lora", "full"), "lora.rank": ("64", "unused")}
    runs[0] = dataclasses.replace(runs[0], config={**runs[0].config, "method": "full"})
    assert differing(runs) == {}


def differing(runs: list[RunRecord]) -> dict[str, tuple[str, ...]]:
    """Return the table of the settings that differ on the page that compares runs."""
    (section,) = (s for s in comparison_page(runs).sections if s.title == "Settings")
    tables = [block for block in section.blocks if isinstance(block, Table)]
    return {row[0]: row[1:] for table in tables for row in table.rows}


def test_a_run_from_an_adapter_differs_only_in_what_is_known(run: Path) -> None:
    """Nothing is known of the method of an unfinished run, whose configuration has default sections."""
    one = dataclasses.replace(read_run(run), label="a")
    lora = {**one.config["lora"], "rank": 64}
    first = dataclasses.replace(one, config={**one.config, "lora": lora})
    config = {**one.config, "from_adapter": "out/a"}
    second = dataclasses.replace(one, label="b", config=config, trained={})
    start = {"from_adapter": ("none", "out/a")}
    assert differing([first, second]) == start
    trained = {"name": "FullFineTuning"}
    full = dataclasses.replace(second, trained=trained)
    assert differing([first, full]) == {**start, "method": ("lora", "full")}
    own = {"method": "own.py:IA3", "method_settings": {"targets": ["k"]}}
    first = dataclasses.replace(one, config={**one.config, **own})
    config = {**one.config, "method": "own.py:IA3", "from_adapter": "out/a"}
    second = dataclasses.replace(second, config=config, trained={"name": "IA3"})
    assert differing([first, second]) == start


def test_an_unfinished_run_has_a_page(unfinished: Path) -> None:
    record = read_run(unfinished)
    assert len(record.train) == 20
    page = run_page(record).render()
    text = text_of(page)
    assert "The run is not finished" in text
    assert "has been trained for 20 steps" in text
    assert "<i>" not in page


def test_runs_compared(run: Path, unfinished: Path) -> None:
    one, other = read_run(run), read_run(unfinished)
    other = dataclasses.replace(other, config={**other.config, "seed": 7})
    page = comparison_page([one, other])
    text = text_of(page.render())
    assert "The runs differ in seed." in text
    assert "first and <i>second" in text
    for record in (one, other):
        assert number(record.scores("after")["loss"]) in text
    assert page.render().count('<article class="sample">') == 4


def test_runs_are_ranked_only_by_scores_whose_better_direction_is_known(run: Path) -> None:
    record = read_run(run)
    scores = [{"loss": 2.0, "mse": 1.0, "own": 0.9}, {"loss": 1.0, "mse": 1.0, "own": 0.1}]
    records = [
        dataclasses.replace(record, label=name, result={**(record.result or {}), "scores": values})
        for name, values in zip("ab", scores, strict=True)
    ]
    records[0] = dataclasses.replace(records[0], config={**record.config, "batch_size": 3})
    assert comparison_page(records).summary == [
        "Loss of 12 examples is best in b (1.000), followed by a (2.000).",
        "This page cannot show whether a difference between two runs exceeds chance: that requires several seeds of "
        "each.",
        "The runs differ in batch_size.",
    ]


@pytest.mark.parametrize(
    ("directions", "best"),
    [(("min", "min"), ["b"]), (("max", "max"), ["a"]), (("min", "max"), [])],
)
def test_runs_are_ranked_by_the_direction_that_they_record(
    run: Path, directions: tuple[str, str], best: list[str]
) -> None:
    record = read_run(run)
    session = record.sessions[-1]
    assert session["score_directions"] == DIRECTIONS
    records = [
        dataclasses.replace(
            record,
            label=label,
            config={**record.config, "batch_size": value},
            sessions=[{**session, "score_directions": {"own": direction}}],
            result={**(record.result or {}), "scores": {"own": float(value)}},
        )
        for label, value, direction in zip("ab", (2, 1), directions, strict=True)
    ]
    ranked = [line for line in comparison_page(records).summary if " is best in " in line]
    assert [line.split(" is best in ")[1][0] for line in ranked] == best


def test_losses_over_other_tokens_are_not_ranked(run: Path) -> None:
    record = read_run(run)
    scores = {"loss": 1.0, "perplexity": 2.7, "bleu": 9.0}
    other = dataclasses.replace(
        record,
        label="other",
        config={**record.config, "batch_size": 3},
        result={**(record.result or {}), "scores": scores},
    )
    data = {**record.config["data"], "prompt_template": "{prompt}?"}

    def ranked(**changes: Any) -> tuple[bool, bool]:
        summary = comparison_page([record, dataclasses.replace(other, **changes)]).summary
        assert any(line.startswith("BLEU of 4 samples is best in") for line in summary)
        loss = any(line.startswith("Loss of 12 examples is best in") for line in summary)
        return loss, any("means over different tokens" in line for line in summary)

    assert ranked() == (True, False)
    assert ranked(base={}) == (True, False)  # not recorded
    assert other.tokens_of_loss[2] is not None
    assert dataclasses.replace(other, config={}).tokens_of_loss[2] is None
    assert ranked(base={**record.base, "tokenizer": "0" * 64}) == (False, True)
    assert ranked(config={**other.config, "data": data}) == (False, True)
    assert ranked(provenance={**record.provenance, "task": "text"}) == (False, True)


@pytest.mark.parametrize(
    ("seed", "digest", "summary"),
    [
        (7, None, ["The runs differ in seed.", "So differences between their scores are chance."]),
        (7, "0" * 64, ["The runs differ in seed."]),
        # Other software, another processor: the scores of one seed do not differ by chance.
        (0, None, ["The runs have the same settings."]),
    ],
)
def test_seeds_of_one_setup_are_not_ranked(
    run: Path, seed: int, digest: str | None, summary: list[str]
) -> None:
    record = read_run(run)
    result = {**(record.result or {}), "scores": {"loss": 1.0}}
    data = record.provenance["data"]
    if digest is not None:
        data = {**data, "train": {**data["train"], "sha256": digest}}
    other = dataclasses.replace(
        record,
        config={**record.config, "seed": seed},
        result=result,
        provenance={**record.provenance, "data": data},
    )
    assert comparison_page([record, other]).summary == summary


def test_a_score_that_only_some_runs_have_does_not_hide_the_others(run: Path) -> None:
    record = read_run(run)
    result = {**(record.result or {}), "scores": {"loss": 1.0}}
    config = {**record.config, "batch_size": 3}
    other = dataclasses.replace(
        record, label="other", config=config, result=result, samples=record.samples[:0]
    )
    page = comparison_page([record, other])
    assert page.summary[0].startswith("Loss of 12 examples is best in other (1.000), followed by")
    assert len(page.summary) == 3
    of = {row[0]: row[1] for row in page.sections[0].blocks[0].rows}
    assert of["BLEU, after"] == record.scored_on("bleu") == "4 samples"


def test_scores_of_other_numbers_of_examples_are_not_ranked(run: Path, unfinished: Path) -> None:
    record = read_run(run)
    limited = {**record.config, "evaluation": {**record.config["evaluation"], "limit": 5}}
    page = comparison_page([record, dataclasses.replace(record, config=limited)])
    assert not [line for line in page.summary if "best" in line]
    assert "scores on different data are not comparable" in " ".join(page.summary)
    table = page.sections[0].blocks[0]
    assert (table.columns[1], table.rows[0][1]) == ("Of", "12 examples / 5 examples")
    page = comparison_page([record, read_run(unfinished)])
    assert page.summary[-1] == "Not finished, with the scores so far: <i>second."
    assert page.sections[0].blocks[0].rows[0][1] == "12 examples / ?"


def test_other_validation_data_is_told_by_its_content(run: Path) -> None:
    record = read_run(run)
    settings = {**record.config["data"], "train": "other.jsonl", "max_length": 9}
    data = record.provenance["data"]

    def told(**changes: Any) -> bool:
        return "validation data differs" in " ".join(
            comparison_page([record, dataclasses.replace(record, **changes)]).summary
        )

    assert not told(config={**record.config, "data": settings})
    assert not told(provenance={})  # an unfinished run has no digest
    for change in ({"sha256": "0" * 64}, {"examples": 3}):
        other = {**data, "validation": {**data["validation"], **change}}
        assert told(provenance={**record.provenance, "data": other})


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other" / run.name)
    page = comparison_page([read_run(run), read_run(tmp_path / "other" / run.name)])
    assert f"other/{run.name}" in page.render()
    assert "The runs have the same settings." in page.summary


def test_names_are_lengthened_until_they_differ(run: Path) -> None:
    record = read_run(run)
    folders = [f"runs/{name}/rate-seed-0" for name in ("mrpc/lora", "rte/lora", "rte/full")]
    runs = [dataclasses.replace(record, folder=Path(folder)) for folder in [*folders, "other"]]
    columns = comparison_page(runs).sections[0].blocks[0].columns
    assert columns[2:] == (
        *("mrpc/lora/rate-seed-0", "rte/lora/rate-seed-0", "full/rate-seed-0"),
        "other",
    )


def test_a_section_of_another_part_finds_its_place(run: Path) -> None:
    section = Section(title="Spectrum", blocks=[Table(caption="c", columns=("a",), rows=[("x",)])])
    titles = [s.title for s in run_page(read_run(run), analysis=[section]).sections]
    assert titles.index("Adapter size") < titles.index("Spectrum") < titles.index("Configuration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n[]\n', "metrics.jsonl:2 is damaged"),
        ("config.yaml", "a: [", "is not valid YAML"),
        ("config.yaml", "a: 1", "not the configuration of a run"),
        ("result.json", "{}", "checksum"),
    ],
)
def test_a_damaged_run_is_one_clear_error(unfinished, tmp_path, name, content, message) -> None:
    shutil.copytree(unfinished, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        read_run(tmp_path / "run")


def test_another_folder_is_no_run(tmp_path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        read_run(tmp_path)


def test_every_figure_is_saved_for_papers(run: Path, tmp_path: Path) -> None:
    page = run_page(read_run(run))
    written = page.save_figures(tmp_path / "figures")
    assert len(written) == 2 * len(page.figures()) > 4
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in written)


def test_cells_of_tables() -> None:
    cells = (None, 1234567, 3.14159, True, "x")
    assert [cell_text(cell) for cell in cells] == ["-", "1,234,567", "3.142", "True", "x"]


def test_a_score_has_the_same_digits_wherever_a_page_shows_it(run: Path) -> None:
    record = read_run(run)
    assert record.result is not None
    # The pages also show tokens per second: no run is as fast as this perplexity is high.
    scores = {**record.scores("after"), "loss": 0.73, "perplexity": 987_654_321.678}
    before = {**scores, "loss": 0.9, "perplexity": 2_000_000_000.1}
    result = {**record.result, "scores": scores, "scores_before": before}
    curve = [{**one, **scores, "step": one["step"]} for one in record.validation]
    changed = dataclasses.replace(record, result=result, validation=curve)
    for page in (run_page(changed), comparison_page([changed, record])):
        shown = page.render()
        assert set(re.findall(r"(?<![\d.,])0\.73\d*", shown)) == {"0.7300"}
        assert set(re.findall(r"9\.8\d+e\+08|\b987,?654,?3\d\d(?:\.\d+)?", shown)) == {
            "987,654,322"
        }


@pytest.mark.slow
def test_a_notebook_shows_pages(run: Path) -> None:
    record = read_run(run)
    page = run_page(record)
    assert html.unescape(page._repr_html_()).startswith('<iframe srcdoc="<!doctype html>')
    (chart, *_) = page.figures()[0].charts
    assert all(len(repr(shown)) < 400 for shown in (record, page, chart))
