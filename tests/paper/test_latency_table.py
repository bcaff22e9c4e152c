"""Table 1: all methods are timed, and adapters have the paper's share of the base's parameters."""

from __future__ import annotations

import json

import pytest
import tiny_runs
import torch
from tiny_models import build

from lorakit.adapters.handle import handle_of
from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.paper import latency
from lorakit.paper.paper_config import PaperConfig


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_runs.save_base(tmp_path_factory.mktemp("decoder"), "llama")


SECONDS = {None: 0.010, "merged": 0.011, "lin": 0.012, "houlsby": 0.015}
"""The made time of a pass, by the only method that is attached."""


def test_the_paper_s_rows_and_ours(decoder, tmp_path, monkeypatch):
    warm = set()

    def time_pass(model, ids):
        adapters = handle_of(model)
        method = None
        if adapters is not None:
            (name,) = adapters.names
            method = "merged" if adapters.merged else adapters.method(name).kind
            assert {p.dtype for m in adapters.modules(name).values() for p in m.parameters()} == {
                torch.bfloat16
            }
        key = ids.shape, method
        if key not in warm and method:
            warm.add(key)
            return 9.0
        return SECONDS[method]

    monkeypatch.setattr(latency, "_time_pass", time_pass)
    monkeypatch.setattr(latency, "SETTINGS", ((4, 16, 0.02), (2, 8, 0.05), (1, 8, 0.05)))
    monkeypatch.setattr(latency, "PASSES", 4)
    config = PaperConfig(
        table="table1",
        base=BaseConfig(name=decoder, dtype="bfloat16", device="cpu"),
        output=str(tmp_path / "out"),
    )
    result = latency.run_latency(config, lambda text: None)
    assert [(t.batch, t.length) for t in result.timings[::4]] == [(4, 16), (2, 8), (1, 8)]
    assert all(t.passes == 4 for t in result.timings)
    cells = {row[1]: {*row[3:]} for row in result.measured}
    assert cells == {
        "FT": {"10.0 ± 0.0 (+0.0%)"},
        "LoRA merged": {"11.0 ± 0.0 (+10.0%)"},
        "AdapterL": {"12.0 ± 0.0 (+20.0%)"},
        "AdapterH": {"15.0 ± 0.0 (+50.0%)"},
    }
    assert {t.method: bool(t.parameters) for t in result.timings} == {
        **{"FT": False, "LoRA merged": False},
        **{"AdapterL": True, "AdapterH": True},
    }
    page = result.page.read_text(encoding="utf-8")
    assert "| gpt2-medium | AdapterH | 0.5M, 11M, 11M | 1492.2 ± 1.0 |" in page
    assert len(json.loads(result.data.read_text(encoding="utf-8"))["timings"]) == 12


@pytest.mark.parametrize(
    ("option", "value"), [("methods", ("lora",)), ("tasks", ("rte",)), ("seeds", 5), ("limit", 100)]
)
def test_options_of_training_runs_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"trains nothing. Leave {option} out"):
        PaperConfig(table="table1", **{option: value})


def test_a_table_of_latencies_has_no_study() -> None:
    config = PaperConfig(table="table1", reproduce="rte/lora/0")
    with pytest.raises(ConfigurationError, match="table is 'table1'; it must be one of table2, "):
        _ = config.study


def test_adapters_have_about_the_asked_for_parameters_and_one_too_large_is_refused():
    model = build("llama")
    size = sum(p.numel() for p in model.parameters())
    for kind in ("lin", "houlsby"):
        method = latency._bottleneck_of(model, kind, 0.1 * size)
        found = latency.count_parameters(model, method).trainable
        one_more = latency.count_parameters(
            model, latency.BottleneckAdapter(kind=kind, size=method.size + 1)
        ).trainable
        assert abs(found - 0.1 * size) <= one_more - found
    with pytest.raises(ConfigurationError, match="would be wider than this model"):
        latency._bottleneck_of(model, "lin", 100 * size)


def test_the_fewest_passes_are_counted_without_the_warm_up():
    timings = latency._time_setting(build("llama"), 1, 8, 0.05, seconds=0.0)
    assert {timing.passes for timing in timings} == {latency.FEWEST_PASSES}


def test_a_batch_is_halved_until_passes_fit():
    model = build("llama")
    assert latency._largest_batch(model, 8, 8, seconds=1e9) == 8
    assert latency._largest_batch(model, 8, 8, seconds=0.0) == 1
