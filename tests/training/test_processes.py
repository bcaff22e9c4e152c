"""One run on several processes reaches the result of one process, and writes one folder.

`several_processes.py` runs the scenarios; the tests read what these have written.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scenarios
import tiny_runs
from scenarios import (
    made_once,
    outcomes,
    require_close_weights,
    require_equality,
    require_success,
)
from several_processes import COUNTS, steps_of, ways_on
from torch.distributed import HashStore

from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import target_counter
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.tasks import LanguageExample
from lorakit.training import distributed, loop
from lorakit.training.config import HeldOutConfig
from lorakit.training.distributed import Processes, started_processes
from lorakit.training.schedule import Share, even_shares
from lorakit.training.setup import prepare


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once("several_processes.py", tmp_path_factory)


@pytest.mark.parametrize("worker", ["gw0", None])
def test_every_session_runs_the_scenarios_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str | None
) -> None:
    (tmp_path / "clock.py").write_text("import time; print(time.time_ns())")
    monkeypatch.setattr(scenarios, "__file__", str(tmp_path / "scenarios.py"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)

    def printed(session: str, *names: str) -> list[str]:
        folders = [tmp_path / session / name if worker else tmp_path / session for name in names]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        factories: Any = [SimpleNamespace(getbasetemp=lambda f=folder: f) for folder in folders]
        return [(made_once("clock.py", f) / "printed.txt").read_text() for f in factories]

    (first, again), (other,) = printed("pytest-0", "gw0", "gw1"), printed("pytest-1", "gw0")
    assert first == again != other


# --- the same result ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "count"), [(way, count) for count in COUNTS[1:] for way in ways_on(count)]
)
def test_gradients_and_weights_equal_those_of_one_process(root: Path, way: str, count: int) -> None:
    """In float64: the gradients of one step, and the weights after `steps_of` steps."""
    require_equality(root, way, count, steps_of(way))


@pytest.mark.slow
def test_a_gradient_that_no_process_has_stays_none(root: Path) -> None:
    """All processes get the sums in each dtype; the numbers are exact beyond float32."""
    expected = {
        "numbers": [1.5, 3 * 2**40 + 3],
        "gradients": [[3.0, 3.0], [3.0, 5.0], None],
    }
    processes = outcomes(root, "sums")
    require_success(processes)
    assert [json.loads(process["output"]) for process in processes] == [expected] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "labels"])
def test_a_whole_run_has_the_numbers_of_one_process(root: Path, kind: str) -> None:
    """In float32, whose rounding some steps of AdamW amplify: to 1e-5 of the numbers."""
    for processes in outcomes(root, "whole").values():
        require_success(processes)
    alone, several = root / f"{kind}-1", root / f"{kind}-4"
    for split in ("train", "validation"):
        expected = tiny_runs.metrics(alone, split)
        found = tiny_runs.metrics(several, split)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        for record, other in zip(found, expected, strict=True):
            assert record.keys() == other.keys()
            for name in other.keys() - {"split", "seconds", "computed_tokens"}:
                assert record[name] == pytest.approx(other[name], rel=1e-5), name
    if kind == "whole":
        assert (several / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    for which in ("adapter", "best"):
        require_close_weights(several / which, alone / which)


@pytest.mark.slow
def test_only_the_first_process_prints_and_writes(root: Path) -> None:
    first, *others = outcomes(root, "whole")["4"]
    assert "in 4 processes" in first["output"]
    assert first["output"].count("step 10/10  validation:") == 1
    assert [other["output"] for other in others] == ["", "", ""]
    files = {p.relative_to(root / "whole-4") for p in (root / "whole-4").rglob("*")}
    assert files == {p.relative_to(root / "whole-1") for p in (root / "whole-1").rglob("*")}
    session = json.loads((root / "whole-4" / "environment.json").read_text())["sessions"][0]
    assert session["processes"] == 4


# --- signals and resuming -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(root: Path) -> None:
    outcome = outcomes(root, "interrupted")
    assert [process["status"] for process in outcome["stopped"]] == [75] * 4
    # The signal arrived after the gradients of step 4 were summed.
    assert (
        "Stopped at step 5. Resume with resume=True in Python, or with:\ntorchrun --nproc-per-node 4 -m lorakit train"
        in outcome["stopped"][0]["output"]
    )
    assert outcome["checkpoints"] == ["step-000005"]
    assert [process["output"] for process in outcome["stopped"][1:]] == ["", "", ""]
    # One that arrives before that, here Ctrl-C, stops all after the step itself.
    assert [process["status"] for process in outcome["step"]["stopped"]] == [130] * 2
    assert outcome["step"]["checkpoints"] == ["step-000004"]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_an_evaluation_in_all(root: Path) -> None:
    outcome = outcomes(root, "interrupted")["evaluation"]
    assert [process["status"] for process in outcome["stopped"]] == [75] * 2
    assert outcome["checkpoints"] == ["step-000005"]
    assert outcome["validated"] == [0]
    require_success(outcome["resumed"])
    run, whole = root / "interrupted-evaluation", root / "whole-1"
    for split in ("train", "validation"):
        steps = [[r["step"] for r in tiny_runs.metrics(folder, split)] for folder in (run, whole)]
        assert steps[0] == steps[1]
    for which in ("adapter", "best"):
        require_close_weights(run / which, whole / which)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(root: Path) -> None:
    require_success(outcomes(root, "interrupted")["resumed"])
    sessions = json.loads((root / "interrupted" / "environment.json").read_text())["sessions"]
    assert [(s["processes"], s["from_step"]) for s in sessions] == [(4, 0), (2, 5)]
    assert [r["step"] for r in tiny_runs.metrics(root / "interrupted", "train")] == [*range(1, 11)]
    for which in ("adapter", "best"):
        require_close_weights(root / "interrupted" / which, root / "whole-1" / which)


# --- recovery -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_out_of_memory_halves_its_batches_alone(root: Path) -> None:
    processes = outcomes(root, "recovery")["2"]
    require_success(processes)
    first, second = (process["output"] for process in processes)
    assert "out of memory" not in first
    assert second.startswith("Process 1 of 2 is out of memory during ")
    events = json.loads((root / "recovery-2" / "events.json").read_text())["events"]
    halved = [event for event in events if event["event"] == "out of memory"]
    assert {event["process"] for event in halved} == {1}
    assert {event["setting"] for event in halved} == {"batch_size", "evaluation.batch_size"}


@pytest.mark.slow
def test_all_processes_go_back_to_a_checkpoint(root: Path) -> None:
    """One process has a NaN at step 6. With and without memory, the result is that of one process."""
    require_success(outcomes(root, "recovery")["1"])
    first, second = (process["output"] for process in outcomes(root, "recovery")["2"])
    assert "diverged at step 6: the loss is nan" in first
    assert "Back to step 4, with half the learning rate: 0.005 at its peak." in first
    assert "Back to" not in second
    for name in ("recovery-1", "recovery-2"):
        rates = [r["learning_rate"] for r in tiny_runs.metrics(root / name, "train")][:10]
        assert rates[4:] == [0.005] * 6
        assert rates[3] == 0.01
    found, expected = (
        tiny_runs.metrics(root / name, "train")[:10] for name in ("recovery-2", "recovery-1")
    )
    assert [r["step"] for r in found] == [*range(1, 11)]
    for record, other in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_another_number_of_processes_takes_the_smallest_batches(root: Path) -> None:
    (process,) = outcomes(root, "recovery")["resumed"]
    require_success([process])
    events = json.loads((root / "recovery-2" / "events.json").read_text())["events"]
    smallest = min(event["after"] for event in events if event.get("setting") == "batch_size")
    assert f"memory    {smallest} example" in process["output"]
    rates = [r["learning_rate"] for r in tiny_runs.metrics(root / "recovery-2", "train")]
    assert rates[10] == 0.005


@pytest.mark.slow
def test_an_example_that_fits_into_no_process_ends_all(root: Path) -> None:
    alive, dead = outcomes(root, "recovery")["too large"]
    assert "with one example at a time; the longest has 45 tokens." in dead["output"]
    assert "Process 1 of 2 failed in step" in alive["output"]
    assert dead["status"] == alive["status"] == 1
    assert "Traceback" not in alive["output"] + dead["output"]


# --- mistakes -------------------------------------------------------------------------------------


MISTAKES = {
    "other settings": "ConfigurationError: Process 1 of 2 differs from process 0: batch_size is 5 instead of 4. Give",
    "other software": "ConfigurationError: Process 1 of 2 differs from process 0: torch is '2.1' instead of '2.0'. ",
    "not shared": "Process 1 of 2 differs from process 0: newest checkpoint is None instead of '/",
    "one GPU": "ConfigurationError: Process 1 of 2 computes on a GPU, and process 0 on the CPU.",
    "no device": "this GPU is in use",
    "other data": "ConfigurationError: Process 1 of 2 differs from process 0: train data is '",
    "exploding": "DivergenceError: Training diverged at step",
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_all_processes_end_with_the_same_error(root: Path, mistake: str) -> None:
    for process in outcomes(root, "mistakes")[mistake]:
        assert process["status"] == 1
        assert MISTAKES[mistake] in process["output"]
        assert "Traceback" not in process["output"]


@pytest.mark.slow
def test_an_error_of_one_process_names_it_in_the_others(root: Path) -> None:
    mistakes = outcomes(root, "mistakes")
    other, own = (process["output"] for process in mistakes["no device"])
    assert own.startswith("ConfigurationError: this GPU")
    assert other.startswith("ConfigurationError: Process 1 of 2 failed: this GPU")
    other, own = (process["output"] for process in mistakes["bad data"])
    assert own.startswith("DataError: ")
    assert other.startswith("LorakitError: Process 1 of 2 failed: ")
    own, other = (process["output"] for process in mistakes["existing"])
    assert own.startswith("RunFolderError: ")
    assert "contains an unfinished run" in own
    assert other == own.replace("RunFolderError: ", "LorakitError: Process 0 of 2 failed: ")
    assert "mistake" not in mistakes["folders"]


@pytest.mark.parametrize("step", ["step-000100", "step-000900"])
def test_a_process_that_does_not_see_the_run_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The error comes before the data and the base are read."""
    first = {"newest checkpoint": f"{tmp_path}/step-000500"}
    monkeypatch.setattr(Processes, "gather", lambda _, own: [first, own])
    (tmp_path / step).mkdir()
    run: Any = SimpleNamespace(checkpoints=tmp_path, config=SimpleNamespace(overwrite=False))
    message = f"Process 1 of 2 differs .*: newest checkpoint is '.*{step}' instead of '.*000500'"
    with pytest.raises(ConfigurationError, match=message):
        loop._start(run, Processes(rank=1, count=2))


def test_the_process_with_the_store_waits_until_the_others_have_read_it() -> None:
    store = HashStore()
    store.set("backend/1", "nccl")
    with ThreadPoolExecutor(1) as pool:
        agreed = pool.submit(
            distributed._agreed_backend, store, Processes(count=2), "cpu", timedelta(seconds=9)
        )
        time.sleep(0.2)
        assert agreed.running()
        store.set("read/1", "")
        with pytest.raises(ConfigurationError, match="Process 1 of 2 computes on a GPU"):
            agreed.result()


# --- without processes ----------------------------------------------------------------------------


def language(prompt: str, length: int, completion: int) -> LanguageExample:
    return LanguageExample(
        input_ids=[1] * (length + completion),
        prompt=prompt,
        completion="",
        loss_mask=[False] * length + [True] * completion,
        prompt_length=length,
    )


def test_shares_have_the_same_tokens_and_numbers_of_examples() -> None:
    lengths = [80, 20, 10, 50, 40, 20, 30, 50]
    shares = even_shares([[i] for i in range(8)], lengths, 2)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert [sum(lengths[i] for i in share) for share in shares] == [150, 150]
    assert [len(share) for share in shares] == [4, 4]
    assert even_shares([[0], [1]], [5, 5], 4) == [[0], [1], [], []]


def test_one_process_computes_the_batches_of_the_step() -> None:
    examples = [language(str(i % 3), 4, 1 + i % 5) for i in range(11)]
    batches = [[7, 3, 9, 1], [0, 2, 10, 4], [5, 6]]
    step = [i for batch in batches for i in batch]
    for packed in (False, True):
        assert Share(examples, batch_size=BatchSize(4), packed=packed)(step) == batches


def test_packed_examples_with_one_prompt_stay_together() -> None:
    examples = [language(str(i % 2), 20, 5) for i in range(8)]
    step = list(range(8))
    shares = [
        Share(examples, batch_size=BatchSize(8), rank=r, count=2, packed=True)(step) for r in (0, 1)
    ]
    assert shares == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    same = [language("all", 20, 5) for _ in range(8)]
    shares = [
        Share(same, batch_size=BatchSize(8), rank=r, count=2, packed=True)(step) for r in (0, 1)
    ]
    assert [len(batch) for share in shares for batch in share] == [4, 4]


@pytest.mark.parametrize("arch", ["llama", "t5", "bart", "bert"])
@pytest.mark.parametrize("packing", [True, False])
def test_targets_of_examples_are_those_of_their_batch(
    tmp_path: Path, arch: str, packing: bool
) -> None:
    head = "base" if arch == "bert" else None
    base = tiny_runs.save_base(tmp_path / "base", arch, head)
    settings: dict[str, Any] = {"packing": packing}
    if arch == "bert":
        file = tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(8))
        settings |= {"data": DataConfig(train=file), "evaluation": HeldOutConfig()}
    job = prepare(tiny_runs.config(tmp_path, base, **settings))
    if arch == "bart":
        job.model.generation_config.forced_bos_token_id = 5
    count = target_counter(job.base)
    examples = job.train[:8]
    assert sum(map(count, examples)) == job.objective.count(job.collate(examples)) > 0


def test_without_torchrun_a_run_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert started_processes() == Processes(rank=0, count=1)
    assert started_processes().here == 1
    with distributed.joined("cpu") as processes:
        assert processes.is_first
        assert processes.gather("value") == ["value"]
        assert processes.on_first(lambda: 3) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"),
        (
            {name: "2" for name in ("WORLD_SIZE", *distributed.VARIABLES)},
            "RANK is '2'; torchrun sets it to a whole number below 2",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; torchrun sets it to a whole number"),
    ],
)
def test_an_invalid_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", *distributed.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        started_processes()


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_devices_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The error comes before the processes wait for each other."""
    monkeypatch.setattr(distributed, "started_processes", lambda: Processes(rank=0, count=3))
    message = f"base.device is '{device}', but 3 processes need one device each"
    with pytest.raises(ConfigurationError, match=message), distributed.joined(device):
        pass


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(device_count=lambda: 2, is_available=lambda: True)
    monkeypatch.setattr(distributed.torch, "cuda", cuda)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "this machine has 2 GPUs for more processes.*--nproc-per-node 2"
    with pytest.raises(ConfigurationError, match=message):
        distributed._backend("cuda")
