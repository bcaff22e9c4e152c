"""lorakit: low-rank adaptation of large language models (Hu et al. 2021).

    adapters = lorakit.attach(model, lorakit.LoRA(rank=8, alpha=16, targets="attention.qv"))
    ...                                   # any training loop
    adapters.save("out/my-adapter")       # a PEFT folder, with lorakit.json and a model card

Names are imported on first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.version import __version__

if TYPE_CHECKING:
    from lorakit import analysis, errors, methods, metrics, planning, reporting, tasks
    from lorakit.adapters.attach import attach
    from lorakit.adapters.handle import Adapters, handle_of
    from lorakit.adapters.loading import load
    from lorakit.adapters.peft_model import from_peft
    from lorakit.adapters.summary import count_parameters
    from lorakit.data.data_config import DataConfig
    from lorakit.errors import LorakitError
    from lorakit.evaluation.decoding import Decoding
    from lorakit.evaluation.evaluate import evaluate
    from lorakit.evaluation.evaluate_config import EvaluateConfig
    from lorakit.evaluation.predict import predict
    from lorakit.evaluation.predict_config import PredictConfig
    from lorakit.methods.bitfit import BitFit
    from lorakit.methods.bottleneck import BottleneckAdapter
    from lorakit.methods.combined import Combined
    from lorakit.methods.full import FullFineTuning
    from lorakit.methods.lora.method import LoRA
    from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer
    from lorakit.methods.registry import use_method
    from lorakit.models.base_config import BaseConfig
    from lorakit.models.listing import targets
    from lorakit.models.loading import load_base
    from lorakit.training.config import (
        CheckpointConfig,
        HeldOutConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from lorakit.training.loop import train

_HOME = {
    "Adapters": "lorakit.adapters.handle",
    "attach": "lorakit.adapters.attach",
    "from_peft": "lorakit.adapters.peft_model",
    "handle_of": "lorakit.adapters.handle",
    "load": "lorakit.adapters.loading",
    "count_parameters": "lorakit.adapters.summary",
    "DataConfig": "lorakit.data.data_config",
    "LorakitError": "lorakit.errors",
    "Decoding": "lorakit.evaluation.decoding",
    "EvaluateConfig": "lorakit.evaluation.evaluate_config",
    "evaluate": "lorakit.evaluation.evaluate",
    "PredictConfig": "lorakit.evaluation.predict_config",
    "predict": "lorakit.evaluation.predict",
    "BitFit": "lorakit.methods.bitfit",
    "BottleneckAdapter": "lorakit.methods.bottleneck",
    "Combined": "lorakit.methods.combined",
    "FullFineTuning": "lorakit.methods.full",
    "LoRA": "lorakit.methods.lora.method",
    "PrefixEmbedding": "lorakit.methods.prefix",
    "PrefixLayer": "lorakit.methods.prefix",
    "use_method": "lorakit.methods.registry",
    "BaseConfig": "lorakit.models.base_config",
    "load_base": "lorakit.models.loading",
    "targets": "lorakit.models.listing",
    "CheckpointConfig": "lorakit.training.config",
    "HeldOutConfig": "lorakit.training.config",
    "OptimizerConfig": "lorakit.training.config",
    "TrainConfig": "lorakit.training.config",
    "train": "lorakit.training.loop",
}

__all__ = [
    "Adapters",
    "BaseConfig",
    "BitFit",
    "BottleneckAdapter",
    "CheckpointConfig",
    "Combined",
    "DataConfig",
    "Decoding",
    "EvaluateConfig",
    "FullFineTuning",
    "HeldOutConfig",
    "LoRA",
    "LorakitError",
    "OptimizerConfig",
    "PredictConfig",
    "PrefixEmbedding",
    "PrefixLayer",
    "TrainConfig",
    "__version__",
    "analysis",
    "attach",
    "count_parameters",
    "errors",
    "evaluate",
    "from_peft",
    "handle_of",
    "load",
    "load_base",
    "methods",
    "metrics",
    "planning",
    "predict",
    "reporting",
    "targets",
    "tasks",
    "train",
    "use_method",
]


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
        if name not in _HOME:
            return import_module(f"lorakit.{name}")
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
