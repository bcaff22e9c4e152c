from __future__ import annotations

import hashlib
import json

import datasets
import pytest
from test_readers import CALLS

from lorakit.data.rows import Row
from lorakit.data.sources import read_source
from lorakit.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name, numbers in {"b": [3], "a": [1, 2], "c": []}.items():
        lines = "".join(json.dumps({"n": n}) + "\n" for n in numbers)
        (tmp_path / f"part-{name}.jsonl").write_text(lines)
    return tmp_path


def numbers(source):
    return [row.values["n"] for row in source.rows if isinstance(row, Row)]


def test_a_file_has_the_digest_that_sha256sum_prints(folder):
    path = folder / "part-a.jsonl"
    source = read_source(str(path))
    assert numbers(source) == [1, 2]
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.columns == ["n"]


def test_several_files_and_patterns_are_read_in_order(folder):
    named = [str(folder / "part-b.jsonl"), str(folder / "part-a.jsonl")]
    assert numbers(read_source(named)) == [3, 1, 2]
    assert numbers(read_source(str(folder / "part-[ab].jsonl"))) == [1, 2, 3]
    assert read_source(named).sha256 != read_source(named[::-1]).sha256


def test_limit_counts_rows_over_all_files(folder):
    assert numbers(read_source(str(folder / "part-*.jsonl"), limit=3)) == [1, 2, 3]
    assert numbers(read_source(str(folder / "part-*.jsonl"), limit=1)) == [1]


def test_the_digest_is_of_all_the_content_whatever_the_limit(folder):
    where = str(folder / "part-a.jsonl")
    assert read_source(where, limit=1).sha256 == read_source(where).sha256


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("part-c.jsonl", r"part-c\.jsonl is empty: it has no rows"),
        (["part-a.jsonl", "part-c.jsonl"], r"part-c\.jsonl is empty"),
        (["part-a.jsonl", "part-?.jsonl"], r"part-a\.jsonl is named 2 times"),
        ("part-d.jsonl", r"no file or data set .*part-d\.jsonl.* Did you mean 'part-"),
        ("part-z*.jsonl", r"no file matches .*part-z\*\.jsonl"),
        (".", r"is a folder; .* \(data files in it: bad\.jsonl, part-a\.jsonl, part-b"),
        ("docstring", "Did you mean 'docstrings'"),
        ("notes.txt", r"notes\.txt: unknown format '\.txt'; data files end in \.jsonl"),
        ("bad.jsonl", r"bad\.jsonl is UTF-16\. Convert it: iconv -f utf-16 -t utf-8"),
        ([], "name at least one file"),
        ("", "name at least one file"),
    ],
)
def test_what_is_not_there_is_named(folder, monkeypatch, where, message):
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("x")
    (folder / "bad.jsonl").write_bytes('{"n": 1}\n{"n": 2}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=message):
        read_source(where)


def test_a_header_alone_is_an_empty_file(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is empty"):
        read_source(str(tmp_path / "data.csv"))


def test_hub_data_sets_bring_their_class_names(monkeypatch):
    calls = []
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    content = {"text": ["a", "b", "c"], "label": [1, 0, -1]}

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict(content, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source("owner/name:config@v1.0", "validation")
    assert calls == [(("owner/name", "config"), {"split": "validation", "revision": "v1.0"})]
    assert source.class_names == {"label": ("no", "yes")}
    assert [row.values["label"] for row in source.rows if isinstance(row, Row)] == [
        "yes",
        "no",
        None,
    ]
    assert source.rows[1].origin == "owner/name:config@v1.0[validation]:row 2"
    assert source.sha256 == read_source("owner/name", "validation").sha256
    content["text"][0] = "changed"
    assert source.sha256 != read_source("owner/name", "validation").sha256


def test_class_names_of_several_hub_data_sets_are_those_of_all(monkeypatch) -> None:
    names = {"owner/a": ["joy", "fear"], "owner/b": ["fear", "anger"]}

    def load_dataset(name, *_, **__):
        label = datasets.ClassLabel(names=names[name])
        features = datasets.Features(text=datasets.Value("string"), label=label)
        return datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source(["owner/a", "owner/b"], "train")
    assert source.class_names == {"label": ("joy", "fear", "anger")}


def test_hub_messages_have_no_members_that_arrow_added(monkeypatch):
    data = datasets.Dataset.from_list(CALLS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert [row.values for row in read_source("owner/name").rows] == CALLS


def test_media_of_hub_data_sets_are_not_decoded(monkeypatch):
    damaged = {"bytes": b"not a file", "path": None}  # decoding it would raise an error
    features = datasets.Features(
        text=datasets.Value("string"),
        image=datasets.Image(),
        images=datasets.List(datasets.Image()),
        part={"image": datasets.Image(), "n": datasets.Value("int64")},
        tags=datasets.List(datasets.Value("string")),
    )
    row = {"image": damaged, "images": [damaged], "part": {"image": damaged, "n": 1}}
    data = datasets.Dataset.from_list([{"text": "a", "tags": ["b"], **row}], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    source = read_source("owner/name")
    assert [row.values for row in source.rows] == [{"text": "a", "tags": ["b"]}]
    text = datasets.Dataset.from_list([{"text": "a", "tags": ["b"]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: text)
    assert source.sha256 == read_source("owner/name").sha256


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no Json")
def test_json_columns_of_hub_data_sets_are_read(monkeypatch):
    features = datasets.Features(calls=datasets.List(datasets.Json()))
    rows = [{"calls": [{"a": 1}, {"b": None}]}]
    data = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert [row.values for row in read_source("owner/name").rows] == rows


def test_a_hub_data_set_that_cannot_be_reached_is_named():
    with pytest.raises(DataError, match=r"no-one/nothing: the hub data set cannot be loaded"):
        read_source("no-one/nothing")


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_export(monkeypatch):
    calls = []

    def load_dataset(name, *args, **kwargs):
        calls.append((name, kwargs))
        if name != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found data.py")
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.values for row in read_source("owner/name:config", "test").rows] == [{"text": "a"}]
    files = "hf://datasets/owner/name@refs%2Fconvert%2Fparquet/config/test/*.parquet"
    assert calls[-1] == ("parquet", {"data_files": {"test": files}, "split": "test"})
    with pytest.raises(DataError, match="Dataset scripts are no longer supported"):
        read_source("owner/name@v1.0", "test")  # the export has no revisions
