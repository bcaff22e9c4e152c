"""A process of a run that fails, ends, hangs or is killed ends the whole run, with an error that names it.

`failing_processes.py` runs the scenarios; the tests read what these have written.
"""

from __future__ import annotations

import datetime
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_runs
from scenarios import made_once, outcomes
from torch.distributed import HashStore

from lorakit.errors import ConfigurationError
from lorakit.training.process_failures import Peers

FAILING = 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once("failing_processes.py", tmp_path_factory)


def require_error(processes: list[dict[str, Any]], message: str, failing: int = FAILING) -> None:
    """Require that all processes but one end with an error that contains `message`, and no traceback."""
    for rank in set(range(len(processes))) - {failing}:
        assert processes[rank]["status"] == 1
        assert message in processes[rank]["output"]
        assert "Traceback" not in processes[rank]["output"]


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["computing", "waiting"])
def test_the_others_name_a_killed_process(root: Path, moment: str) -> None:
    processes = outcomes(root, "killed")[moment]
    assert processes[FAILING]["status"] == -signal.SIGKILL
    require_error(processes, "LorakitError: Process 1 of 3 ended in step 3 (")


@pytest.mark.slow
def test_the_others_name_the_process_that_held_their_store(root: Path) -> None:
    processes = outcomes(root, "killed")["first"]
    assert processes[0]["status"] == -signal.SIGKILL
    message = "LorakitError: Process 0 of 3 has ended or does not answer in step 3."
    require_error(processes, message, failing=0)


@pytest.mark.slow
def test_the_others_repeat_the_error_of_a_process(root: Path) -> None:
    processes = outcomes(root, "raised")["memory"]
    assert processes[FAILING]["status"] == 1
    require_error(processes, "Process 1 of 3 failed in step 3: Out of memory during step 3")
    processes = outcomes(root, "raised")["bug"]
    assert "ValueError: a bug\nin two lines" in processes[FAILING]["output"]
    require_error(processes, "LorakitError: Process 1 of 3 failed in step 3: ValueError: a bug\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleeping", "stopped"])
def test_the_others_name_a_process_that_hangs(root: Path, kind: str) -> None:
    """All end, with an error: also a process that goes on too late."""
    processes = outcomes(root, "hung")[kind]
    assert processes[FAILING]["status"] == (1 if kind == "sleeping" else -signal.SIGKILL)
    message = (
        "Process 1 of 3 did not reach the end of step 3 within 0.05 minutes (processes_timeout)."
    )
    require_error(processes, message)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "raised-bug", "hung-sleeping"])
def test_a_run_that_failed_has_no_half_written_files(root: Path, name: str) -> None:
    folder = root / name
    assert not (folder / "result.json").exists()
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]


def test_the_process_with_the_store_does_not_wait_for_an_ended_one(monkeypatch) -> None:
    """It waits for those that have not read yet why the run ends."""
    store, timeout = HashStore(), datetime.timedelta(seconds=9)
    named = "Process 1 of 3 ended in the start of the run"
    with socket.create_server(("127.0.0.1", 0)) as master, ThreadPoolExecutor(3) as pool:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(master.getsockname()[1]))
        first, ended, third = pool.map(lambda rank: Peers(store, rank, 3, timeout), range(3))
        ended.close()
        assert named in str(first.error(RuntimeError("reset")))
        began = time.monotonic()
        closing = pool.submit(first.close)
        time.sleep(0.2)
        assert closing.running()
        assert named in str(third.error(RuntimeError("reset")))
        closing.result()
        assert time.monotonic() - began < 1.5
        third.close()


def test_a_process_that_resolves_its_name_to_ipv6_accepts_ipv4(monkeypatch) -> None:
    try:
        master = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    monkeypatch.setenv("MASTER_PORT", str(master.getsockname()[1]))
    store = HashStore()
    with master:
        peers = Peers(store, 0, 1, datetime.timedelta(seconds=9))
    port = peers._listener.getsockname()[1]
    socket.create_connection(("127.0.0.1", port), timeout=9).close()
    peers.close()


# --- kills and restarts ---------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_whose_processes_are_killed_resume_to_the_same_bytes(root: Path) -> None:
    """One process, without and with a restart by torchrun, and torchrun itself."""
    assert "all 3 runs resumed to the same bytes" in (root / "printed.txt").read_text()


@pytest.mark.slow
def test_torchrun_restarts_a_run_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = Path(sys.executable).with_name("torchrun")
    options = f"--nproc-per-node 2 --max-restarts 3 --master-port {port}"
    command = f"-m lorakit train --config {root}/undisturbed/config.yaml --output {run} --resume"
    with subprocess.Popen(
        [torchrun, *options.split(), *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (run / "checkpoints" / "step-000010").exists() and process.poll() is None:
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children()
        workers[0].kill()
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("40 steps in ") == 1
    assert "in 2 processes" in errors
    assert (run / "report.html").exists()
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[1]["from_step"] >= 10
    for which in ("adapter", "best"):
        assert tiny_runs.adapter_bytes(run, which) == tiny_runs.adapter_bytes(
            root / "undisturbed", which
        )


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [0, -1, 10**6])
def test_processes_timeout_is_a_time(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ConfigurationError, match=r"processes_timeout is .*; it must be above 0"):
        tiny_runs.config(tmp_path, "base", processes_timeout=minutes)
