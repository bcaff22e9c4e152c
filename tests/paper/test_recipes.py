"""Recipes: each is a valid run with the published numbers, paper and code differ as documented, flags override."""

import json
from operator import attrgetter

import pytest
from recipe_facts import expected_recipes

from lorakit.cli.methods_in_files import options_of_other_methods
from lorakit.cli.parsing import parse
from lorakit.cli.train import _recipe
from lorakit.configuration import nested
from lorakit.errors import ConfigurationError
from lorakit.methods.lora.method import LoRA
from lorakit.paper.recipes import matching, recipe, recipes
from lorakit.training.config import TrainConfig


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_the_configuration_of_a_run(name):
    settings = {"base.name": "any-decoder", **recipes()[name].settings, "output": "out"}
    config = TrainConfig(**nested(settings))
    assert config.peak_rate == settings["optimizer.learning_rate"]
    assert config.validates, "the paper reports the best epoch of each run"


def test_every_recipe_has_the_published_numbers(shared):
    facts = json.loads((shared / "paper" / "recipes.json").read_text(encoding="utf-8"))["recipes"]
    expected = {}
    for fact in facts:
        if "not in the paper" not in fact["origin"]:  # two scripts with another loss
            expected |= expected_recipes(fact)
    for name in list(expected):
        model, task, method = name.split("/")
        if (model, method) == ("roberta-base", "lora@paper"):
            expected[f"mpnet-base/{task}/lora@derived"] = expected[name]
    assert recipes().keys() == expected.keys()
    for name, recipe_of_paper in expected.items():
        settings, found = recipe_of_paper.settings, recipes()[name]
        config = TrainConfig(**nested({"base.name": "any", **found.settings, "output": "out"}))
        assert {key: attrgetter(key)(config) for key in settings} == settings, name
        assert found.settings.keys() <= settings.keys() | {"base.name", "data.too_long"}, name
        assert found.decoding == recipe_of_paper.decoding, name
        for words in recipe_of_paper.notes:
            assert any(words in note for note in found.notes), (name, words)
        starts = any("--from_adapter" in note for note in found.notes)
        assert starts == ("--from_adapter" in recipe_of_paper.notes), name


def read(*argv: str) -> TrainConfig:
    """Read arguments of `lorakit train`."""
    preset = ("recipe", _recipe)
    words = [*argv, "--output", "out"]
    return parse(TrainConfig, "train", "", words, preset=preset, unused=options_of_other_methods)


def test_paper_and_code_differ_where_the_register_says():
    def pair(name):
        return recipe(f"{name}@paper").settings, recipe(f"{name}@code").settings

    paper, code = pair("roberta-base/mrpc/lora")
    assert (paper["lora.alpha"], code["lora.alpha"]) == (8, 16)
    assert code["batch_size"] * code["accumulation"] == 128
    assert code["optimizer.weight_decay"] == 0.1
    paper, code = pair("deberta-v2-xxlarge/rte/lora")
    assert (paper["lora.rank"], code["lora.rank"]) == (8, 16)
    assert (paper["optimizer.learning_rate"], code["optimizer.learning_rate"]) == (2e-4, 2.6e-4)
    assert (paper["optimizer.warmup"], code["optimizer.warmup"]) == (0.1, 50)
    paper, code = pair("roberta-large/stsb/lora")
    assert (paper["batch_size"], paper["epochs"], paper["data.max_length"]) == (8, 30, 512)
    assert (code["batch_size"], code["epochs"], code["data.max_length"]) == (4, 10, 128)
    penalties = [
        recipe(f"gpt2-medium/e2e_nlg/lora@{o}").decoding["length_penalty"]
        for o in ("paper", "code")
    ]
    assert penalties == [0.9, 0.8]


def test_a_name_without_origin_is_the_paper_s_and_else_prior_work_s():
    assert recipe("roberta-base/mrpc/lora") is recipe("roberta-base/mrpc/lora@paper")
    assert recipe("gpt2-medium/dart/full").origin == "prior"


def test_a_task_that_starts_from_mnli_says_so_and_takes_the_adapter_s_method(capsys):
    found = recipe("roberta-base/rte/lora")
    assert any("--from_adapter" in note for note in found.notes)
    assert not any("--from_adapter" in note for note in recipe("roberta-base/cola/lora").notes)
    config = read("--recipe", "roberta-base/rte/lora", "--from-adapter=out/mnli/best")
    assert (config.method, config.lora) == (TrainConfig.method, LoRA())
    assert config.optimizer.learning_rate == 5e-4
    skips = "note: recipe roberta-base/rte/lora: lorakit train skips method, lora"
    assert skips in capsys.readouterr().err


def test_a_recipe_gives_way_to_another_method(capsys):
    config = read("--recipe", "roberta-base/mrpc/lora", "--method", "bitfit")
    assert (config.method, config.epochs, config.peak_rate) == ("bitfit", 30, 1e-3)
    err = capsys.readouterr().err
    assert "skips lora, optimizer.learning_rate (without effect beside the arguments)" in err
    assert [line for line in recipe("roberta-base/mrpc/lora").notes if line not in err] == []


def test_gpt3_s_recipes_need_a_decoder_and_count_its_warm_up_in_steps():
    found = recipe("gpt3-175b/wikisql/lora-4.7m")
    assert "base.name" not in found.settings
    assert found.settings["optimizer.warmup"] == 6  # 250,000 tokens / (128 x 384), rounded up
    assert recipe("gpt3-175b/mnli-1k/lora").settings["data.limit"] == 1000


@pytest.mark.parametrize("task", ["mnli", "mnli-100"])
def test_mnli_of_gpt3_chooses_by_accuracy_on_the_matched_set(task):
    found = recipe(f"gpt3-175b/{task}/full")
    assert found.settings["data.validation_split"] == "validation_matched"
    assert found.settings["evaluation.metric"] == "accuracy"
    assert any("classification head" in note for note in found.notes)
    assert "data.validation_split" not in recipe("roberta-base/mnli/lora").settings


@pytest.mark.parametrize("task", ["e2e_nlg", "webnlg", "dart"])
def test_lora_on_gpt2_says_that_the_base_keeps_its_dropout(task):
    assert any("keeps the base's" in note for note in recipe(f"gpt2-medium/{task}/lora").notes)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'roberta-base/mrpc/lora'"):
        recipe("roberta-base/mrcp/lora")
    with pytest.raises(ConfigurationError, match="no recipe 'roberta-base/mrpc/lora@official'"):
        recipe("roberta-base/mrpc/lora@official")


def test_words_narrow_the_list():
    names = [found.name for found in matching("roberta-large rte @paper")]
    assert "roberta-large/rte/lora@paper" in names
    assert all("roberta-large/rte/" in name for name in names)
    assert matching("nothing-like-it") == []


def test_flags_override_a_recipe():
    flags = ("--lora.rank", "4", "--optimizer.warmup=0.1")
    config = read(*flags, "--recipe", "roberta-base/mrpc/lora")
    assert (config.lora.rank, config.lora.alpha, config.epochs) == (4, 8, 30)
    assert config.optimizer.warmup == 0.1
    assert config.base.name == "FacebookAI/roberta-base"
