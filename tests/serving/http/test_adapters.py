"""Listing, loading and unloading adapters; classes and scores; metrics."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from fakes import BASE_DIGEST, FakeClassifier, FakeEngine, FakeStore, classifying_store
from prometheus_client.parser import text_string_to_metric_families
from served import BASE, Serve
from test_errors import error_of

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.serving.engine import QueueFullError
from lorakit.serving.errors import EngineStoppedError, StoreFullError
from lorakit.serving.http import metrics as metrics_module
from lorakit.serving.http.keys import Budget, Key, KeyRing, digest_of
from lorakit.serving.http.metrics import Metrics
from lorakit.serving.verification import Verdict
from lorakit.version import __version__


def test_models_are_the_base_and_the_adapters(serve: Serve) -> None:
    served = serve(max_top_logprobs=7)
    listed = served.client.get("/v1/models").json()
    assert listed["object"] == "list"
    base, e2e, sql = listed["data"]
    assert (base["id"], base["root"], base["parent"]) == (BASE, BASE, None)
    assert (sql["id"], sql["root"], sql["parent"]) == ("sql", "sql", BASE)
    assert base["details"] == {
        "digest": BASE_DIGEST,
        "kind": "text",
        "chat": True,
        "dtype": "float32",
        "context": 256,
        "engine": "fake",
        "notice": None,
        "limits": {
            "max_tokens": 4096,
            "max_choices": 32,
            "max_blend": 8,
            "max_stops": 4,
            "max_top_logprobs": 7,
            "max_messages": 1024,
        },
        "version": __version__,
    }
    shared = {name: base["details"][name] for name in ("kind", "context", "limits")}
    assert sql["details"] == {"rank": 8, "task": "completion", **shared}
    assert served.client.get("/v1/models/sql").json() == sql
    assert served.client.get(f"/v1/models/{BASE}").json() == base
    assert "/private" not in str(listed)
    assert "Models:" in error_of(served.client.get("/v1/models/nothing"), 404)["message"]
    assert e2e["object"] == "model"


def test_a_damaged_adapter_leaves_the_list_whole(serve: Serve) -> None:
    class Damaged(FakeStore):
        def describe(self, name: str) -> dict[str, Any]:
            if name == "e2e":
                raise AdapterFileError("'e2e' is damaged.")
            return super().describe(name)

    models = serve(store=Damaged()).client.get("/v1/models").json()["data"]
    assert models[1]["details"]["error"] == "'e2e' is damaged."
    assert models[1]["details"]["kind"] == "text"
    assert len(models) == 3


# --- loading and unloading -----------------------------------------------------------------------------


def test_loading_is_off_unless_allowed(serve: Serve) -> None:
    served = serve()
    for path, body in (
        ("load", {"lora_name": "new", "lora_path": "new"}),
        ("unload", {"lora_name": "sql"}),
    ):
        error = error_of(served.post(f"/v1/{path}_lora_adapter", **body), 403)
        assert error["code"] == "allow_loading"
        assert "--allow_loading true" in error["message"]
    assert served.store.names() == ["e2e", "sql"]


def test_an_adapter_is_loaded_and_unloaded(serve: Serve) -> None:
    served = serve(allow_loading=True)
    answer = served.post("/v1/load_lora_adapter", lora_name="new", lora_path="new")
    assert answer.json() == {"id": "new", "object": "model", "status": "loaded"}
    assert served.complete(model="new").status_code == 200
    answer = served.post("/v1/unload_lora_adapter", lora_name="new")
    assert answer.json()["status"] == "unloaded"
    assert served.complete(model="new").status_code == 404
    error = error_of(served.post("/v1/unload_lora_adapter", lora_name="new"), 404)
    assert error["param"] == "lora_name"
    assert "secret" not in error["message"]


def test_loads_take_no_thread_of_other_routes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight that wait for a batch would else stop /metrics."""
    threads: list[str] = []
    monkeypatch.setattr(
        FakeStore, "add", lambda *_, **__: threads.append(threading.current_thread().name)
    )
    served = serve(allow_loading=True)
    served.post("/v1/load_lora_adapter", lora_name="new", lora_path="new")
    assert [name.rpartition("_")[0] for name in threads] == ["lorakit-load"]


def test_the_base_cannot_be_unloaded(serve: Serve) -> None:
    served = serve(allow_loading=True)
    error = error_of(served.post("/v1/unload_lora_adapter", lora_name=BASE), 400)
    assert error["message"] == f"'lora_name' is '{BASE}', the base. Only adapters can be unloaded."


def test_a_load_into_an_engine_that_has_failed_is_503(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EngineStoppedError("The engine has failed.")

    monkeypatch.setattr(FakeStore, "add", fail)
    answer = serve(allow_loading=True).post(
        "/v1/load_lora_adapter", lora_name="new", lora_path="new"
    )
    assert error_of(answer, 503)["code"] == "unavailable"


LOADS = {
    "a name taken": ({"lora_name": "sql", "lora_path": "sql"}, "lora_name", "load_inplace"),
    "the base's name": ({"lora_name": "base", "lora_path": "sql"}, "lora_name", "name of the base"),
    "a path outside": ({"lora_name": "new", "lora_path": "../x"}, "lora_path", "outside"),
    "a name with a slash": ({"lora_name": "a/b", "lora_path": "x"}, "lora_name", "without slashes"),
    "a hidden name": ({"lora_name": ".a", "lora_path": "x"}, "lora_name", "without a dot"),
    "no name": ({"lora_name": "", "lora_path": "x"}, "lora_name", "must be a name of up to 200"),
    "no path": ({"lora_name": "new"}, "lora_path", "is missing"),
}


@pytest.mark.parametrize("case", LOADS)
def test_an_invalid_load(serve: Serve, case: str) -> None:
    body, param, words = LOADS[case]
    served = serve(allow_loading=True)
    if case == "the base's name":
        served.app.state.serving.base_name = "base"
    error = error_of(served.post("/v1/load_lora_adapter", **body), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_a_name_may_be_that_of_any_folder(serve: Serve) -> None:
    answer = serve(allow_loading=True).post(
        "/v1/load_lora_adapter", lora_name="für mich", lora_path="new"
    )
    assert answer.json()["id"] == "für mich"


def test_an_adapter_is_replaced_if_asked(serve: Serve) -> None:
    served = serve(allow_loading=True)
    body = {"lora_name": "sql", "lora_path": "sql", "load_inplace": True}
    assert served.post("/v1/load_lora_adapter", **body).status_code == 200


def test_a_load_that_finds_no_room_may_be_repeated(serve: Serve) -> None:
    served = serve(allow_loading=True)
    served.store.fails = StoreFullError("All memory for adapters is in use.")
    answer = served.post("/v1/load_lora_adapter", lora_name="new", lora_path="new")
    assert error_of(answer, 503)["code"] == "adapter_memory_full"
    assert int(answer.headers["retry-after"]) >= 1


# --- classes and scores --------------------------------------------------------------------------------


def test_a_pair_is_classified_as_in_training(serve: Serve) -> None:
    served = serve(store=classifying_store(), engine=FakeClassifier())
    answer = served.post("/v1/classify", model="mrpc", input=[["The pub", "A pub"], ["a", "b"]])
    assert answer.status_code == 200, answer.text
    content = answer.json()
    encoded = served.store.tokenizer("The pub", "A pub")["input_ids"]
    first, second = content["data"]
    expected = 1 / (1 + math.exp(-len(encoded)))
    assert first["label"] == "not_equivalent"
    assert first["score"] == pytest.approx(expected)
    assert first["scores"]["equivalent"] == pytest.approx(1 - expected)
    assert (first["index"], second["index"]) == (0, 1)
    assert content["usage"]["completion_tokens"] == 0
    assert content["system_fingerprint"] == served.store.leases[0].receipt.fingerprint
    assert answer.headers["x-lorakit-adapter"] == "c" * 64


@pytest.mark.parametrize("given", ["The pub", ["The pub", "A park"]])
def test_texts_are_classified(serve: Serve, given: Any) -> None:
    served = serve(store=classifying_store(), engine=FakeClassifier())
    content = served.post("/v1/classify", model="reviews", input=given).json()
    assert [row["label"] for row in content["data"]] == ["bad"] * (
        1 if isinstance(given, str) else 2
    )


def test_a_score_has_no_label(serve: Serve) -> None:
    served = serve(store=classifying_store(), engine=FakeClassifier(outputs=1))
    (row,) = served.post("/v1/classify", model="stsb", input=[["a", "b"]]).json()["data"]
    assert (row["label"], row["scores"]) == (None, {})
    assert row["score"] == len(served.store.tokenizer("a", "b")["input_ids"])


CLASSIFIED = {
    "the base": ({"model": BASE, "input": "a"}, "model", "neither classes nor"),
    "an adapter for text": ({"model": "sql", "input": "a"}, "model", "neither classes nor"),
    "one text for a pair": ({"model": "mrpc", "input": "a"}, "input.0", "takes pairs of texts"),
    "an empty text": ({"model": "reviews", "input": ["a", ""]}, "input.1", "empty"),
    "three texts": ({"model": "mrpc", "input": [["a", "b", "c"]]}, "input", "pairs of texts"),
    "mixed": ({"model": "mrpc", "input": [["a", "b"], "c"]}, "input", "pairs of texts"),
    "nothing": ({"model": "mrpc", "input": []}, "input", "it must be a text"),
    "too many": ({"model": "reviews", "input": ["a"] * 257}, "input", "max_inputs"),
    "too long": ({"model": "reviews", "input": "a b " * 300}, "input.0", "the context is 256"),
    "an unknown field": ({"model": "reviews", "input": "a", "top": 1}, "top", "is not a field"),
}


@pytest.mark.parametrize("case", CLASSIFIED)
def test_an_invalid_classification_names_its_field(serve: Serve, case: str) -> None:
    body, param, words = CLASSIFIED[case]
    served = serve(store=classifying_store(), engine=FakeClassifier())
    error = error_of(served.post("/v1/classify", **body), 400)
    assert error["param"] == param
    assert words in error["message"], error["message"]


def test_a_server_for_text_does_not_classify(serve: Serve) -> None:
    assert (
        "generates text"
        in error_of(serve().post("/v1/classify", model="sql", input="a"), 400)["message"]
    )


@pytest.mark.parametrize(
    ("error", "status"), [(QueueFullError(), 429), (LorakitError("dead"), 500), (OSError("x"), 500)]
)
def test_errors_of_the_classifier(serve: Serve, error: Exception, status: int) -> None:
    classifier = FakeClassifier()
    classifier.refuses = error
    served = serve(store=classifying_store(), engine=classifier)
    error_of(served.post("/v1/classify", model="reviews", input="a"), status)


def test_the_task_is_that_of_the_leased_adapter(serve: Serve) -> None:
    """Another adapter may have its name by now."""
    store = classifying_store()
    served = serve(store=store, engine=FakeClassifier())
    acquire = store.acquire

    def acquire_and_replace(choice: Any) -> Any:
        lease = acquire(choice)
        store.records[choice] = {"task": "mrpc", "labels": ["x", "y"], "outputs": 2}
        return lease

    store.acquire = acquire_and_replace  # type: ignore[method-assign]
    assert served.post("/v1/classify", model="reviews", input="a").status_code == 200


def test_unused_tokens_of_a_key_are_given_back(serve: Serve) -> None:
    key = Key(name="k", digest=digest_of("k" * 20), tokens=Budget(100, now=lambda: 0.0))
    classifier = FakeClassifier()
    classifier.refuses = QueueFullError()
    served = serve(store=classifying_store(), engine=classifier, keys=KeyRing([key]))
    served.client.headers["authorization"] = "Bearer " + "k" * 20
    error_of(served.post("/v1/classify", model="reviews", input="a b c"), 429)
    assert key.tokens.take(100) == 0  # type: ignore[union-attr]


def test_an_output_that_is_not_finite_is_an_error(serve: Serve) -> None:
    from concurrent.futures import Future

    import torch

    classifier = FakeClassifier()
    served = serve(store=classifying_store(), engine=classifier)

    def classify(examples: Any, lease: Any) -> Future[torch.Tensor]:
        future: Future[torch.Tensor] = Future()
        future.set_result(torch.full((1, 2), float("nan")))
        return future

    classifier.classify = classify  # type: ignore[method-assign]
    error = error_of(served.post("/v1/classify", model="reviews", input="a"), 500)
    assert error["code"] == "not_finite"


# --- metrics -------------------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_metrics_count_what_happened(serve: Serve) -> None:
    served = serve()
    usage = served.complete(max_tokens=5, n=2).json()["usage"]
    served.complete(model="nobody")
    served.client.get("/unknown/path")
    served.complete(model=BASE, lora={"sql": 0.5, "e2e": 0.5}, max_tokens=1)
    served.settle()
    for alone in (-1.5, math.nan):
        verdict = Verdict(None, (-1.0,), (alone,), bound=0.3)
        served.app.state.serving.metrics.verified("sql", verdict)
    answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    route = "/v1/completions"
    assert found["lorakit_requests_total", ("sql", route, "200")] == 1
    assert found["lorakit_requests_total", ("(none)", route, "404")] == 1
    assert found["lorakit_requests_total", ("(none)", "(none)", "404")] == 1
    assert found["lorakit_requests_total", ("(blend)", route, "200")] == 1
    assert found["lorakit_prompt_tokens_total", ("sql",)] == usage["prompt_tokens"]
    assert found["lorakit_cached_prompt_tokens_total", ("sql",)] == cached > 0
    assert found["lorakit_generated_tokens_total", ("sql",)] == 10
    assert found["lorakit_time_to_first_token_seconds_count", ()] == 3
    assert found["lorakit_time_between_tokens_seconds_count", ()] == 8
    assert found["lorakit_request_seconds_count", (route,)] == 3
    assert found["lorakit_running_requests", ()] == 1
    assert found["lorakit_waiting_requests", ()] == 2
    assert found["lorakit_cache_used_ratio", ()] == 0.5
    assert found["lorakit_adapters_loaded", ()] == 2
    assert found["lorakit_adapter_bytes", ()] == 1000
    assert found["lorakit_adapter_loads_total", ()] == 3
    assert found["lorakit_adapter_evictions_total", ()] == 1
    assert found["lorakit_verified_answers_total", ("sql", "failed")] == 2
    assert found["lorakit_verification_difference_sum", ()] == 0.5
    assert "nobody" not in answer.text
    assert "unknown/path" not in answer.text


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MOST_LABELS", 3)
    metrics = Metrics(FakeEngine().status, FakeStore().stats)
    labels = [metrics.label(f"adapter{number}") for number in range(5)]
    assert labels == ["adapter0", "adapter1", "adapter2", "(other)", "(other)"]
    assert metrics.label("adapter0") == "adapter0"
