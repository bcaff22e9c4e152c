"""The load generator and the workload of the serving benchmark, with a system of scripted answers."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from benchmarks import serving_load
from benchmarks.serving_load import (
    Answer,
    Batches,
    Request,
    Trial,
    closed_loop,
    figures,
    open_loop,
    percentiles,
)
from benchmarks.serving_workload import poisson, requests, write_adapters, zipf
from benchmarks.systems.serving.gguf_adapters import convert, permuted

ANSWERED = 0.02
"""Seconds between a request and its only end."""


class Fake:
    """Answers each request in a thread of its own, or fails, or never ends, by the name of the adapter.

    Args:
        at_once: Answer before `submit` returns.
    """

    name = "fake"

    def __init__(self, *, at_once: bool = False) -> None:
        self.most = 0
        self._at_once = at_once
        self._running = 0
        self._lock = threading.Lock()

    def prepare(self, adapters: object) -> None: ...
    def drain(self) -> None: ...
    def stop(self) -> None: ...

    def submit(self, request: Request, answer: Answer) -> None:
        if request.adapter == "refused":
            raise ValueError
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        if self._at_once:
            self._answer(request, answer)
        else:
            threading.Timer(ANSWERED, self._answer, (request, answer)).start()

    def _answer(self, request: Request, answer: Answer) -> None:
        with self._lock:
            self._running -= 1
        for _ in range(request.tokens - (request.adapter == "short")):
            answer.token()
        if request.adapter != "endless":
            answer.end("Broken" if request.adapter == "broken" else None)


class Clock:
    """Time that passes only while somebody sleeps, so that a busy machine changes no test."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(serving_load, "time", clock)
    return clock


def of(*adapters: str | None) -> list[Request]:
    return [Request((1, 2), adapter, 3) for adapter in adapters]


def test_open_load_sends_each_request_when_it_is_due(clock: Clock) -> None:
    class Last(Fake):
        """Answers everything once the last request has come: the load must not wait for answers."""

        def __init__(self) -> None:
            super().__init__()
            self.sent: list[float] = []
            self.answers: list[Answer] = []

        def submit(self, request: Request, answer: Answer) -> None:
            self.sent.append(clock.now)
            self.answers.append(answer)
            if len(self.answers) == 5:
                for each in self.answers:
                    each.token()
                    each.end()

    system = Last()
    times = [0.0, 0.01, 0.05, 0.05, 0.12]
    trial = open_loop(system, of(*[None] * 5), times, patience=5)
    assert system.sent == pytest.approx([100 + t for t in times])
    found = figures(trial)
    assert (found["late"], found["lost"]) == (pytest.approx(0), 0)
    assert found["first_token"]["p99"] == pytest.approx(0.12, rel=0.01)


def test_time_to_the_first_token_counts_from_when_a_request_was_due(clock: Clock) -> None:
    class Blocking(Fake):
        def submit(self, request: Request, answer: Answer) -> None:
            clock.sleep(0.1)
            answer.token()
            answer.end()

    trial = open_loop(Blocking(), of(None, None), [0.0, 0.0], patience=5)
    found = figures(trial)
    assert [a.times[0] - trial.began for a in trial.answers] == pytest.approx([0.1, 0.2])
    assert found["first_token"]["p50"] == pytest.approx(0.15)
    assert found["late"] == pytest.approx(0.1)


def test_a_closed_load_keeps_a_number_of_requests_in_flight() -> None:
    fake = Fake()
    found = figures(closed_loop(fake, of(*[None] * 12), 3, patience=60))
    assert fake.most == 3
    assert (found["requests"], found["tokens"], found["lost"]) == (12, 36, 0)
    assert found["seconds"] >= 4 * ANSWERED


def test_errors_lost_and_short_answers_are_counted() -> None:
    trial = open_loop(
        Fake(at_once=True),
        of("a", "broken", "refused", "endless", "short", "broken"),
        [0.0] * 6,
        patience=0.3,
    )
    found = figures(trial)
    assert found["errors"] == {"Broken": 2, "ValueError": 1}
    assert (found["lost"], found["short"]) == (1, 1)
    assert found["requests_per_second"] == pytest.approx(2 / found["seconds"])
    assert trial.finished - trial.began >= 0.3


def test_a_closed_load_gives_up_on_a_system_that_hangs() -> None:
    found = figures(closed_loop(Fake(at_once=True), of("endless", "endless", "a"), 2, patience=0.2))
    assert (found["requests"], found["lost"]) == (2, 2)


def test_figures_of_known_times() -> None:
    def answer(due: float, times: list[float], tokens: int = 3) -> Answer:
        given = Answer(Request((1,), "a", tokens), due, sent=due)
        given.times, given.ended = times, times[-1]
        return given

    lost = Answer(Request((1,), "b", 3), 1.0, sent=1.0)
    trial = Trial([answer(0, [1, 2, 4]), answer(1, [4, 5, 6]), lost], 0.0, 10.0)
    found = figures(trial)
    assert found["tokens_per_second"] == 0.6
    assert found["requests_per_second"] == 0.2
    assert found["first_token"]["p50"] == 3  # of 1, 3, and 9 for the lost one
    assert found["first_token"]["p99"] == pytest.approx(np.percentile([1, 3, 9], 99))
    assert found["between_tokens"]["p50"] == 1
    assert found["whole_answer"]["p50"] == 4.5


def test_percentiles() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([]) == {}


def test_batches_are_computed_in_order_and_failures_reported() -> None:
    class Pairs(Batches):
        sizes: list[int] = []  # noqa: RUF012

        def take(self, waiting):
            batch, waiting[:] = waiting[:2], waiting[2:]
            return batch

        def compute(self, batch) -> None:
            self.sizes.append(len(batch))
            for request, answer in batch:
                if request.adapter == "raises":
                    raise MemoryError
                if request.adapter != "forgotten":
                    answer.end()

    system = Pairs()
    trial = closed_loop(system, of("a", "b", "forgotten", "raises"), 4, patience=60)  # type: ignore[arg-type]
    system.stop()
    errors = [answer.error for answer in trial.answers]
    assert errors[:2] == [None, None]
    assert set(errors[2:]) <= {"NoAnswer", "MemoryError"}
    assert "MemoryError" in errors
    assert max(Pairs.sizes) == 2


def test_draining_batches_forgets_the_waiting_ones() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(Batches):
        def take(self, waiting):
            return [waiting.pop(0)]

        def compute(self, batch) -> None:
            started.set()
            go_on.wait(60)
            batch[0][1].end()

    system = Slow()
    answers = [Answer(request, 0) for request in of(None, None, None)]
    for answer in answers:
        system.submit(answer.request, answer)
    assert started.wait(60)
    threading.Timer(0.05, go_on.set).start()
    system.drain()
    assert [answer.error for answer in answers] == [None, "Cancelled", "Cancelled"]
    system.stop()


def test_waiting_for_rest_ends() -> None:
    with pytest.raises(TimeoutError, match="did not come to rest within 0 s"):
        serving_load.wait_until(lambda: False, seconds=0.02)


# --- the workload ------------------------------------------------------------------------------------


def test_zipf() -> None:
    assert zipf(3).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    names = [f"a{i}" for i in range(64)]
    jobs = requests([(1,)] * 20000, names)
    share = [sum(job.adapter == name for job in jobs) / 20000 for name in names[:4]]
    assert share == pytest.approx(zipf(64)[:4].tolist(), abs=0.01)


def test_requests_differ_in_their_adapters_only() -> None:
    prompts = [(i,) for i in range(50)]
    base, mixed = requests(prompts, ()), requests(prompts, ["a", "b"])
    assert {job.adapter for job in base} == {None}
    assert {job.adapter for job in mixed} == {"a", "b"}
    assert [(j.prompt, j.tokens) for j in base] == [(j.prompt, j.tokens) for j in mixed]
    assert len({job.tokens for job in base}) > 10


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(poisson(5.0, 20000))
    gaps = np.diff(times)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.03)  # that of an exponential distribution


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_random_adapters_load_in_peft_and_differ(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    write_adapters(tmp_path, ["a", "b"], model.config, rank=2, scale=0.5)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "a"), adapter_name="a").eval()
        first = adapted(input_ids=ids).logits
        adapted.load_adapter(str(tmp_path / "b"), "b")
        adapted.set_adapter("b")
        second = adapted(input_ids=ids).logits
    assert (first - base).abs().max() > 0.01
    assert (first - second).abs().max() > 0.01


# --- adapters for llama.cpp --------------------------------------------------------------------------


def test_permuted_rows_make_neighbours_of_the_pairs_that_transformers_rotates() -> None:
    # A head of 6 features: transformers rotates (0, 3), (1, 4), (2, 5), llama.cpp neighbours.
    rows = np.arange(12)[:, None]
    assert permuted(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_converted_adapter_has_all_tensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = tiny_models.build("llama").config
    write_adapters(tmp_path, ["a"], config, rank=2, targets=("q_proj", "k_proj", "v_proj"))
    file = convert(tmp_path / "a", tmp_path / "gguf" / "a.gguf", config)
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 4.0)
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert len(shapes) == 2 * 3 * config.num_hidden_layers
    assert shapes["blk.1.attn_q.weight.lora_a"] == (2, 32)
    assert shapes["blk.1.attn_k.weight.lora_b"] == (16, 2)


def test_an_adapter_on_other_layers_is_not_converted_in_part(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = tiny_models.build("llama").config
    write_adapters(tmp_path, ["a"], config, rank=2)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {k.replace("self_attn.q_proj", "mlp.up_proj"): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"mlp\.up_proj.* is not on q, k or v"):
        convert(tmp_path / "a", tmp_path / "a.gguf", config)


def test_the_npm_package_is_pinned() -> None:
    manifest = Path(serving_load.__file__).parent / "systems" / "serving" / "package.json"
    version = json.loads(manifest.read_text(encoding="utf-8"))["dependencies"]["node-llama-cpp"]
    assert version.replace(".", "").isdigit()
