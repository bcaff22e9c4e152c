"""A background run pauses while others need the machine, and ends as it would alone."""

import getpass
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager

import pytest

from lorakit.cli import background, paper
from lorakit.storage import is_quiet_asked, quiet

COUNTS = """
import os, pathlib, sys, time
for _ in range(int(sys.argv[1])):
    with open("steps", "a") as file:
        file.write("x")
    time.sleep(0.02)
assert os.nice(0) == 19
session = pathlib.Path("/proc/self/autogroup")
assert not session.exists() or session.read_text().endswith("nice 19\\n")
"""
SAVES_ON_A_SIGNAL = """
import signal, sys, time
def save(*_):
    open("saved", "w").close()
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
open("steps", "w").write("x")
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    """Do not hear the request of this test session."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(background, "POLL", 0.02)
    monkeypatch.chdir(tmp_path)


def steps(folder):
    path = folder / "steps"
    return path.stat().st_size if path.exists() else 0


def stands_still(folder):
    before = steps(folder)
    time.sleep(0.3)
    return steps(folder) == before


def wait_for(condition):
    deadline = time.monotonic() + 60  # the lowest priority beside a busy test suite
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_quiet_is_asked_as_long_as_any_process_asks():
    assert not is_quiet_asked()
    with quiet(), quiet():
        assert is_quiet_asked()
    assert not is_quiet_asked()


def test_a_killed_process_stops_asking():
    code = f"""
import tempfile, time
tempfile.tempdir = {tempfile.gettempdir()!r}
from lorakit.storage import quiet
with quiet():
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert is_quiet_asked()
        process.kill()
    assert not is_quiet_asked()


@pytest.mark.slow
def test_it_pauses_while_quiet_is_asked(tmp_path):
    ends = []
    command = [sys.executable, "-IS", "-c", COUNTS, "100"]
    thread = threading.Thread(target=lambda: ends.append(background.run_in_background(command)))
    # Only the main thread may set handlers of signals.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)
        thread.start()
        wait_for(lambda: steps(tmp_path) > 5)
        with quiet():
            wait_for(lambda: stands_still(tmp_path))
            assert steps(tmp_path) < 100
        thread.join(60)
    assert ends == [0]
    assert steps(tmp_path) == 100


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "an error"])
def test_it_goes_on_when_the_process_that_paused_it_ends(tmp_path, end):
    """It would hold the locks of its run, stopped for ever."""
    code = f"""
import os, sys, tempfile
from lorakit.cli import background
tempfile.tempdir, background.POLL = {str(tmp_path)!r}, 0.02
is_quiet_asked = background.is_quiet_asked
background.is_quiet_asked = lambda: os.path.exists("error") and 1 / 0 or is_quiet_asked()
background.run_in_background([sys.executable, "-IS", "-c", {COUNTS!r}, "50"])
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        wait_for(lambda: steps(tmp_path) > 5)
        with quiet():
            wait_for(lambda: stands_still(tmp_path))
            assert steps(tmp_path) < 50
            if end == "killed":
                parent.kill()
            else:
                (tmp_path / "error").touch()
            wait_for(lambda: steps(tmp_path) == 50)


@contextmanager
def at_hangup(handler):
    """Handle SIGHUP like a shell that the tests were started from, with or without nohup."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_it_also_while_it_is_paused(tmp_path, paused, signum):
    """Also the one of a closed terminal, which would leave it behind, stopped for ever."""

    def terminate():
        wait_for(lambda: steps(tmp_path))
        if not paused:
            os.kill(os.getpid(), signum)
            return
        with quiet():
            time.sleep(0.3)
            os.kill(os.getpid(), signum)
            wait_for((tmp_path / "saved").exists)

    with at_hangup(signal.SIG_DFL):
        thread = threading.Thread(target=terminate)
        thread.start()
        assert background.run_in_background([sys.executable, "-IS", "-c", SAVES_ON_A_SIGNAL]) == 7
        thread.join()
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_nohup_keeps_it_running(tmp_path):
    with at_hangup(signal.SIG_IGN):
        thread = threading.Thread(
            target=lambda: (wait_for(lambda: steps(tmp_path)), os.kill(os.getpid(), signal.SIGHUP))
        )
        thread.start()
        command = [sys.executable, "-IS", "-c", COUNTS, "20"]
        assert background.run_in_background(command) == 0
        thread.join()
    assert steps(tmp_path) == 20


def test_the_process_does_not_start_another_one(capsys):
    check = f"import os; assert os.environ[{background.IN_BACKGROUND!r}]"
    assert background.run_in_background([sys.executable, "-c", check]) == 0


def test_a_table_in_the_background_runs_in_one_process(monkeypatch, capfd):
    started = []
    monkeypatch.setattr(paper, "run_in_background", lambda command: started.append(command) or 3)
    arguments = ["table1", "--dry_run", "--background", "true"]
    with pytest.raises(SystemExit, match="3"):
        paper.run(arguments)
    assert started == [[sys.executable, "-m", "lorakit", "paper", *arguments]]
    monkeypatch.setenv(background.IN_BACKGROUND, "1")
    paper.run(arguments)
    assert (len(started), "passes per method" in capfd.readouterr().out) == (1, True)


def test_a_process_that_has_ended_cannot_be_paused(monkeypatch):
    """Until its exit status is read, macOS refuses to signal it."""
    refused = []

    def killpg(*arguments):
        refused.append(arguments)
        raise PermissionError

    monkeypatch.setattr(os, "killpg", killpg)
    monkeypatch.setattr(background, "is_quiet_asked", lambda: True)
    command = [sys.executable, "-ISc", "import time; time.sleep(0.1)"]
    assert background.run_in_background(command) == 0
    assert refused


@pytest.mark.parametrize("error", [KeyError, OSError])  # up to Python 3.12, and later
def test_a_user_may_have_no_name(monkeypatch, error):
    """As in a container that runs under any user id."""

    def nameless():
        raise error("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert not is_quiet_asked()
