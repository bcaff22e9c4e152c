"""The whole server on tiny models: every answer is what its adapters alone would have said."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from served import wait_for
from whole import LABELS, alone, post, served

import lorakit
from lorakit.compute.base import open_base
from lorakit.errors import ConfigurationError
from lorakit.models.loading import Base
from lorakit.serving import classifying
from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.engine import QueueFullError
from lorakit.serving.http.keys import Key, KeyRing, digest_of
from lorakit.tasks import LabelledExample

CHOICES: list[Any] = [None, "e2e", "sql", {"e2e": 0.5, "sql": -0.5}, "e2e", None]


@pytest.mark.slow
def test_requests_at_a_time_get_what_their_adapters_alone_say(text: Path) -> None:
    prompt = "The river pub"

    def ask(client: TestClient, adapter: Any, *, stream: bool) -> str:
        model = (
            {"model": "base", "lora": adapter}
            if isinstance(adapter, dict)
            else {"model": adapter or "base"}
        )
        body = {**model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        if not stream:
            return post(client, "/v1/completions", **body)["choices"][0]["text"]
        answer = client.post("/v1/completions", json={**body, "stream": True})
        events = [e.removeprefix("data: ") for e in answer.text.split("\n\n")[:-2]]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    with served(text) as (client, opened):
        assert opened.engine.name == "continuous"
        with ThreadPoolExecutor(12) as pool:
            answers = [
                [pool.submit(ask, client, adapter, stream=stream) for adapter in CHOICES]
                for stream in (False, True)
            ]
            whole, streamed = ([one.result() for one in several] for several in answers)
        tokenizer = opened.base.tokenizer
        assert tokenizer is not None
        wait_for(lambda: opened.store.stats().leases == 0)
    expected = [
        tokenizer.decode(alone(text, adapter, prompt, 12), skip_special_tokens=True)
        for adapter in CHOICES
    ]
    assert whole == streamed == expected
    assert len(set(expected)) == 4


@pytest.mark.slow
def test_seeds_logprobs_and_stops_hold_with_a_real_engine(text: Path) -> None:
    with served(text) as (client, opened):
        body = {
            "model": "sql",
            "prompt": "The river",
            "max_tokens": 10,
            "seed": 5,
            "n": 3,
            "logprobs": 1,
        }
        first, second = (post(client, "/v1/completions", **body)["choices"] for _ in range(2))
        assert [c["text"] for c in first] == [c["text"] for c in second]
        assert len({c["text"] for c in first}) > 1
        (lone,) = post(client, "/v1/completions", **{**body, "n": 1})["choices"]
        assert lone["text"] == first[0]["text"]
        # The reported log-probabilities are those of the adapter alone.
        lease = opened.store.acquire("sql")
        prompt = lease.tokenizer("The river")["input_ids"]
        request = post(
            client, "/v1/completions", **{**body, "n": 1, "temperature": 0, "max_tokens": 4}
        )
        (choice,) = request["choices"]
        ids = alone(text, "sql", "The river", 4)
        scores = opened.engine.score([*prompt, *ids], lease, start=len(prompt)).result(10)
        lease.release()
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)
        stop = choice["text"][1:3]
        stopped = post(
            client, "/v1/completions", **{**body, "n": 1, "temperature": 0, "stop": stop}
        )
        assert stopped["choices"][0]["text"] == choice["text"].partition(stop)[0]
        assert stopped["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_a_prefix_is_shared_only_by_requests_of_one_adapter(text: Path) -> None:
    with served(text) as (client, _):
        prompt = "The river pub near the park serves cheap English food. " * 4
        cached = [
            post(client, "/v1/completions", model=model, prompt=prompt, max_tokens=1)["usage"]
            ["prompt_tokens_details"]["cached_tokens"]
            for model in ("sql", "sql", "e2e", "base")
        ]  # fmt: skip
    assert cached[0] == cached[2] == cached[3] == 0
    assert cached[1] > 0


@pytest.mark.slow
def test_answers_are_computed_again_if_asked(text: Path) -> None:
    verdicts: list[Any] = []
    with served(text, report=lambda _, verdict: verdicts.append(verdict), verify=1.0) as (
        client,
        opened,
    ):
        for model in ("sql", "base"):
            post(client, "/v1/completions", model=model, prompt="The river", max_tokens=6, n=2)
        wait_for(lambda: len(verdicts) == 4)
        wait_for(lambda: opened.store.stats().leases == 0)
    assert all(verdict.agrees for verdict in verdicts)
    assert {verdict.receipt.adapters[0][0] for verdict in verdicts if verdict.receipt.adapters} == {
        "sql"
    }


@pytest.mark.slow
def test_loading_and_unloading_between_requests(text: Path) -> None:
    with served(text, allow_loading=True) as (client, opened):
        before = post(
            client, "/v1/completions", model="sql", prompt="a", max_tokens=5, temperature=0
        )
        post(client, "/v1/load_lora_adapter", lora_name="again", lora_path="sql")
        again = post(
            client, "/v1/completions", model="again", prompt="a", max_tokens=5, temperature=0
        )
        assert again["choices"] == before["choices"]
        post(client, "/v1/unload_lora_adapter", lora_name="again")
        assert (
            client.post("/v1/completions", json={"model": "again", "prompt": "a"}).status_code
            == 404
        )
        answer = client.post(
            "/v1/load_lora_adapter", json={"lora_name": "out", "lora_path": str(text / "base")}
        )
        assert answer.status_code == 400
        models = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["base", "e2e", "sql"]
        details = models[0]["details"]
        assert (details["kind"], details["dtype"], details["context"]) == ("text", "float32", 256)
        assert models[2]["details"]["rank"] == 4
        assert str(text) not in str(models)
        wait_for(lambda: opened.store.stats().leases == 0)


@pytest.mark.slow
def test_a_followed_run_can_be_pinned(text: Path, tmp_path: Path) -> None:
    shutil.copytree(text / "adapters" / "e2e", tmp_path / "run" / "adapter")
    with served(text, follow=[str(tmp_path / "run")], pin=["run", "sql"]) as (_, opened):
        assert opened.store.names() == ["e2e", "run", "sql"]
        assert all(opened.store.describe(name)["loaded"] for name in ("run", "sql"))


@pytest.mark.slow
def test_an_operator_loads_only_from_folders_that_its_key_allows(text: Path) -> None:
    secret = "k" * 20
    key = Key(name="k", digest=digest_of(secret), adapters=("e2e*", "absent-e2e"), operator=True)
    foreign = text / "adapters" / "sql"
    (text / "adapters" / "e2e-link").symlink_to(foreign)
    try:
        with served(text, keys=KeyRing([key]), allow_loading=True) as (client, opened):
            client.headers["authorization"] = f"Bearer {secret}"

            def load(path: str) -> tuple[int, str]:
                body = {"lora_name": "e2e-new", "lora_path": path}
                answer = client.post("/v1/load_lora_adapter", json=body)
                message = answer.json().get("error", {}).get("message", "")
                assert str(text) not in message.replace(path, "")
                return answer.status_code, re.sub("^'.*?'", "PATH", message)

            absent = load("absent-e2e")
            assert absent[0] == 400
            for path in (
                *("sql", "sql/", "./sql", "e2e/../sql", "e2e/../../adapters/sql", "e2e-link"),
                *("absent", "absent/", "e2e-absent/", str(foreign), f"{foreign}/"),
            ):
                assert load(path) == absent, path
            assert "e2e-new" not in opened.store.names()
            assert load("e2e/")[0] == 200
    finally:
        (text / "adapters" / "e2e-link").unlink()


@pytest.mark.slow
def test_a_refused_load_shows_no_path_of_the_server(text: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "damaged").mkdir(parents=True)
    (tmp_path / "adapters" / "damaged" / "adapter_config.json").write_text("{")
    (tmp_path / "base").symlink_to(text / "base")
    with served(tmp_path, allow_loading=True) as (client, _):
        for path in ("damaged", "damaged/", "damaged//", "absent/", "'", "../x", "x\n/y/z"):
            body = {"lora_name": "new", "lora_path": path}
            answer = client.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 400
            assert str(tmp_path) not in answer.text, path


@torch.no_grad()
def logits_alone(folder: Path, name: str, rows: list[Any]) -> torch.Tensor:
    labels = LABELS[name]
    head = (
        {"task": "sequence-classification", "num_labels": len(labels)}
        if labels
        else {"task": "regression"}
    )
    opened = lorakit.load_base(folder / "base", dtype="float32", **head)
    lorakit.load(opened.model, folder / "adapters" / name, name="x")
    return torch.cat(
        [opened.model(**opened.tokenizer(*row, return_tensors="pt")).logits for row in rows]
    )


@pytest.mark.slow
def test_classes_and_scores_are_those_of_the_adapter_alone(classes: Path) -> None:
    rows = [["The river pub", "A pub near the river"], ["cheap food", "a plane"], ["a", "b"]]
    with served(classes) as (client, opened):
        assert opened.engine.name == "classifying"
        details = client.get("/v1/models/base").json()["details"]
        assert (details["kind"], details["engine"]) == ("classification", "classifying")
        with ThreadPoolExecutor(6) as pool:
            calls = {
                (name, repeat): pool.submit(post, client, "/v1/classify", model=name, input=rows)
                for repeat in range(2)
                for name in LABELS
            }
            answers = {key: call.result()["data"] for key, call in calls.items()}
        refused = client.post("/v1/completions", json={"model": "two", "prompt": "a"})
        assert refused.status_code == 400
        assert "generates none" in refused.json()["error"]["message"]
        base = client.post("/v1/classify", json={"model": "base", "input": "a"})
        assert base.status_code == 400
        assert "no trained" in base.json()["error"]["message"]
        wait_for(lambda: opened.store.stats().leases == 0)
    for (name, _), data in answers.items():
        logits = logits_alone(classes, name, rows)
        if not LABELS[name]:
            assert [row["score"] for row in data] == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
            continue
        for row, probabilities in zip(data, logits.softmax(-1).tolist(), strict=True):
            assert list(row["scores"]) == LABELS[name]
            assert list(row["scores"].values()) == pytest.approx(probabilities, abs=1e-5)
            assert (
                row["label"]
                == LABELS[name][max(range(len(probabilities)), key=probabilities.__getitem__)]
            )


@pytest.mark.slow
def test_the_queue_of_a_classifier_is_bounded(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifying, "MOST_TEXTS", 5)
    text = LabelledExample(prompt="", completion="", input_ids=[5, 6], label=0)
    with served(classes, max_queue=2, max_running=1) as (_, opened):
        engine, lease = opened.engine, opened.store.acquire("two")
        assert isinstance(engine, ClassifyingEngine)
        assert engine.limits.queue == 2
        futures = []

        def fill(*counts: int) -> None:
            for count in counts:
                futures.append(engine.classify([text] * count, lease))

        def fill_twice() -> None:
            fill(2, 1)
            assert engine.status().waiting == 2
            with pytest.raises(QueueFullError, match="2 requests wait already"):
                fill(1)

        def fill_with_many() -> None:
            fill(9)
            with pytest.raises(QueueFullError, match="9 texts wait already"):
                fill(1)

        for action in (fill_twice, fill_with_many):
            engine.between_steps(action).result(60)
            assert [len(future.result(60)) for future in futures] == [2, 1, 9][: len(futures)]
        lease.release()


@pytest.mark.slow
def test_a_classifier_of_peft_with_three_labels(classes: Path, tmp_path: Path) -> None:
    for name in ("two", "three"):
        shutil.copytree(classes / "adapters" / name, tmp_path / "adapters" / name)
    (tmp_path / "adapters/three/lorakit.json").unlink()
    (tmp_path / "base").symlink_to(classes / "base")
    rows = [["The river pub", "A pub near the river"], ["a", "b"]]
    with served(tmp_path) as (client, _):
        answer = client.post("/v1/classify", json={"model": "three", "input": rows})
        assert "most labels of all adapters: --num_labels 3." in answer.json()["error"]["message"]
    with served(tmp_path, num_labels=3) as (client, _):
        for name, labels in (("three", ["LABEL_0", "LABEL_1", "LABEL_2"]), ("two", LABELS["two"])):
            data = post(client, "/v1/classify", model=name, input=rows)["data"]
            expected = logits_alone(tmp_path, name, rows).softmax(-1).tolist()
            for row, probabilities in zip(data, expected, strict=True):
                assert list(row["scores"]) == labels
                assert list(row["scores"].values()) == pytest.approx(probabilities, abs=1e-5)


def test_a_gguf_base_is_served_without_its_suffix(text: Path, monkeypatch) -> None:
    def named(*args: Any, **settings: Any) -> Base:
        base = open_base(*args, **settings)
        base.source = dataclasses.replace(base.source, name="tiny.Q4_0.gguf")
        return base

    monkeypatch.setattr("lorakit.serving.opening.open_base", named)
    with served(text, allow_other_base=True) as (client, _):
        assert post(client, "/v1/completions", model="tiny.Q4_0", prompt="a", max_tokens=1)


def test_the_number_of_labels_is_for_classifiers(text: Path) -> None:
    with pytest.raises(ConfigurationError, match="Remove --num_labels"), served(text, num_labels=3):
        pass


def test_classes_cannot_be_verified(classes: Path) -> None:
    with pytest.raises(ConfigurationError, match="Remove --verify"), served(classes, verify=0.5):
        pass
