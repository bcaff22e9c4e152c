"""One typed configuration of a training run; Python, YAML and the command line set the same fields."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.configuration import conform
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, nearest, require_at_least, require_choice
from lorakit.evaluation.score import DIRECTIONS
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method
from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer
from lorakit.methods.registry import DEFAULT_RATE, is_own, own_method, use_method
from lorakit.models.base_config import BaseConfig
from lorakit.tasks.language_modelling import TextTask

Schedule = Literal["linear", "cosine", "constant"]
Sampling = Literal["random", "grouped"]
LoggerName = Literal["tensorboard", "wandb"]

DEFAULT_RATES: dict[str, float] = {
    # Thin matrices take about ten times the rate of the weights themselves (paper, Tables 9 and 11).
    "lora": 5e-4,
    "full": 5e-5,
    # A bias only shifts what its layer gives out; the paper takes eight times the rate of LoRA (section D.4).
    "bitfit": 1e-3,
    # The rate of nearly all of the paper's adapter runs (Table 9).
    "bottleneck": 3e-4,
    # Vectors that start at random and small have a way to go; the paper takes 5e-4 and 1e-4 (section D.4) over many
    # more steps than a small run has.
    "prefix_embedding": 1e-3,
    "prefix_layer": 5e-4,
}
"""Every method that a configuration can name, and the peak learning rate that it starts from."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning rate over time."""

    learning_rate: float | None = None
    """Peak rate. By default that of the method: 5e-4 for lora, 5e-5 for full, 1e-3 for bitfit, 3e-4 for
    bottleneck, 1e-3 for prefix_embedding, 5e-4 for prefix_layer; of several the lowest."""
    lr_ratio: float = 1.0
    """The rate of B over the rate of A (LoRA+, Hayou et al. 2024, who advise about 16 with a lower rate)."""
    schedule: Schedule = "linear"
    """Course of the rate after warm-up: linear or cosine down to 0, or constant."""
    warmup: float = 0.03
    """Steps over which the rate rises from 0: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and magnitudes have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    clip: float = 1.0
    """The gradient's norm is scaled down to this where it is larger; 0 leaves it."""

    def __post_init__(self) -> None:
        conform(self, "optimizer")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0, for example 5e-4."
            )
        if not 0 < self.lr_ratio < math.inf:
            raise ConfigurationError(
                f"optimizer.lr_ratio is {self.lr_ratio}; it must be above 0 (1 gives A and B the same rate)."
            )
        for name in ("warmup", "weight_decay", "eps", "clip"):
            require_at_least(f"optimizer.{name}", getattr(self, name), 0)
        if self.eps == 0:
            raise ConfigurationError(
                "optimizer.eps is 0, which divides 0 by 0 where a gradient is 0; 1e-8 is usual."
            )
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigurationError(
                f"optimizer.warmup is {self.warmup}; write a share of the steps below 1 or a whole number of steps."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(
                f"optimizer.betas is {self.betas}; it must be two numbers of at least 0 and below 1."
            )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Scores on the validation data during training, and what they decide."""

    every: int | None = None
    """Steps between evaluations; by default once per epoch. The start and the end are always evaluated."""
    limit: int | None = None
    """Score this many validation examples, spread evenly over them; none scores all."""
    batch_size: int | None = None
    """Examples per forward pass; by default that of training."""
    metric: str = "loss"
    """The score that selects the best adapter: loss; bleu or rouge_l (of the samples); accuracy, f1, matthews;
    pearson, spearman, mse; or another of a named task's that is cheap enough."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best; none never stops early."""
    samples: int = 0
    """Generate text for this many validation prompts at each evaluation: samples.jsonl, and the scores bleu and
    rouge_l."""
    max_new_tokens: int = 64
    """Length of a generated sample at most."""

    def __post_init__(self) -> None:
        conform(self, "evaluation")
        for name in ("every", "limit", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(f"evaluation.{name}", value, 1)
        require_at_least("evaluation.samples", self.samples, 0)
        require_at_least("evaluation.max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which an interrupted run goes on to the same weights."""

    every: int | None = None
    """Steps between checkpoints; by default once per epoch. Ctrl-C and SIGTERM write one more."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted. The best adapter is kept apart from them."""

    def __post_init__(self) -> None:
        conform(self, "checkpoints")
        if self.every is not None:
            require_at_least("checkpoints.every", self.every, 1)
        require_at_least("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: a base model, data, what is trained, and where the result goes.

    Raises:
        ConfigurationError: A value cannot work, or two settings exclude each other.
    """

    base: BaseConfig
    """The base model."""
    data: DataConfig
    """The data and how an example is read from it."""
    output: str
    """Run folder: configuration, metrics, checkpoints, the adapter."""
    method: str = "lora"
    """What is trained: thin matrices beside the weights (lora), the weights themselves (full), biases (bitfit),
    small layers in between (bottleneck), or vectors of virtual tokens around the prompt, at the embedding alone
    (prefix_embedding) or in every block (prefix_layer). Several are joined by a plus: lora+prefix_embedding.
    A method of your own is a class in a file, path/to/file.py:Class, or an entry point of an installed package."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of a method of your own, by name."""
    lora: LoRA = field(default_factory=LoRA)
    """Settings of the method lora. A new classification head is trained beside any method without being named."""
    full: FullFineTuning = field(default_factory=FullFineTuning)
    """Settings of the method full."""
    bitfit: BitFit = field(default_factory=BitFit)
    """Settings of the method bitfit."""
    bottleneck: BottleneckAdapter = field(default_factory=BottleneckAdapter)
    """Settings of the method bottleneck."""
    prefix_embedding: PrefixEmbedding = field(default_factory=PrefixEmbedding)
    """Settings of the method prefix_embedding."""
    prefix_layer: PrefixLayer = field(default_factory=PrefixLayer)
    """Settings of the method prefix_layer."""
    from_adapter: str | None = None
    """Start from the weights (and method) of this adapter folder, with a new optimizer; unlike resume."""

    epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps, over as many passes as they need; replaces epochs."""
    batch_size: int = 16
    """Examples per forward and backward pass."""
    accumulation: int = 1
    """Passes per optimizer step; the step is that of one batch of batch_size x accumulation examples."""
    packing: bool = True
    """Compute tokens that examples of a batch share (a common prompt) once. The loss and gradients stay those of
    separate examples; where the model cannot do it, batches are padded, and the run says so."""
    sampling: Sampling = "random"
    """Order of the data: random; or grouped, where examples with one prompt share batches, which packing makes
    cheap. Grouping changes the order of training, and so its result."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over all tokens or classes."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model's blocks with torch.compile: a minute or more at the start. For GPUs; on a CPU in bfloat16
    it was slower wherever it was measured."""
    seed: int = 0
    """Seed of the adapter's start, the order of the data and dropout."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Evaluation during training."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    loggers: tuple[LoggerName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, wandb."""
    resume: bool = False
    """Go on from the newest checkpoint in output, or from the start where there is none."""
    overwrite: bool = False
    """Delete the run in output first."""

    def __post_init__(self) -> None:
        conform(self)
        if not self.data.has("train"):
            raise ConfigurationError(
                "data.train is not set; name the data to train on, for example --data.train yours.jsonl, or a task "
                "that has its own, for example --data.task mrpc."
            )
        if not self.output:
            raise ConfigurationError(
                "output is empty; name a folder for the run, for example out/first."
            )
        if not 0 < self.epochs < math.inf:
            raise ConfigurationError(
                f"epochs is {self.epochs}; it must be a finite number above 0."
            )
        for name in ("batch_size", "accumulation"):
            require_at_least(name, getattr(self, name), 1)
        if self.max_steps is not None:
            require_at_least("max_steps", self.max_steps, 1)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(
                f"seed is {self.seed}; it must be a whole number of 0 or more."
            )
        if self.resume and self.overwrite:
            raise ConfigurationError(
                "resume and overwrite exclude each other: one goes on with the run, the other deletes it."
            )
        self._check_method()
        self._check_metric()
        needs = [
            f"evaluation.{name}"
            for name in ("every", "limit", "patience", "samples")
            if getattr(self.evaluation, name)
        ]
        if needs and not self.validates:
            raise ConfigurationError(
                f"{', '.join(needs)} needs validation data. Name a file with data.validation, or set part of the "
                "training data aside with data.validation_fraction, for example 0.05."
            )

    def _check_metric(self) -> None:
        task, metric = self.data.task_type, self.evaluation.metric
        if task is None:  # the data will say
            require_choice("evaluation.metric", metric, DIRECTIONS)
            of_text = metric in TextTask.quick_scores
        else:
            always = ("loss", "perplexity") if task.kind == "text" else ("loss",)
            if metric in task.scores and metric not in task.quick_scores:
                raise ConfigurationError(
                    f"evaluation.metric is {metric}, which is not computed during training; choose one of "
                    f"{', '.join((*always, *task.quick_scores))}."
                )
            require_choice(
                f"for task {self.data.task}, evaluation.metric",
                metric,
                (*always, *task.quick_scores),
            )
            of_text = task.kind == "text" and metric in task.quick_scores
        if of_text and not self.evaluation.samples:
            raise ConfigurationError(
                f"evaluation.metric is {metric}, which scores generated samples, but evaluation.samples is 0. "
                "Set it, for example to 100."
            )

    def _check_method(self) -> None:
        names = self.method_names
        own = [name for name in names if name not in DEFAULT_RATES]
        for name in names:
            if name not in DEFAULT_RATES and not is_own(name):
                raise ConfigurationError(
                    f"method is {self.method!r}; it must be one of {', '.join(DEFAULT_RATES)}, several joined by a "
                    f"plus, or a class of yours in a file, path/to/file.py:Class.{nearest(name, DEFAULT_RATES)}"
                )
            if names.count(name) > 1:
                raise ConfigurationError(f"method is {self.method!r}, which names {name} twice.")
        set_by_hand = [name for name in DEFAULT_RATES if self._has_settings(name)]
        for name in set_by_hand:
            if name not in names:
                raise ConfigurationError(
                    f"method is {self.method}, but the section {name} has settings of its own, which would have no "
                    f"effect. Set method to {name}, or leave the section out."
                )
        if "lora" not in names and self.optimizer.lr_ratio != 1:
            raise ConfigurationError(
                f"optimizer.lr_ratio is for the A and B of lora; with method {self.method} leave it at 1."
            )
        if self.method_settings and len(own) != 1:
            raise ConfigurationError(
                f"method_settings are for one method of your own, and method {self.method} names {len(own)}. Leave "
                "them out, or give what they set defaults in the class."
            )
        # Beside from_adapter a method of one's own only says where the class is.
        others = [name for name in names if name not in own]
        if self.from_adapter is not None and (others not in ([], ["lora"]) or set_by_hand):
            raise ConfigurationError(
                "from_adapter brings its own method and settings; leave out method and the sections of methods "
                f"({', '.join(DEFAULT_RATES)}) beside it."
            )
        _ = self.chosen_method  # methods that exclude each other are an error here already

    def _has_settings(self, section: str) -> bool:
        """Whether a method's section differs from its defaults."""
        settings = getattr(self, section)
        return settings != type(settings)()

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names that `method` joins."""
        return tuple(self.method.split("+"))

    @property
    def chosen_method(self) -> Method:
        """The method that `method` names, with the settings of its section."""
        chosen = tuple(
            getattr(self, name) if name in DEFAULT_RATES else own_method(name, self.method_settings)
            for name in self.method_names
        )
        return chosen[0] if len(chosen) == 1 else Combined(methods=chosen)

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return self.data.source("validation") is not None

    @property
    def peak_rate(self) -> float:
        """The learning rate, or the method's default."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        # Of several the lowest: one rate for all must not be too high for any.
        return min(
            DEFAULT_RATES.get(name) or getattr(use_method(name), "default_rate", DEFAULT_RATE)
            for name in self.method_names
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that YAML and JSON can hold."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
