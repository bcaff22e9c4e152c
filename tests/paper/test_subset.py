"""Random subsets of a training set: nested, deterministic and drawn once."""

import json

import pytest

from lorakit.data import DataConfig
from lorakit.errors import DataError
from lorakit.paper.subset import write_subset


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_smaller_draw_is_the_beginning_of_a_larger_one(data, tmp_path):
    config = DataConfig(task="mrpc", root=str(data))
    assert write_subset(config, 10, tmp_path / "ten.jsonl") == 10
    assert write_subset(config, 30, tmp_path / "thirty.jsonl") == 30
    assert rows(tmp_path / "thirty.jsonl")[:10] == rows(tmp_path / "ten.jsonl")
    whole = rows(data / "mrpc" / "train.jsonl")
    drawn = rows(tmp_path / "thirty.jsonl")
    assert all(row in whole for row in drawn)
    assert len({row["idx"] for row in drawn}) == 30
    assert [row["idx"] for row in drawn] != sorted(row["idx"] for row in drawn)


def test_of_a_smaller_set_all_is_written_and_a_file_that_is_there_is_kept(data, tmp_path):
    config = DataConfig(task="mrpc", root=str(data))
    path = tmp_path / "all.jsonl"
    assert write_subset(config, 1000, path) == 60
    before = path.read_bytes()
    assert write_subset(config, 5, path) == 60
    assert path.read_bytes() == before


def test_a_row_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl").write_text('{"a": 1}\nnot json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl:2.*not valid JSON"):
        write_subset(DataConfig(task="mrpc", root=str(tmp_path)), 5, tmp_path / "out.jsonl")
