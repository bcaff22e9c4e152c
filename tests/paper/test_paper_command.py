"""The commands `lorakit recipes` and `lorakit paper`."""

import json

import pytest

from lorakit.cli import main
from lorakit.cli.parsing import parse
from lorakit.errors import ConfigurationError
from lorakit.paper.paper_config import PaperConfig


def test_lists_and_flags_as_people_type_them():
    argv = ["table2", "--tasks", "mrpc,rte", "--methods=lora", "--dry-run", "--eval-limit", "5"]
    config = parse(PaperConfig, "paper", "Run a table.", argv, "table")
    assert (config.tasks, config.methods) == (("mrpc", "rte"), ("lora",))
    assert (config.dry_run, config.eval_limit) == (True, 5)
    assert not parse(PaperConfig, "paper", "", ["table2", "--dry-run", "false"], "table").dry_run


def test_recipes_are_listed_and_one_is_shown_whole(capsys):
    assert main(["recipes", "roberta-base", "mrpc"]) == 0
    text = capsys.readouterr().out
    assert "roberta-base/mrpc/lora@paper" in text
    assert "roberta-base/mrpc/lora@code" in text
    assert main(["recipes", "gpt2-medium/e2e_nlg/lora@code"]) == 0
    text = capsys.readouterr().out
    assert "evaluate --adapter out/run/adapter --data.task e2e_nlg" in text
    assert "--decoding.beams 10" in text
    assert main(["recipes", "gpt2-medium/e2e_nlg/lora@paper"]) == 0
    assert "evaluate --adapter out/run/best --data.task e2e_nlg" in capsys.readouterr().out
    assert "lorakit train --recipe gpt2-medium/e2e_nlg/lora@code --output" in text
    assert main(["recipes", "deberta", "rte", "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {record["settings"]["lora.rank"] for record in found} == {8, 16}


def test_words_that_no_recipe_has(capsys):
    assert main(["recipes", "bert-tiny"]) == 1
    assert "No recipe's name contains 'bert-tiny'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_shows_the_runs_and_writes_nothing(table2, capsys):
    config = table2()
    status = main(
        [
            *("paper", "table2", "--base.name", config.base.name, "--tasks", "mrpc", "--methods"),
            *("full,lora", "--trials", "3", "--seeds", "2", "--data.root", config.data.root),
            *("--output", config.output, "--dry-run"),
        ]
    )
    text = capsys.readouterr().out
    assert status == 0
    assert "0.00017, 0.0005, 0.0015" in text
    assert "0 of 8 runs are finished" in text
    assert not config.folder.exists()


def test_an_option_that_is_no_setting():
    def trials(*argv: str) -> int:
        preset = ("usual", lambda value: {"table": "table2", "trials": int(value)})
        return parse(PaperConfig, "paper", "", argv, preset=preset).trials

    assert (trials("--usual", "4"), trials("--usual=4", "--trials", "5")) == (4, 5)
    with pytest.raises(ConfigurationError, match="--usual needs a value"):
        trials("--usual", "--seeds", "1")
    with pytest.raises(ConfigurationError, match="--usual is given 2 times"):
        trials("--usual", "4", "--usual=5")
    with pytest.raises(ConfigurationError, match="Did you mean '--usual'"):
        trials("--usuall", "4")
    with pytest.raises(ConfigurationError, match=r"^usual 0: trials is 0"):
        trials("--usual", "0")


def test_an_unknown_recipe_is_an_error_of_the_command(capsys):
    assert main(["train", "--recipe", "roberta-base/mrcp/lora", "--output", "out"]) == 1
    assert "Did you mean 'roberta-base/mrpc/lora'" in capsys.readouterr().err


def test_an_empty_recipe_is_an_error(capsys):
    """A shell passes --recipe "$RECIPE" with an unset variable as an empty name."""
    assert main(["train", "--recipe", "", "--output", "out"]) == 1
    assert "There is no recipe ''. A name is model/task/method" in capsys.readouterr().err
