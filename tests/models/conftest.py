"""Fixtures of the tests of base models."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_gguf import tiny_llama
from transformers import LlamaForCausalLM

from lorakit.models import hub


@pytest.fixture(autouse=True)
def no_answers_of_other_hubs() -> None:
    """Forget what the hub of an earlier test answered."""
    hub._KNOWN.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that converted files are cached in, a new one for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORAKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()
