from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _plans(instant_products: None) -> None:
    """Tests of commands do not look at the times of a plan."""
