"""The studies: their rows and columns are the paper's, and every method has the same number of trials."""

import pytest

from lorakit.configuration import nested
from lorakit.errors import ConfigurationError
from lorakit.methods.registry import SECTIONS
from lorakit.paper.published import PUBLISHED
from lorakit.paper.record import Record
from lorakit.paper.studies import STUDIES
from lorakit.paper.study import MAX_TRIALS
from lorakit.training.config import TrainConfig


@pytest.mark.parametrize("name", STUDIES)
def test_columns_and_settings_are_those_of_the_published_table(name):
    study = STUDIES[name]
    for data_set in study.data_sets:
        assert {column.name for column in data_set.columns} <= set(study.table.columns)
    settings = {row.setting for row in study.table.rows}
    if {variant.method for variant in study.variants} == {"LoRA"}:
        assert {variant.setting for variant in study.variants} == settings
    assert len({variant.key for variant in study.variants}) == len(study.variants)


def test_every_row_of_table_15_is_a_variant():
    ours = [(variant.method, variant.setting) for variant in STUDIES["table15"].variants]
    assert ours == [(row.method, row.setting) for row in PUBLISHED["table15"].rows]


@pytest.mark.parametrize(
    "variant",
    [v for s in STUDIES.values() for v in s.variants if v.settings["method"] in SECTIONS],
    ids=lambda variant: variant.key,
)
def test_a_variant_s_settings_are_those_of_a_run(variant):
    settings = {"base.name": "x", "data.train": "x.jsonl", "output": "out", **variant.settings}
    config = TrainConfig(**nested(settings))
    assert config.chosen_method is not None


@pytest.mark.parametrize("trials", range(1, MAX_TRIALS + 1))
def test_every_method_has_as_many_rates_and_they_grow_around_the_same_middle(trials):
    for name in STUDIES:
        for variant in STUDIES[name].variants:
            rates = variant.rates(trials)
            assert len(set(rates)) == trials
            assert rates == sorted(rates)
            assert set(variant.rates(1)) <= set(rates)


def test_columns_of_table_14_find_scores_without_java():
    (data_set,) = STUDIES["table14"].data_sets
    scores = {"BLEU": 1.0, "METEOR": 2.0, "TER": 3.0}
    named = {
        f"{name}{part}{' (without Java)' if name == 'METEOR' else ''}": value
        for name, value in scores.items()
        for part in ("", " seen", " unseen")
    }
    record = Record(data_set="webnlg", variant="lora", rate=1e-3, seed=0, scores=named)
    assert {column.name: record.score(column.score) for column in data_set.columns} == {
        column.name: scores[column.score.split()[0]] for column in data_set.columns
    }


def test_a_study_narrows_to_what_is_named_in_the_table_s_order():
    chosen = STUDIES["table2"].choose(("rte", "mrpc"), ("lora", "full"))
    assert [d.key for d in chosen.data_sets] == ["mrpc", "rte"]
    assert [v.key for v in chosen.variants] == ["full", "lora"]


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        (("mrcp",), None, "tasks names 'mrcp'.*Did you mean 'mrpc'"),
        (None, ("lora", "lora"), "name each once"),
        ((), None, "tasks is empty"),
    ],
)
def test_names_that_a_table_does_not_have(tasks, methods, message):
    with pytest.raises(ConfigurationError, match=message):
        STUDIES["table2"].choose(tasks, methods)
