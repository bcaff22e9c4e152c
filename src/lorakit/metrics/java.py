"""Running the official scorers that are Java programs: METEOR 1.5 and the Stanford PTB tokenizer.

Both jars come with pycocoevalcap. Its own Python wrappers are not used: they talk to METEOR over pipes that can block
for ever, leave it behind when interrupted, and write into the package's folder.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from lorakit.errors import ConfigurationError, LorakitError
from lorakit.metrics.checks import missing_package


def find_java(wanted: bool | None) -> str | None:
    """Return the path of `java`, or None where the scores are to be computed without.

    Args:
        wanted: True to insist on it, False to do without, None to use it where it is installed.

    Raises:
        ConfigurationError: It is wanted and is not installed.
    """
    java = shutil.which("java") if wanted in (True, None) else None
    if java is None and wanted:
        raise ConfigurationError(
            "Java is not installed: there is no 'java' on the PATH. Install it (on Debian: apt-get install "
            "default-jre-headless), or score without: java=False."
        )
    return java


def jar(*parts: str) -> Path:
    """Return the path of a jar of pycocoevalcap.

    Raises:
        ConfigurationError: pycocoevalcap is not installed.
    """
    try:
        path = files("pycocoevalcap")
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    for part in parts:  # one at a time: pycocoevalcap is a namespace package
        path = path / part
    return Path(str(path))


def run_java(java: str, *arguments: str, text: str = "", timeout: float) -> str:
    """Run a Java program on `text` as its input and return what it prints.

    Raises:
        LorakitError: It failed, could not be started, or was ended after `timeout` seconds.
    """
    command = [java, "-Dfile.encoding=UTF-8", *arguments]
    try:
        # run() ends and reaps the program whatever happens here, a timeout or Ctrl-C included.
        done = subprocess.run(
            command,
            input=text.encode("utf-8", errors="replace"),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise LorakitError(
            f"'{' '.join(command)}' was ended after {timeout:.0f} seconds without a result. java=False scores without."
        ) from None
    except OSError as error:
        raise LorakitError(f"{java} cannot be started: {error.strerror}.") from None
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", errors="replace").strip() or "no message"
        raise LorakitError(
            f"'{' '.join(command)}' failed with status {done.returncode}: {said[-500:]}. java=False scores without."
        )
    return done.stdout.decode("utf-8", errors="replace")
