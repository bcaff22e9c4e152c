"""The soak test finds wrong, stale and lost answers, with a server that makes them."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import own_loop
import pytest
import torch
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import faults, soak
from benchmarks.serving_workload import write_adapter
from benchmarks.soak_check import Checked, Reference, Vocabulary, check, receipt_of
from benchmarks.soak_load import (
    Kept,
    Outcome,
    Question,
    Site,
    Timeline,
    ask,
    ask_bad,
    change,
    question,
    send_malformed,
)
from benchmarks.soak_load import soak as run_clients
from lorakit.serving import continuous

BOUND = 1e-3
TOKENIZER = tiny_tokenizer()
NAMES = ("t0", "t1")
DIGESTS = {f"{n:016x}": f"v{n}" for n in range(4)}
"""Contents by made-up digests."""
DIGEST_OF = {content: digest for digest, content in DIGESTS.items()}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # clear preferences
    with torch.no_grad():
        # Hide the parts of characters, which have no text of their own: in the direction of a constant feature.
        model.model.norm.weight[0] = 1
        model.model.embed_tokens.weight[:, 0] = 30
        model.lm_head.weight[:, 0] = torch.tensor(
            [-3.0 if "\ufffd" in TOKENIZER.decode([i]) else 0.0 for i in range(len(TOKENIZER))]
        )
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("contents")
    for i, content in enumerate(DIGEST_OF):
        write_adapter(root / content, model.config, seed=i, rank=2, scale=0.3)
    return {content: root / content for content in DIGEST_OF}


class Server:
    """A correct server without batches, with a fault of choice."""

    def __init__(self, model: LlamaForCausalLM, folders: dict[str, Path], fault: str = "") -> None:
        self.reference = Reference(copy.deepcopy(model), folders)
        self.fault = fault
        self.contents = {"t0": "v0", "t1": "v1"}
        self.asked = 0
        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def load(self, request: Request) -> Response:
        body = await request.json()
        path = Path(body["lora_path"])
        if path not in self.reference._folders.values():
            return _error(400, "path")
        if self.fault != "stale" or body["lora_name"] not in self.contents:
            self.contents[body["lora_name"]] = path.name
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        del self.contents[(await request.json())["lora_name"]]
        return JSONResponse({})

    async def complete(self, request: Request) -> Response:
        try:
            body = json.loads(await request.body())
            prompt = body["prompt"]
            known = {
                "model",
                "prompt",
                "max_tokens",
                "temperature",
                "seed",
                "logprobs",
                "stream",
                "lora",
            }
            ok = (
                set(body) <= known
                and isinstance(body["max_tokens"], int)
                and body.get("temperature", 0) >= 0
            )
            ok = ok and 0 < len(prompt) < 100 and all(0 <= t < len(TOKENIZER) for t in prompt)
        except Exception:
            return _error(400, "body")
        if not ok:
            return _error(500 if self.fault == "crashes" else 400, "body")
        self.asked += 1
        is_faulty = self.asked % 5 == 0
        if self.fault == "loses":
            await asyncio.sleep(60)
        lora = body.get("lora") or ({} if body["model"] == "base" else {body["model"]: 1.0})
        if any(name not in self.contents for name in lora):
            missing = [name for name in lora if name not in self.contents]
            return _error(500 if "nan" in missing else 404, "missing")
        names = tuple((self.contents[name], weight) for name, weight in lora.items())
        receipt = ";".join(
            [
                "base=0123",
                *(
                    f"{name}={DIGEST_OF[self.contents[name]]}" + ("" if w == 1 else f"*{w:g}")
                    for name, w in lora.items()
                ),
            ]
        )
        used = names
        if is_faulty and self.fault == "wrong adapter" and names:
            used = (("v3", 1.0),)
        if is_faulty and self.fault == "base instead":
            used = ()
        ids, logprobs = [], []
        draws = torch.Generator().manual_seed(body["seed"])
        with self.reference.adapted(used):
            for _ in range(body["max_tokens"]):
                scores = self.reference.logprobs([(prompt + ids, [])])[0][0]
                token = int(scores.argmax())
                if body["temperature"]:
                    token = int(torch.multinomial(scores.exp(), 1, generator=draws))
                ids.append(token)
                logprobs.append(float(scores[token]))
                if token == TOKENIZER.eos_token_id:
                    break
        finish = "stop" if ids[-1] == TOKENIZER.eos_token_id else "length"
        if is_faulty and self.fault == "cuts":
            ids, logprobs = ids[:-1], logprobs[:-1]
        tokens = [TOKENIZER.decode([i]) for i in ids]
        answer = {
            "system_fingerprint": receipt,
            "choices": [
                {
                    "finish_reason": finish,
                    "logprobs": {"tokens": tokens, "token_logprobs": logprobs},
                }
            ],
        }
        headers = {"x-lorakit-adapter": receipt}
        if not body["stream"]:
            return JSONResponse(answer, headers=headers)

        async def events() -> Any:
            yield f"data: {json.dumps(answer)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), headers=headers)


def _error(status: int, code: str) -> Response:
    return JSONResponse({"error": {"message": "", "code": code, "type": ""}}, status)


def site_of(server: Server, folders: dict[str, Path]) -> Site:
    """A site for the clients, with the adapters that the server begins with."""
    timeline = Timeline()
    for name, content in server.contents.items():
        timeline.loaded(name, content, 0, 0)
    return Site(
        url="http://fake",
        base="base",
        names=NAMES,
        versions={c: folders[c] for c in ("v0", "v1", "v2")},
        prefixes=[tuple(range(5, 25))],
        vocabulary=len(TOKENIZER),
        answer=(2, 4),
        timeline=timeline,
        outside=Path("/elsewhere"),
        bad=("nan",),
        time_limit=0.5,
    )


def checked_answers(
    model: LlamaForCausalLM, folders: dict[str, Path], site: Site, outcome: Outcome
) -> Checked:
    return check(
        outcome.kept,
        Reference(copy.deepcopy(model), folders),
        Vocabulary(TOKENIZER),
        DIGESTS,
        site.timeline,
        bound=BOUND,
        end_tokens=frozenset({TOKENIZER.eos_token_id}),
    )


def run(model: LlamaForCausalLM, folders: dict[str, Path], fault: str) -> tuple[Outcome, Checked]:
    """Send a fixed sequence of requests to a server with a fault, and check its answers."""
    server, outcome = Server(model, folders, fault), Outcome()
    site = site_of(server, folders)
    rng = random.Random(0)

    async def send() -> None:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(base_url=site.url, transport=transport) as http:
            for number in range(60):
                await ask(http, site, question(site, rng), outcome, leave=number % 20 == 7)
                if number % 6 == 5:
                    await change(http, site, rng, outcome)
                if number % 20 == 5:
                    await ask_bad(http, site, rng, outcome)
            for _ in range(60):
                await send_malformed(http, site, rng, outcome)

    own_loop.run(send())
    return outcome, checked_answers(model, folders, site, outcome)


@pytest.mark.slow
def test_a_correct_server_passes(model: LlamaForCausalLM, folders: dict[str, Path]) -> None:
    outcome, checked = run(model, folders, "")
    assert not checked.wrong
    assert outcome.unexpected == Counter()
    assert outcome.lost == 0
    assert checked.answers == len(outcome.kept) > 30
    assert checked.tokens > 60
    assert 0 < checked.greedy < checked.tokens
    assert checked.worst < BOUND
    assert set(outcome.changes) >= {"reload"}
    assert any(name.startswith("malformed") for name in outcome.expected)
    assert any(name.startswith("nan") for name in outcome.expected)
    assert outcome.disconnected > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong adapter", "log-probability off"),
        ("base instead", "log-probability off"),
        ("stale", "stale or foreign content"),
        ("cuts", "cut short"),
    ],
)
def test_wrong_answers_are_found(
    model: LlamaForCausalLM, folders: dict[str, Path], fault: str, reason: str
) -> None:
    _, checked = run(model, folders, fault)
    assert checked.reasons.get(reason, 0) > 0
    assert len(checked.wrong) < checked.answers


@pytest.mark.slow
def test_clients_at_the_same_time(model: LlamaForCausalLM, folders: dict[str, Path]) -> None:
    server, outcome = Server(model, folders), Outcome()
    site = replace(site_of(server, folders), time_limit=60)
    transport = httpx.ASGITransport(server.app)
    own_loop.run(run_clients(site, 4, 2, outcome, transport=transport))
    assert outcome.kept
    assert (outcome.lost, outcome.unexpected) == (0, Counter())
    assert not checked_answers(model, folders, site, outcome).wrong


@pytest.mark.slow
def test_lost_answers_are_found(model: LlamaForCausalLM, folders: dict[str, Path]) -> None:
    server, outcome = Server(model, folders, "loses"), Outcome()
    site = site_of(server, folders)
    transport = httpx.ASGITransport(server.app)
    own_loop.run(run_clients(site, 4, 1.5, outcome, transport=transport))
    assert outcome.lost > 0
    assert not outcome.kept


@pytest.mark.slow
def test_a_malformed_body_must_not_be_an_error_of_the_server(
    model: LlamaForCausalLM, folders: dict[str, Path]
) -> None:
    outcome, _ = run(model, folders, "crashes")
    assert any(name.startswith("malformed") and "500" in name for name in outcome.unexpected)


# --- parts -------------------------------------------------------------------------------------------


def test_the_timeline_allows_both_contents_during_a_change() -> None:
    timeline = Timeline()
    timeline.loaded("t", "old", 0, 0)
    timeline.loaded("t", "new", 10, 11)
    timeline.unloaded("t", 20, 21)
    timeline.loaded("t", "old", 30, 31)
    assert timeline.may_be("t", "old", 5, 6)
    assert not timeline.may_be("t", "new", 5, 6)
    assert timeline.may_be("t", "old", 10.5, 10.6)
    assert timeline.may_be("t", "new", 10.5, 10.6)
    assert not timeline.may_be("t", "old", 12, 13)
    assert timeline.may_be("t", "new", 12, 13)
    assert not timeline.may_be("t", "new", 22, 29)
    assert timeline.may_be("t", "old", 22, 40)
    # A replacement keeps the name.
    assert not timeline.may_be_missing("t", 9, 12)
    assert timeline.may_be_missing("t", 19, 20.5)
    assert timeline.may_be_missing("t", 22, 23)
    assert not timeline.may_be_missing("t", 31, math.inf)
    assert timeline.may_be_missing("unknown", 1, 2)
    assert timeline.exists("t")


@pytest.mark.parametrize(
    ("fingerprint", "expected"),
    [
        ("base=12", ("12", [])),
        ("base=12;a=34", ("12", [("a", "34", 1.0)])),
        ("base=12;a=34*0.75;b=56*0.5", ("12", [("a", "34", 0.75), ("b", "56", 0.5)])),
    ],
)
def test_receipts_are_read(fingerprint: str, expected: object) -> None:
    assert receipt_of(fingerprint) == expected


@pytest.fixture
def answer(model: LlamaForCausalLM, folders: dict[str, Path]) -> Kept:
    """A right greedy answer of two tokens."""
    prompt = (5, 6, 7, 8)
    ids: list[int] = []
    logprobs = []
    reference = Reference(copy.deepcopy(model), folders)
    with reference.adapted((("v0", 1.0),)):
        for _ in range(2):
            scores = reference.logprobs([((*prompt, *ids), [])])[0][0]
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return Kept(
        Question(prompt, (("t0", 1.0),), 2, 0.0, 0, False),
        sent=1,
        headers=2,
        fingerprint=f"base=0;t0={DIGEST_OF['v0']}",
        tokens=[TOKENIZER.decode([i]) for i in ids],
        logprobs=logprobs,
        finish="length",
    )


def checked_alone(model: LlamaForCausalLM, folders: dict[str, Path], kept: Kept) -> Checked:
    timeline = Timeline()
    timeline.loaded("t0", "v0", 0, 0)
    reference = Reference(copy.deepcopy(model), folders)
    return check([kept], reference, Vocabulary(TOKENIZER), DIGESTS, timeline, bound=BOUND)


def changes(kept: Kept) -> Iterator[tuple[str, Kept]]:
    """Yield wrong answers with their reasons."""
    tokens = [t for t in ("a", "e", "t") if t != kept.tokens[0]]
    yield "log-probability off", replace(kept, tokens=[tokens[0], kept.tokens[1]])
    yield "log-probability off", replace(kept, logprobs=[kept.logprobs[0], kept.logprobs[1] + 0.01])
    yield "log-probability off", replace(kept, logprobs=[math.nan, kept.logprobs[1]])
    yield "receipt of other adapters", replace(kept, fingerprint="base=0")
    yield "receipt of an unknown content", replace(kept, fingerprint="base=0;t0=beef")
    yield "stale or foreign content", replace(kept, fingerprint=f"base=0;t0={DIGEST_OF['v1']}")
    yield "header and fingerprint differ", replace(kept, receipt={"x-lorakit-adapter": "t0=beef"})
    yield "cut short", replace(kept, tokens=kept.tokens[:1], logprobs=kept.logprobs[:1])
    yield "ended before the end token", replace(kept, finish="stop")
    yield "no reason for the end", replace(kept, finish=None)
    yield "tokens and log-probabilities differ in number", replace(kept, logprobs=[])


def test_the_check_accepts_a_right_answer(
    model: LlamaForCausalLM, folders: dict[str, Path], answer: Kept
) -> None:
    checked = checked_alone(model, folders, answer)
    assert (checked.answers, checked.tokens, checked.greedy) == (1, 2, 2)
    assert not checked.wrong
    assert not checked.unreadable


def test_the_check_finds_what_is_wrong_with_an_answer(
    model: LlamaForCausalLM, folders: dict[str, Path], answer: Kept
) -> None:
    for reason, kept in changes(answer):
        assert checked_alone(model, folders, kept).reasons == {reason: 1}


def test_a_greedy_answer_takes_the_most_likely_token(
    model: LlamaForCausalLM, folders: dict[str, Path], answer: Kept
) -> None:
    reference = Reference(copy.deepcopy(model), folders)
    with reference.adapted((("v0", 1.0),)):
        scores = reference.logprobs([(answer.question.prompt, [])])[0][0]
    second = int(scores.topk(2).indices[1])
    kept = replace(
        answer,
        question=replace(answer.question, max_tokens=1),
        tokens=[TOKENIZER.decode([second])],
        logprobs=[float(scores[second])],
    )
    assert checked_alone(model, folders, kept).reasons == {"not the most likely token": 1}
    sampled = replace(kept, question=replace(kept.question, temperature=1.0))
    assert not checked_alone(model, folders, sampled).wrong


def test_the_reference_is_restored(model: LlamaForCausalLM, folders: dict[str, Path]) -> None:
    reference = Reference(copy.deepcopy(model), folders)
    before = copy.deepcopy(reference.model.state_dict())
    with reference.adapted((("v0", 0.5), ("v1", 2.0))):
        changed = [k for k, v in reference.model.state_dict().items() if not v.equal(before[k])]
    assert len(changed) == 4
    assert all(v.equal(before[k]) for k, v in reference.model.state_dict().items())


def test_contents_with_faults_are_written(tmp_path: Path, model: LlamaForCausalLM) -> None:
    versions = soak.write_contents(tmp_path, model.config, 0)
    assert len(versions) == soak.VERSIONS
    assert len({(f / "adapter_model.safetensors").read_bytes() for f in versions.values()}) == len(
        versions
    )
    nan = load_file(tmp_path / soak.NAN / "adapter_model.safetensors")
    assert all(tensor.isnan().all() for tensor in nan.values())
    with pytest.raises(Exception, match=r"incomplete|truncated|header|covered"):
        load_file(tmp_path / soak.TRUNCATED / "adapter_model.safetensors")


def test_the_memory_after_a_minute() -> None:
    samples = [(0.0, 5), (55.0, 7), (60.5, 8), (90.0, 9)]
    assert soak.memory_at(samples, 60) == 8
    assert soak.memory_at(samples, 100) is None


def test_a_soak_with_anything_wrong_fails() -> None:
    clean: dict[str, Any] = {"wrong": 0, "lost": 0, "unexpected": {}, "exit": 0}
    assert soak.is_clean(clean)
    for fault in ({"wrong": 1}, {"lost": 1}, {"unexpected": {"x": 1}}, {"exit": None}):
        assert not soak.is_clean({**clean, **fault})


def test_the_faults_replace_what_the_engine_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("salt_of", "choice_of"):
        monkeypatch.setattr(continuous, name, getattr(continuous, name))  # restored afterwards
    called = set(continuous.ContinuousEngine._prepare.__code__.co_names)
    called |= set(continuous.ContinuousEngine._forward.__code__.co_names)
    called |= {
        name
        for constant in continuous.ContinuousEngine._forward.__code__.co_consts
        for name in getattr(constant, "co_names", ())  # a comprehension, before Python 3.12
    }
    assert {"salt_of", "choice_of"} <= called
    faults.prefix()
    assert continuous.salt_of(None) == ""  # type: ignore[arg-type]
    faults.base()
    assert continuous.choice_of((("a", 1.0),)) is None
