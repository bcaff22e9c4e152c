from __future__ import annotations

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny causal language model with dropout, which reveals a wrong random state."""
    return tiny_runs.save_base(tmp_path_factory.mktemp("base"), attention_dropout=0.1)
