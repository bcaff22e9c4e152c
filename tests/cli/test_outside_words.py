"""Text from data and models is printed literally, even if it looks like rich markup."""

from __future__ import annotations

import pytest
import tiny_runs

from lorakit.cli import main
from lorakit.cli.console import console
from lorakit.cli.layer_table import layer_table

WORDS = ("[/INST]", "[red]", " [a]")


@pytest.mark.parametrize("word", WORDS)
def test_a_cell_of_a_table(word, capsys):
    console().print(layer_table({"layer": {"token": word}}, each=True))
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("word", WORDS)
def test_a_label_and_a_file_of_a_data_set(word, tmp_path, capsys):
    base = tiny_runs.save_base(tmp_path / "base", "bert")
    labels = (word, "other")
    rows = [{"text": f"river {i}", "label": labels[i % 2]} for i in range(4)]
    data = tiny_runs.write_rows(tmp_path / "part[a].jsonl", rows)
    assert main(["data", "--base.name", base, "--data.train", data]) == 0
    out = "".join(capsys.readouterr().out.split("\n"))
    assert f"label {word.strip()}: 2" in out or f"label {word}: 2" in out
    assert "part[a].jsonl" in out
