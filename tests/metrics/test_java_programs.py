"""Java that is missing, fails, hangs or prints invalid output."""

from __future__ import annotations

import sys

import psutil
import pytest

from lorakit.errors import ConfigurationError, LorakitError
from lorakit.metrics.java import find_java, jar, run_java
from lorakit.metrics.meteor import meteor
from lorakit.metrics.penn_treebank import ptb_tokens


@pytest.mark.slow
def test_a_program_that_hangs_is_stopped(fake_java, tmp_path) -> None:
    fake_java(f"echo $$ > {tmp_path / 'pid'}; exec sleep 60")
    with pytest.raises(LorakitError, match=r"was stopped after 2 seconds.*java=False"):
        run_java(_java_path(), timeout=2)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_the_error_of_a_failed_program_is_shown(fake_java) -> None:
    fake_java("echo 'Could not reserve enough space' >&2; exit 1")
    with pytest.raises(LorakitError, match="status 1: Could not reserve enough space"):
        ptb_tokens(["a"], _java_path())


def test_a_wrong_number_of_lines_is_rejected(fake_java) -> None:
    fake_java("cat > /dev/null; printf 'a\\nb\\n'")
    with pytest.raises(LorakitError, match="read 3 texts and wrote 2"):
        ptb_tokens(["a", "b", "c"], _java_path())


def test_the_line_ends_of_windows_are_no_tokens(fake_java) -> None:
    fake_java("cat > /dev/null; printf 'a .\\r\\nb\\r\\n'")
    assert ptb_tokens(["A.", "B"], _java_path()) == ["a", "b"]


def test_meteor_without_a_score_is_rejected(fake_java) -> None:
    fake_java("echo 'nothing of the kind'")
    with pytest.raises(LorakitError, match=r"printed 'nothing of the kind.*expected a final score"):
        meteor(["a"], [["a"]], _java_path())


def test_what_cannot_be_started(tmp_path) -> None:
    with pytest.raises(LorakitError, match="cannot be started"):
        run_java(str(tmp_path / "java"), timeout=1)


def test_java_is_not_searched_when_disabled(fake_java) -> None:
    fake_java("exit 1")
    assert find_java(False) is None
    assert find_java(None) == find_java(True) == _java_path()


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ConfigurationError, match=r'pip install "lorakit\[metrics\]"'):
        jar("meteor", "meteor-1.5.jar")


def _java_path() -> str:
    path = find_java(True)
    assert path is not None
    return path
