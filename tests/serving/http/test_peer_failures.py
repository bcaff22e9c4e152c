"""What other servers of adapters got wrong, each tested under its symptom: here, or in the test named in the table."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from whole import alone, post, served, write

import lorakit
from lorakit.serving.continuous import PAGE

ELSEWHERE = {
    "loading an adapter evicts one that a request uses": (
        "test_adapter_memory",
        "test_eviction_never_takes_an_adapter_in_use",
    ),
    "a request in flight goes on with new content": (
        "test_store",
        "test_reload_under_the_old_name_gives_the_new_content_and_old_leases_keep_the_old",
    ),
    "unload forgets the name and keeps the memory": (
        "test_store",
        "test_a_removed_name_is_unknown_at_once_and_its_memory_is_freed",
    ),
    "loading while generating crashes": (
        "test_adapter_memory",
        "test_threads_that_load_while_the_model_runs_get_their_own_answers",
    ),
    "unload after traffic waits for ever": ("test_store", "test_unloading_after_traffic_returns"),
    "the disk is read at every step": (
        "test_store",
        "test_no_file_is_opened_for_an_adapter_that_is_loaded",
    ),
    "an adapter that matches no module answers as the base": (
        "test_store",
        "test_an_adapter_that_matches_no_module_is_refused",
    ),
    "a mixed batch uses another adapter's head": (
        "http.test_real_engines",
        "test_classes_and_scores_are_those_of_the_adapter_alone",
    ),
    "work goes on after the client has gone": (
        "http.test_live",
        "test_the_clients_disconnect_cancels_its_requests",
    ),
    "the API key does not cover every route": (
        "http.test_keys",
        "test_every_route_needs_a_key",
    ),
    "NaN of one request reaches others": (
        "test_engines",
        "test_nan_of_one_adapter_fails_its_requests_alone",
    ),
    "the page's pane of the base is answered by an adapter": (
        "http.test_playground_page",
        "test_the_base_in_an_adapters_place_is_caught",
    ),
    "a hot adapter starves the others": ("test_engines", "test_no_adapter_starves_the_others"),
}


@pytest.mark.parametrize("symptom", ELSEWHERE)
def test_the_table_names_tests(symptom: str) -> None:
    module, name = ELSEWHERE[symptom]
    assert callable(getattr(importlib.import_module(module.rpartition(".")[2]), name))


def test_an_adapter_reloaded_under_its_name_does_not_answer_from_the_old_prefix(
    text: Path,
    tmp_path: Path,
) -> None:
    folder = copied(text, tmp_path)
    prompt = "The river pub near the park serves cheap English food. " * 3
    assert len(tiny_tokenizer()(prompt)["input_ids"]) > 2 * PAGE
    old = alone_text(folder, "e2e", prompt)
    with served(folder) as (client, _):
        first = text_of(client, "e2e", prompt)
        write(
            folder / "base",
            folder / "adapters" / "e2e",
            lorakit.LoRA(rank=4, targets="all-linear"),
            seed=9,
            head={},
            task="completion",
            labels=[],
        )
        second = text_of(client, "e2e", prompt)
    new = alone_text(folder, "e2e", prompt)
    assert old != new
    assert (first, second) == (old, new)


def test_the_base_is_answered_by_the_base_beside_adapters_also_when_streamed(text: Path) -> None:
    prompt = "Which pub?"
    with served(text) as (client, _):
        for model, adapter in (("base", None), ("e2e", "e2e"), ("base", None)):
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": 6,
                "temperature": 0,
                "stream": True,
            }
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
            streamed = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
            assert streamed == alone_text(text, adapter, prompt)


def test_an_unknown_adapter_is_not_answered_by_the_base(text: Path) -> None:
    with served(text) as (client, _):
        answer = client.post("/v1/completions", json={"model": "e3e", "prompt": "a"})
    assert answer.status_code == 404
    assert "e2e" in answer.json()["error"]["message"]


def test_a_chat_template_of_an_adapter_runs_no_code(text: Path, tmp_path: Path) -> None:
    folder, proof = copied(text, tmp_path), tmp_path / "proof"
    tokenizer = tiny_tokenizer(
        chat_template=f"{{{{ cycler.__init__.__globals__.os.system('touch {proof}') }}}}"
    )
    tokenizer.save_pretrained(folder / "adapters" / "e2e")
    with served(folder) as (client, _):
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "e2e", "messages": [{"role": "user", "content": "a"}]},
        )
    assert answer.status_code == 400
    assert "template" in answer.json()["error"]["message"]
    assert not proof.exists()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_adapter_folder_runs_no_code(text: Path, tmp_path: Path) -> None:
    folder, proof = copied(text, tmp_path), tmp_path / "proof"
    evil = folder / "adapters" / "evil"
    evil.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (evil / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Touch(proof)}, evil / "adapter_model.bin")
    with served(folder, allow_loading=True) as (client, _):
        named = client.post("/v1/completions", json={"model": "evil", "prompt": "a"})
        loaded = client.post(
            "/v1/load_lora_adapter", json={"lora_name": "more", "lora_path": str(evil)}
        )
    assert named.status_code >= 400
    assert loaded.status_code >= 400
    assert not proof.exists()
    pickle.loads(pickle.dumps(Touch(proof)))  # the attack would have worked
    assert proof.exists()


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "copy"))


def text_of(client: Any, model: str, prompt: str) -> str:
    """Return the greedy answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    return post(client, "/v1/completions", **body)["choices"][0]["text"]


def alone_text(folder: Path, adapter: str | None, prompt: str) -> str:
    """Return the greedy continuation of `generate` on a base of its own."""
    return tiny_tokenizer().decode(alone(folder, adapter, prompt, 6), skip_special_tokens=True)
