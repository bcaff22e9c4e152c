"""What a server opens: the base that its adapters record."""

from __future__ import annotations

import pytest

from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.serving.cards import Card
from lorakit.serving.opening import _base, _cards

NAME = "owner/model"


@pytest.mark.parametrize(
    ("revisions", "expected"), [([None, None], None), ([""], None), (["v2", None], "v2")]
)
def test_the_base_has_the_revision_that_the_adapters_record(revisions, expected) -> None:
    cards = [Card(base=NAME, revision=revision) for revision in revisions]
    assert _base(None, cards) == BaseConfig(name=NAME, revision=expected)


def test_a_followed_run_that_is_not_there_is_a_notice(tmp_path, caplog) -> None:
    (tmp_path / "first").mkdir()
    assert _cards(None, {"first": str(tmp_path / "first"), "frist": str(tmp_path / "frist")}) == []
    (notice,) = caplog.messages
    assert notice.startswith(f"There is no run at '{tmp_path}/frist' yet;")
    assert notice.endswith(f"Did you mean '{tmp_path}/first'?")


def test_several_revisions_need_a_choice() -> None:
    cards = [Card(base=NAME, revision="v2"), Card(base=NAME, revision="")]
    with pytest.raises(ConfigurationError, match=r"revisions of owner/model: the default one, v2"):
        _base(None, cards)
    assert _base(BaseConfig(name=NAME), cards).revision is None
