"""Arguments as people type them, one file for every command, and messages that say what to write."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from lorakit import storage
from lorakit.cli import COMMANDS, main
from lorakit.cli.combine import CombineConfig
from lorakit.cli.compress import CompressConfig
from lorakit.cli.demo import DemoConfig
from lorakit.cli.generate import GenerateConfig
from lorakit.cli.merge import MergeConfig
from lorakit.cli.methods_in_files import options_of_other_methods
from lorakit.cli.options import options_of
from lorakit.cli.parsing import parse
from lorakit.configuration import converted, hints_with_paths
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.evaluation.predict_config import PredictConfig
from lorakit.models.base_config import BaseConfig
from lorakit.paper.paper_config import PaperConfig
from lorakit.training.config import TrainConfig

RUN = "--base.name b --data.train t.jsonl --output out"
SHARED = """
base: {name: b, revision: "12"}
data: {train: t.jsonl, test: held.jsonl, max_length: 64}
output: out/first
method: lora
batch_size: 4
adapter: out/first/adapter
lora:
  rank: 4
optimizer:
  learning_rate: 5e-4
decoding:
  max_new_tokens: 20
evaluation:
"""


def train(arguments: str) -> TrainConfig:
    argv = shlex.split(arguments)
    return parse(TrainConfig, "train", "Train.", argv, unused=options_of_other_methods)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SHARED)
    return path


# --- paths -----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_of_an_input_and_an_output_is_expanded_in_every_command(home: Path) -> None:
    expanded = set()
    for command in COMMANDS:
        for config in import_module(f"lorakit.cli.{command}").CONFIGS:
            annotations = hints_with_paths(config)
            for name in {"adapter", "file", "output", "plot", "report"} & annotations.keys():
                assert converted("~/a", annotations[name], name) == f"{home}/a", (config, name)
                assert converted("~no-such-user/a", annotations[name], name) == "~no-such-user/a"
                expanded.add((command, name))
    assert len(expanded) > 25


def test_the_home_folder_is_expanded_on_the_command_line_in_yaml_and_in_python(home: Path) -> None:
    (home / "run.yaml").write_text("{base: b, data: {task: rte, root: ~/data}, output: ~/run}")
    config = train("--config=~/run.yaml --from_adapter=~/old")
    assert (config.output, config.from_adapter) == (f"{home}/run", f"{home}/old")
    assert config.data.root == f"{home}/data"
    data = DataConfig(task="rte", root="~/data")
    base = BaseConfig(name="b")
    assert config == TrainConfig(base=base, data=data, output="~/run", from_adapter="~/old")
    combine = parse(CombineConfig, "combine", "", ["~/a", "--output=~/b"], "adapters")
    assert (combine.adapters, combine.output) == ([f"{home}/a"], f"{home}/b")


# --- one file for every command -------------------------------------------------------------------


def test_training_reads_its_part_of_a_shared_file(shared, capsys) -> None:
    config = train(f"--config {shared}")
    assert (config.lora.rank, config.optimizer.learning_rate) == (4, 5e-4)
    assert (config.output, config.data.max_length) == ("out/first", 64)
    notes = capsys.readouterr().err
    assert notes == f"note: {shared}: lorakit train skips adapter, decoding (of other commands).\n"


def test_evaluation_skips_the_output_of_the_training_run(shared, capsys) -> None:
    config = parse(EvaluateConfig, "evaluate", "Score.", ["--config", str(shared)])
    assert config.base is not None
    assert (config.base.name, config.base.revision, config.data.test) == ("b", "12", "held.jsonl")
    assert config.decoding is not None
    assert config.decoding.max_new_tokens == 20
    assert (config.adapter, config.output, config.method) == ("out/first/adapter", None, None)
    assert config.batch_size == 16
    notes = capsys.readouterr().err
    skipped = "output, method, batch_size, lora, optimizer"
    assert notes == f"note: {shared}: lorakit evaluate skips {skipped} (of other commands).\n"


LEAST = "base: b\ndata: {train: t.jsonl, validation_fraction: 0.1}\noutput: out/first\n"
"""A file with all that a run needs, in options that other commands have too."""


NAMED = "base: b\ndata: {task: mrpc, test: held.jsonl}\noutput: out/first\n"
"""The same with a named task."""


@pytest.mark.parametrize("least", [LEAST, NAMED])
@pytest.mark.parametrize("more", ["", "method: lora", "batch_size: 8", "adapter: out/a"])
def test_every_command_knows_the_least_file_of_a_run(
    least: str, more: str, tmp_path, capsys
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{least}{more}\n")
    words = ["--config", str(file)]
    assert train(f"--config {file}").output == "out/first"
    scored = parse(EvaluateConfig, "evaluate", "", words)
    assert (scored.output, scored.method, scored.batch_size) == (None, None, 16)
    answered = parse(GenerateConfig, "generate", "", [*words, "--prompt", "x"])
    assert answered.output is None
    for config, command, output in (
        (MergeConfig, "merge", "out/first-merged"),
        (PredictConfig, "predict", "out/first-predictions.jsonl"),
    ):
        with pytest.raises(
            ConfigurationError, match=f"Add --output, for example --output {output}"
        ):
            parse(config, command, "", [*words, "--adapter", "out/other"])
    capsys.readouterr()


def test_a_file_of_another_command_keeps_its_output(tmp_path, capsys) -> None:
    file = tmp_path / "own.yaml"
    data = "base: b\ndata: {train: t.jsonl, validation_fraction: 0.1}\n"
    file.write_text(f"{data}output: scores.jsonl\n")
    words = ["--config", str(file)]
    assert parse(EvaluateConfig, "evaluate", "", words).output == "scores.jsonl"
    file.write_text(f"{data}adapter: out/a\nbatch_size: 4\noutput: out/small\n")
    small = parse(CompressConfig, "compress", "", [*words, "--rank", "4"])
    assert (small.output, small.batch_size) == ("out/small", 4)
    file.write_text("base: b\nadapter: out/a\noutput: out/merged\n")
    assert parse(MergeConfig, "merge", "", words).output == "out/merged"
    assert capsys.readouterr().err == ""
    file.write_text("base: b\ndata: {task: chat, test: t.jsonl}\noutput: out/merged\n")
    assert parse(MergeConfig, "merge", "", [*words, "--adapter", "out/a"]).output == "out/merged"
    file.write_text("base: b\ndata: {test: t.jsonl}\noutput: scores.json\nbatch_size: 4\n")
    with pytest.raises(ConfigurationError, match=r"ends in \.jsonl"):
        parse(EvaluateConfig, "evaluate", "", words)
    file.write_text("output: scores.jsonl\nmethod: lora\n")  # rejected, as lora is no class
    with pytest.raises(ConfigurationError, match="lora"):
        parse(EvaluateConfig, "evaluate", "", words)


def test_a_file_with_a_method_and_without_output_is_that_of_a_run(tmp_path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: b\ndata: {train: t.jsonl}\nmethod: lora\nbatch_size: 8\n")
    scored = parse(EvaluateConfig, "evaluate", "", ["--config", str(file)])
    assert (scored.method, scored.batch_size) == (None, 16)
    assert "skips method, batch_size (of other commands)" in capsys.readouterr().err


def test_a_note_names_the_first_of_many_skipped_options(tmp_path, capsys) -> None:
    whole = TrainConfig(base=BaseConfig(name="b"), data=DataConfig(train="d"), output="out")
    file = tmp_path / "config.yaml"
    file.write_text(storage.dump_yaml(whole.as_dict()))
    parse(GenerateConfig, "generate", "Generate.", ["--config", str(file), "--prompt", "x"])
    (note,) = capsys.readouterr().err.splitlines()
    assert re.search(r"skips (\w[\w.]*, ){9}\w[\w.]* and \d+ more \(of other commands\)\.$", note)


def test_a_file_of_one_command_sets_its_output(tmp_path, capsys) -> None:
    file = tmp_path / "score.yaml"
    file.write_text("data: {test: held.jsonl}\nbase: {name: b}\noutput: scores.jsonl\n")
    config = parse(EvaluateConfig, "evaluate", "Score.", ["--config", str(file)])
    assert (config.output, capsys.readouterr().err) == ("scores.jsonl", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank: 4", r"unknown option 'rank'\. Did you mean 'lora\.rank'"),
        (
            "no_packing: true",
            r"unknown option 'no_packing'\. Write packing: false to switch it off\.",
        ),
        ("batchsize: 4", r"unknown option 'batchsize'\. Did you mean 'batch_size'\?"),
        ("max_lenght: 4", "unknown option 'max_lenght'"),
        ("lora: {rnk: 4}", r"unknown option 'lora\.rnk'\. Did you mean 'lora\.rank'"),
        ("lora_alpha: 4", r"unknown option 'lora_alpha'\. Its name in lorakit is lora\.alpha"),
        ("decoding: {beam: 4}", r"unknown option 'decoding\.beam'"),
        ("lora: [4]", r"lora is \[4\]; it must be a group of options, .* lora: \{rank: VALUE\}"),
        ("data: rows.jsonl", r"data is 'rows\.jsonl'; .* for example data: \{train: VALUE\}"),
        ("base: 7", r"base is 7; .* for example base: \{name: VALUE\}"),
        ("lora: {rank: '8'}", r"lora\.rank is '8'; it must be a whole number\."),
        ("resume: 1", r"resume is 1; it must be true or false\."),
        ("epochs: null", r"epochs is null; it must be a number\."),
        ("base: {name: x}\nbase.name: y", r"base\.name occurs twice\. .* remove one"),
        ("base: x\nbase.name: y", r"base\.name occurs twice\."),
        ("decoding.beams: 2\ndecoding: {beams: 3}", r"decoding\.beams occurs twice\."),
        ("- a", "is not a mapping of options"),
        ("a: [", r"is not valid YAML: .*line 1"),
    ],
)
def test_a_wrong_line_of_a_file(line: str, message: str, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(line)
    with pytest.raises(ConfigurationError, match=rf"run\.yaml.*{message}"):
        train(f"{RUN} --config {file}")


def test_the_error_names_the_file_that_sets_the_option(tmp_path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("epochs: -1\nbatch_size: 0")
    second.write_text("epochs: -2")
    both = f"{RUN} --config {first} --config {second}"
    with pytest.raises(ConfigurationError, match=r"second\.yaml: epochs is -2"):
        train(both)
    with pytest.raises(ConfigurationError, match=r"^epochs is -3"):
        train(f"{both} --epochs -3")
    with pytest.raises(ConfigurationError, match=r"first\.yaml: batch_size is 0"):
        train(f"{both} --epochs 3")
    first.write_text("lora: {rank: 0}")
    with pytest.raises(ConfigurationError, match=r"first\.yaml: rank is 0"):
        train(f"{both} --epochs 3")


def test_a_file_is_not_blamed_for_an_argument_with_the_same_last_name(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("prefix_layer: {prefix_length: 4}\nmethod: prefix_layer+prefix_embedding")
    with pytest.raises(ConfigurationError, match=r"^prefix_length is -1"):
        train(f"{RUN} --config {file} --prefix_embedding.prefix_length -1")
    file.write_text("data: {limit: 8}")
    with pytest.raises(ConfigurationError, match=r"^limit is 0"):
        parse(
            EvaluateConfig, "evaluate", "", ["a", "--config", str(file), "--limit", "0"], "adapter"
        )


def test_a_file_may_name_a_base_alone(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: tiny\nfrom_adapter: out/first\n")
    assert train(f"--data.train t.jsonl --output out --config {file}").base.name == "tiny"
    assert train(f"{RUN} --config {file}").base.name == "b"  # the command line overrides files


def test_a_section_is_checked_before_its_missing_options(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: rows.jsonl\n")
    with pytest.raises(ConfigurationError, match=r"data is 'rows\.jsonl'; it must be a group"):
        train(f"--output out --config {file}")


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml' does not exist\. Check the path"):
        train(f"{RUN} --config {tmp_path / 'none.yaml'}")
    (tmp_path / "latin1.yaml").write_bytes(b"output: caf\xe9")
    with pytest.raises(ConfigurationError, match=r"is not UTF-8 text: .* save it as UTF-8"):
        train(f"{RUN} --config {tmp_path / 'latin1.yaml'}")


def test_the_folder_of_a_run_gets_the_command_that_resumes_it(tmp_path) -> None:
    (tmp_path / "config.yaml").touch()
    command = re.escape(
        f"lorakit train --config {tmp_path}/config.yaml --resume --output {tmp_path}"
    )
    for line in (f"--resume --output {tmp_path}", f"--resume {tmp_path}"):
        with pytest.raises(ConfigurationError, match=f"is a run, .* Resume it: {command}"):
            train(line)
    with pytest.raises(ConfigurationError, match=r"Name its file: --config .*/config\.yaml"):
        train(f"--resume --config {tmp_path}")
    with pytest.raises(ConfigurationError, match="are not set"):
        train("--resume")


def test_another_method_beside_a_file_with_settings_of_lora(tmp_path, capsys) -> None:
    file = tmp_path / "run.yaml"
    optimizer = "optimizer: {learning_rate: 2e-3, lr_ratio: 16, eps: 1e-6}"
    file.write_text(f"method: lora\nlora: {{rank: 4}}\n{optimizer}\n")
    config = train(f"{RUN} --config {file} --method bitfit")
    assert (config.method, config.lora.rank, config.optimizer.lr_ratio) == ("bitfit", 8, 1)
    assert config.optimizer.eps == 1e-6
    assert config.peak_rate == 1e-3
    note = capsys.readouterr().err
    skipped = "lora, optimizer.learning_rate, optimizer.lr_ratio"
    assert f"skips {skipped} (without effect beside the arguments)" in note
    both = train(f"{RUN} --config {file} --method lora+prefix_layer")
    assert (both.lora.rank, both.peak_rate) == (4, 5e-4)
    assert train(f"{RUN} --config {file} --method lora").peak_rate == 2e-3
    typed = train(f"{RUN} --config {file} --method full --optimizer.learning_rate 1e-5")
    assert typed.peak_rate == 1e-5
    other = tmp_path / "full.yaml"
    other.write_text("method: full\noptimizer: {learning_rate: 3e-5}\n")
    assert train(f"{RUN} --config {other} --method full").peak_rate == 3e-5
    with pytest.raises(ConfigurationError, match="section lora has settings"):
        train(f"{RUN} --method bitfit --lora.rank 3")


@pytest.mark.parametrize(
    ("content", "arguments", "is_kept"),
    [
        ("", "--method full", True),  # names no method
        ("method: full", "--method full", True),
        ("method: lora+bitfit", "--method lora", True),
        ("method: lora", "--method lora+bitfit", False),
        ("lora: {rank: 4}", "--method full", False),
        ("lora: {rank: 4}", "--method lora", True),
        ("method: lora", "--method {own}", False),
        # With from_adapter, a method of one's own only locates its class.
        ("from_adapter: out/a", "--method {own}", True),
        ("method: lora", "--method {own} --from_adapter out/a", True),
        ("method: lora", "--from_adapter out/a", True),
    ],
)
def test_the_rate_of_a_file_for_another_method(
    content: str, arguments: str, is_kept: bool, tmp_path, capsys
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import dataclasses, lorakit\n\n\n@dataclasses.dataclass(frozen=True)\nclass Mine(lorakit.BitFit):\n    pass\n"
    )
    file, method = tmp_path / "run.yaml", tmp_path / "method.yaml"
    file.write_text(f"optimizer: {{learning_rate: 2e-4}}\n{content}\n")
    method.write_text("method: bitfit\n")  # the file that has the rate decides
    line = f"{RUN} --config {method} --config {file} {arguments.format(own=f'{own}:Mine')}"
    assert (train(line).optimizer.learning_rate == 2e-4) == is_kept
    assert ("optimizer.learning_rate" in capsys.readouterr().err) != is_kept


def test_a_file_of_training_does_not_set_the_output_of_a_demo_or_a_table(tmp_path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: {name: b}\nlora: {rank: 4}\nepochs: 2\noutput: out/first\n")
    demo = parse(DemoConfig, "demo", "Demo.", ["--config", str(file)])
    assert (demo.base.name, demo.lora.rank, demo.output) == ("b", 4, "out/demo")
    table = parse(PaperConfig, "paper", "Table.", ["2", "--config", str(file)], "table")
    assert (table.base.name, table.output) == ("b", None)
    capsys.readouterr()


SETS = {
    "base.name": {"base", "model"},
    "base.dtype": {"dtype"},
    "base.device": {"device"},
    "data.root": {"root", "data"},
    "data.task": {"task"},
    "data.encoding": {"encoding"},
    "decoding.beams": {"beams"},
    "max_steps": {"steps"},
}
"""An option, and names that no command may use for the same thing."""


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_has_a_name_of_its_own_for_what_others_name(command: str) -> None:
    for config in import_module(f"lorakit.cli.{command}").CONFIGS:
        for name, others in SETS.items():
            assert not others & options_of(config).keys(), name


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("--model minilm-l6", "Its name in lorakit is --base.name."),
        ("--data folder", "--data is a group of options. Write --data.root VALUE."),
        ("--dtype float32", "Did you mean '--base.dtype'?"),
        ("--device cpu", "Did you mean '--base.device'?"),
        ("--beams 1", "Did you mean '--decoding.beams'?"),
    ],
)
def test_names_of_an_earlier_version_are_answered(arguments: str, answer: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse(PaperConfig, "paper", "Table.", ["2", *arguments.split()], "table")
    assert answer in str(error.value)


def test_the_help_shows_the_default_of_a_section_of_the_command() -> None:
    assert options_of(DemoConfig)["base.name"].default == "smollm2-135m"
    assert options_of(DemoConfig)["lora.targets"].default == ("all-linear",)
    assert options_of(TrainConfig)["lora.targets"].default == ("attention.qv",)


def test_every_command_names_its_configuration() -> None:
    """A shared file needs the options of every command."""
    for command in COMMANDS:
        assert import_module(f"lorakit.cli.{command}").CONFIGS


# --- arguments ------------------------------------------------------------------------------------


def test_booleans_are_flags_or_have_a_value() -> None:
    config = train(f"{RUN} --resume --packing false --compile true --lora.dora")
    assert (config.resume, config.packing, config.compile) == (True, False, True)
    assert config.lora.dora
    chat = parse(GenerateConfig, "generate", "", shlex.split("--chat --prompt '--what is it'"))
    assert (chat.chat, chat.prompt) == (True, "--what is it")


def test_arguments_may_follow_a_flag() -> None:
    config = parse(MergeConfig, "merge", "", ["--overwrite", "in", "out"], "adapter", "output")
    assert (config.overwrite, config.adapter, config.output) == (True, "in", "out")


@pytest.mark.parametrize("text", ["q_proj v_proj", "q_proj,v_proj", "'[q_proj, v_proj]'"])
def test_lists_by_spaces_commas_or_in_brackets(text: str) -> None:
    assert train(f"{RUN} --lora.targets {text}").lora.targets == ("q_proj", "v_proj")


def test_a_list_of_windows_paths_by_commas() -> None:
    line = r"--base.name b --output out --data.train 'C:\d\a.jsonl,C:\d\b.jsonl'"
    assert train(line).data.train == [r"C:\d\a.jsonl", r"C:\d\b.jsonl"]


def test_values_that_are_no_lists() -> None:
    assert train(f"{RUN} --lora.targets 'h.{{1,2}}'").lora.targets == ("h.{1,2}",)
    assert train(f"{RUN} --lora.targets '[qv]_proj'").lora.targets == ("[qv]_proj",)
    assert train(f"{RUN} --base.revision 12").base.revision == "12"
    words = "a b --output o --weights 0.7 -0.2"
    config = parse(CombineConfig, "combine", "", words.split(), "adapters")
    assert (config.adapters, config.weights) == (["a", "b"], [0.7, -0.2])


def test_the_path_of_a_file_with_a_comma_is_one_value(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "--base.name b --output out --data.train 'sales, 2024.csv'"
    assert train(line).data.train == ["sales", "2024.csv"]
    Path("sales, 2024.csv").write_text("prompt,completion\na,b\n")
    assert train(line).data.train == "sales, 2024.csv"
    merged = parse(CombineConfig, "combine", "", ["--adapters", "sales, 2024.csv", "--output", "o"])
    assert merged.adapters == ["sales, 2024.csv"]


def test_numbers_mappings_and_dashes() -> None:
    config = train(
        f"{RUN} --optimizer.learning-rate 5e-4 --optimizer.betas 0.9 0.95 --batch-size=2 "
        "--data.columns.prompt 0 --data.columns.completion null --max_steps null"
    )
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (5e-4, (0.9, 0.95))
    assert config.data.columns == {"prompt": "0", "completion": "null"}  # names of columns
    assert (config.batch_size, config.max_steps) == (2, None)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ("", {"q_proj": 4, "v_proj": 16}),
        ("--lora.rank_pattern.q_proj 2", {"q_proj": 2, "v_proj": 16}),
        ("--lora.rank-pattern.k-proj 3", {"q_proj": 4, "v_proj": 16, "k-proj": 3}),
        ("--lora.rank_pattern.k_proj 3", {"q_proj": 4, "v_proj": 16, "k_proj": 3}),
        ("--lora.rank_pattern '{q_proj: 2}'", {"q_proj": 2}),
    ],
)
def test_an_entry_of_a_mapping_keeps_the_others_of_the_file(arguments, pattern, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {rank_pattern: {q_proj: 4, v_proj: 16}}\n")
    assert train(f"{RUN} --config {file} {arguments}").lora.rank_pattern == pattern


def test_an_entry_replaces_a_wrong_value_of_the_file(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {rank_pattern: 4}\n")
    assert train(f"{RUN} --config {file} --lora.rank_pattern.q 2").lora.rank_pattern == {"q": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--r 4", r"unknown option '--r'\. Its name in lorakit is --lora\.rank\."),
        ("--lora.r 4", r"Its name in lorakit is --lora\.rank\."),
        ("--lora_alpha 4", r"Its name in lorakit is --lora\.alpha\."),
        ("--target_modules q", r"Its name in lorakit is --lora\.targets\."),
        ("--lora_dropout 0.1", r"Its name in lorakit is --lora\.dropout\."),
        ("--learning_rate 1", r"Its name in lorakit is --optimizer\.learning_rate\."),
        ("--alpha 4", r"Did you mean '--lora\.alpha'"),
        ("--no-packing", r"'--no-packing'\. Write --packing false to switch it off\."),
        ("--no_dora", r"Write --lora\.dora false to switch"),
        ("--lora.no-dora", r"Write --lora\.dora false to switch"),
        ("--no-lora.dora", r"Write --lora\.dora false to switch"),
        ("--lora.rank eight", r"lora\.rank is 'eight'; it must be a whole number\."),
        ("--lora.rank 2.5", r"lora\.rank is 2\.5; it must be a whole number\."),
        ("--epochs many", r"epochs is 'many'; it must be a number\."),
        ("--max_steps x", r"max_steps is 'x'; it must be a whole number or null\."),
        ("--lora.bias nome", r"one of none, all, lora_only\. Did you mean 'none'"),
        ("--packing maybe", r"packing is 'maybe'; it must be true or false\."),
        ("--lora 4", r"--lora is a group of options\. Write --lora\.rank VALUE"),
        ("--lora.rank", r"--lora\.rank needs a value"),
        ("--lora.rank 4 5", "unexpected argument '5'"),
        ("run.yaml", r"unexpected argument 'run\.yaml'\. Write --config run\.yaml"),
    ],
)
def test_a_wrong_argument(arguments: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        train(f"{RUN} {arguments}")
    for word in ("Union", "NoneType", "typing", "<class", "int", "str,"):
        assert word not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed 1 --seed 2", r"--seed is given 2 times; give it once\.$"),
        ("--batch_size=1 --seed 1 --batch-size 2", "--batch_size is given 2 times"),
        ("--resume --resume false --resume", "--resume is given 3 times"),
        ("--output other", "--output is given 2 times"),
        (
            "--lora.targets q --lora.targets v",
            r"once\. It takes several values: --lora\.targets A B\.",
        ),
        ("--data.columns.prompt a --data.columns.prompt b", r"--data\.columns\.prompt is given 2"),
        ("--data.columns.prompt a --data.columns '{prompt: b}'", r"--data\.columns is given 2"),
        ("--data.columns '{prompt: b}' --data.columns.prompt a", r"--data\.columns is given 2"),
    ],
)
def test_a_value_that_would_replace_another_is_an_error(arguments: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(f"{RUN} {arguments}")


def test_an_option_beside_its_position_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="--adapter is given 2 times"):
        parse(MergeConfig, "merge", "", ["in", "out", "--adapter", "x"], "adapter", "output")


def test_all_unknown_options_are_reported() -> None:
    with pytest.raises(ConfigurationError) as raised:
        train(f"{RUN} --r 8 --lora_alpha 16 --epochs 2 --target_modules q_proj v_proj --packing")
    assert str(raised.value).split("\n  ") == [
        "unknown option '--r'. Its name in lorakit is --lora.rank.",
        "unknown option '--lora_alpha'. Its name in lorakit is --lora.alpha.",
        "unknown option '--target_modules'. Its name in lorakit is --lora.targets. --help lists the options.",
    ]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("train chat.jsonl", "'chat.jsonl'. Write --data.train chat.jsonl for a file of data."),
        ("plan rows.csv.gz", "Write --data.train rows.csv.gz"),
        ("predict new.csv", "Write --data.test new.csv"),
        ("evaluate new.parquet", "Write --data.test new.parquet"),
        ("generate prompts.tsv", "Write --file prompts.tsv"),
        ("train notes", "'notes'. 'lorakit train --help'"),
        ("predict --file new.csv", "Did you mean '--data.test'?"),
        ("evaluate --input new.csv", "Did you mean '--data.test'?"),
        ("train --input new.csv", "Did you mean '--data.train'?"),
        ("generate --data.test new.csv", "Did you mean '--file'?"),
        ("predict --data new.csv", "--data is a group of options. Write --data.test VALUE."),
    ],
)
def test_the_option_for_a_file_of_data(arguments: str, answer: str, capsys) -> None:
    assert main(arguments.split()) == 1
    assert answer in capsys.readouterr().err


def test_required_options_are_named_together(capsys) -> None:
    assert main(["train", "--data.train", "t.jsonl"]) == 1
    assert "Add --base.name VALUE and --output VALUE." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("generate --prompt x --limit 2", "unknown option"),
        ("analyze drift a --data.test rows.jsonl", "unknown option"),
        ("serve --dry 1", "unknown option"),
        ("train --base.name b --output out --data.train train.jsonl", "there is no file"),
    ],
)
def test_a_name_like_no_other_has_no_suggestion(
    line, problem, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "container_info.json").touch()  # shares most of a suffix with train.jsonl
    assert main(shlex.split(line)) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "Did you mean" not in error


@pytest.mark.parametrize(
    ("dtype", "meant"), [("4bit", "nf4"), ("int4", "nf4"), ("8bit", "int8"), ("fp32", "float32")]
)
def test_a_dtype_by_another_name(dtype, meant, capsys) -> None:
    assert main(["train", *shlex.split(RUN), "--base.dtype", dtype]) == 1
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err
