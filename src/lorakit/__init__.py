"""lorakit: low-rank adaptation of large language models (Hu et al. 2021).

    adapters = lorakit.attach(model, lorakit.LoRA(rank=8, alpha=16, targets="attention.qv"))
    ...                                   # any training loop
    adapters.save("out/my-adapter")       # a PEFT folder, with lorakit.json and a model card

Names are imported on first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.version import __version__ as __version__

if TYPE_CHECKING:
    from lorakit import (
        analysis as analysis,
        errors as errors,
        methods as methods,
        metrics as metrics,
        planning as planning,
        reporting as reporting,
        tasks as tasks,
    )
    from lorakit.adapters.attach import attach as attach
    from lorakit.adapters.handle import Adapters as Adapters, handle_of as handle_of
    from lorakit.adapters.loading import load as load
    from lorakit.adapters.peft_model import from_peft as from_peft
    from lorakit.adapters.summary import count_parameters as count_parameters
    from lorakit.data.data_config import DataConfig as DataConfig
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.evaluation.decoding import Decoding as Decoding
    from lorakit.evaluation.evaluate import evaluate as evaluate
    from lorakit.evaluation.evaluate_config import EvaluateConfig as EvaluateConfig
    from lorakit.evaluation.predict import predict as predict
    from lorakit.evaluation.predict_config import PredictConfig as PredictConfig
    from lorakit.methods.bitfit import BitFit as BitFit
    from lorakit.methods.bottleneck import BottleneckAdapter as BottleneckAdapter
    from lorakit.methods.combined import Combined as Combined
    from lorakit.methods.full import FullFineTuning as FullFineTuning
    from lorakit.methods.lora.method import LoRA as LoRA
    from lorakit.methods.prefix import (
        PrefixEmbedding as PrefixEmbedding,
        PrefixLayer as PrefixLayer,
    )
    from lorakit.methods.registry import use_method as use_method
    from lorakit.models.base_config import BaseConfig as BaseConfig
    from lorakit.models.listing import targets as targets
    from lorakit.models.loading import load_base as load_base
    from lorakit.training.config import (
        CheckpointConfig as CheckpointConfig,
        HeldOutConfig as HeldOutConfig,
        OptimizerConfig as OptimizerConfig,
        TrainConfig as TrainConfig,
    )
    from lorakit.training.loop import train as train
else:  # a type checker would take any misspelt name for one of `__getattr__`
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
    _PACKAGES = ("analysis", "errors", "methods", "metrics", "planning", "reporting", "tasks")
    __all__ = sorted([*_HOME, *_PACKAGES, "__version__"])

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return import_module(f"lorakit.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
        return getattr(import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return __all__
