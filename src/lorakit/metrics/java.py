"""Run the Java programs of the official scorers: METEOR 1.5 and the Stanford PTB tokenizer.

pycocoevalcap contains both jars. Its Python wrappers are not used: their pipes to METEOR can block forever, they leave
the process running after an interrupt, and they write into the package's folder.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from lorakit.errors import ConfigurationError, LorakitError
from lorakit.metrics.checks import requires_extra


def find_java(required: bool | None) -> str | None:
    """Return the path of `java`, or None to compute the scores without Java.

    Args:
        required: True requires Java, False never uses it, None uses it if it is installed.

    Raises:
        ConfigurationError: Java is required and not installed.
    """
    java = None if required is False else shutil.which("java")
    if java is None and required:
        raise ConfigurationError(
            "Java is not installed: found no 'java' on the PATH. Install it (on Debian: apt-get install "
            "default-jre-headless), or score without Java: java=False."
        )
    return java


def jar(*parts: str) -> Path:
    """Return the path of a jar in pycocoevalcap.

    Raises:
        ConfigurationError: pycocoevalcap is not installed.
    """
    with requires_extra("metrics"):
        path = files("pycocoevalcap")
    for part in parts:  # one at a time: pycocoevalcap is a namespace package
        path = path / part
    return Path(str(path))


def run_java(java: str, *arguments: str, text: str = "", timeout: float) -> str:
    """Run a Java program with `text` on stdin and return its stdout, with the same line ends on every system.

    Raises:
        LorakitError: The program failed, could not be started, or was stopped after `timeout` seconds.
    """
    command = [java, "-Dfile.encoding=UTF-8", *arguments]
    try:
        # run() kills and reaps the program on any exception, including a timeout and Ctrl-C.
        done = subprocess.run(
            command,
            input=text.encode("utf-8", errors="replace"),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise LorakitError(
            f"'{' '.join(command)}' was stopped after {timeout:.0f} seconds without a result. Score without Java: "
            "java=False."
        ) from None
    except OSError as error:
        raise LorakitError(
            f"{java} cannot be started: {error.strerror}. Reinstall Java, or score without it: java=False."
        ) from None
    if done.returncode != 0:
        message = done.stderr.decode("utf-8", errors="replace").strip() or "no message"
        raise LorakitError(
            f"'{' '.join(command)}' failed with status {done.returncode}: {message[-500:]}. Score without Java: "
            "java=False."
        )
    return done.stdout.decode("utf-8", errors="replace").replace("\r\n", "\n")
