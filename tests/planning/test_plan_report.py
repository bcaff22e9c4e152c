"""The page of a plan shows the numbers of the plan."""

from __future__ import annotations

import dataclasses
import re

import pytest
import tiny_models
import tiny_runs
from tiny_tokenizer import tiny_tokenizer

from lorakit.formatting import size
from lorakit.planning import Memory, Plan, plan
from lorakit.planning.gpt3 import arithmetic
from lorakit.planning.machine import Machine
from lorakit.planning.report import DRAWN, PARTS, memory_figure, plan_page
from lorakit.reporting import Page
from lorakit.reporting.page import Code, KeyFigures, Prose, Table
from lorakit.training.config import TrainConfig

MACHINE = Machine(products=1e9, traffic=1e9, draws=1e9, software=1000, origin="made up")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("plans")
    made = tiny_models.ARCHITECTURES["llama"]()
    made.update({"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 512})
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(folder / "base")
    return tiny_runs.config(folder, str(folder / "base"), max_steps=20)


@pytest.fixture(scope="module")
def planned(config) -> Plan:
    return plan(config, length=64, machine=MACHINE)


def tables(page: Page) -> dict[str, dict[str, list]]:
    """Return the rows of each table by first cell, keyed by the heading of the first column."""
    return {
        block.columns[0]: {str(row[0]): list(row[1:]) for row in block.rows}
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Table)
    }


def test_every_part_is_named_and_drawn_once():
    fields = [field.name for field in dataclasses.fields(Memory)]
    assert list(PARTS) == fields
    assert [part for parts in DRAWN.values() for part in parts] == fields


def test_the_page_shows_the_numbers_of_the_plan(planned, config):
    made = dataclasses.replace(
        planned,
        chosen=dataclasses.replace(
            planned.chosen,
            trained=1234,
            share=0.5,
            file_bytes=4936,
            seconds=0.25,
            memory=Memory(**dict(zip(PARTS, range(10, 110, 10), strict=True))),
        ),
        loading=0,
        tokens=500,
        steps=100,
    )
    page = plan_page(made, config, command="lorakit plan --length 64")
    shown = tables(page)
    columns = list(zip(*shown["Part"].values(), strict=True))
    assert columns[0] == (*(f"{10 * n} bytes" for n in range(1, 11)), "550 bytes")
    assert shown["Time"] == {
        "A step": ["250 ms", shown["Time"]["A step"][1]],
        "Tokens a second": [2000, shown["Time"]["Tokens a second"][1]],
        "100 steps": ["25s", shown["Time"]["100 steps"][1]],
    }
    assert [row[0] for row in shown["Quantity"].values()] == ["1,234", "50.0 %", "4,936"]
    assert page.summary[1:3] == [
        "Its peak memory is 550 bytes. A step of 500 tokens takes 250 ms.",
        "The run's 100 steps take 25s without evaluation.",
    ]
    full = made.full.memory.total / 550
    assert f"{full:.1f} times as much" in page.summary[3]
    assert (
        "LoRA 550 bytes (base 10 bytes, trained parameters 20 bytes, gradients, optimizer 70"
        in (memory_figure(made).charts[0].alt)
    )


def test_the_page_has_configuration_and_command(planned, config):
    page = plan_page(planned, config, command="lorakit plan --length 64")
    codes = [b for section in page.sections for b in section.blocks if isinstance(b, Code)]
    assert any("max_steps: 20" in code.text for code in codes)
    assert codes[-1].text == "lorakit plan --length 64"
    shown = tables(page)
    assert shown["Setting"]["max_steps"] == ["20"]
    assert shown["Fact"]["Machine"] == ["made up"]
    assert len(shown["Part"]["in a step"]) == 2
    assert "Quantity" in shown


def test_a_plan_of_full_fine_tuning_has_one_column(config):
    full = dataclasses.replace(config, method="full")
    planned = plan(full, length=64, machine=MACHINE)
    assert planned.full is None
    page = plan_page(planned, full, command="")
    assert tables(page)["Part"].keys() == {*(f"{k}: {v}" for k, v in PARTS.items()), "in a step"}
    assert all(len(row) == 1 for row in tables(page)["Part"].values())
    assert memory_figure(planned).charts[0].alt.count("Full fine-tuning") == 1
    assert page.summary[0].startswith("The whole model on ")
    assert not any("times as much" in sentence for sentence in page.summary)


def test_the_page_says_why_full_fine_tuning_is_missing(planned, config):
    alone = dataclasses.replace(
        planned, full=None, why_no_full="The base is in 4 bits.", steps=None
    )
    page = plan_page(alone, config, command="")
    texts = [b.text for section in page.sections for b in section.blocks if isinstance(b, Prose)]
    assert "Full fine-tuning is not shown. The base is in 4 bits." in texts
    assert not any("steps" in sentence for sentence in page.summary)
    (keys,) = (b for section in page.sections for b in section.blocks if isinstance(b, KeyFigures))
    assert not any("full fine-tuning" in figure.note for figure in keys.figures)


def test_the_summary_warns_if_loading_needs_more_memory(planned, config):
    page = plan_page(dataclasses.replace(planned, loading=10**12), config, command="")
    assert page.summary[-1] == ("Loading the base briefly needs more memory than training: 1 TB.")
    assert page.summary[1].startswith("Its peak memory is 1 TB.")
    (memory,) = (section for section in page.sections if section.title == "Memory and time")
    table = next(block for block in memory.blocks if isinstance(block, Table))
    assert table.rows[-1][:2] == ("in a step", size(planned.chosen.memory.total))


@pytest.mark.slow
def test_the_papers_arithmetic_is_shown_for_gpt3_only(planned, config):
    assert "The paper's arithmetic" not in [
        s.title for s in plan_page(planned, config, command="").sections
    ]
    lines = arithmetic()
    page = plan_page(dataclasses.replace(planned, paper=lines), config, command="")
    (section,) = (s for s in page.sections if s.title == "The paper's arithmetic")
    (table,) = section.blocks
    assert [": ".join(row) for row in table.rows] == list(lines)
    assert re.search(r"\b35 MB", str(table.rows[2][1]))
