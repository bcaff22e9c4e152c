"""Before a base is loaded, the memory of earlier ones is free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models

from lorakit.adapters import attach
from lorakit.analysis import base_weights
from lorakit.compute import base as opening
from lorakit.data import DataTask
from lorakit.methods.lora.method import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import Shape

BASE = BaseConfig(name="tiny", device="cpu")
OPEN: dict[str, Callable[[], Any]] = {
    "open_base": lambda: opening.open_base(BASE, DataTask(name="completion")),
    "load_float32": lambda: base_weights.load_float32(BASE, "LlamaForCausalLM"),
}


class Loading(Exception):
    pass


@pytest.mark.parametrize("name", OPEN)
def test_an_earlier_model_is_freed_before_the_next_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapted model is part of a reference cycle, and two bases may not fit into the memory."""

    def load(*_: Any, **__: Any) -> None:
        assert earlier() is None
        raise Loading

    monkeypatch.setattr(opening, "load_base", load)
    monkeypatch.setattr(base_weights, "load_base", load)
    shape = Shape("tiny", "", tiny_models.build("llama").config)
    monkeypatch.setattr(base_weights, "_shape_of", lambda _: shape)
    gc.collect()
    gc.disable()
    try:
        model = tiny_models.build("llama")
        attach(model, LoRA(rank=1))
        earlier = weakref.ref(model)
        del model
        assert earlier() is not None
        with pytest.raises(Loading):
            OPEN[name]()
    finally:
        gc.enable()
