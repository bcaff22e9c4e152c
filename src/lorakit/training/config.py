"""Typed configuration of a training run, with the same fields in Python, YAML and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.configuration import LocalPath, as_dict, changed, conform, strict
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
from lorakit.methods.registry import SECTIONS, default_rate, is_user_method, user_method
from lorakit.models.base_config import NO_NAME, BaseConfig
from lorakit.tasks.language_modelling import TextTask

Schedule = Literal["linear", "cosine", "constant"]
Sampling = Literal["random", "grouped"]

MAX_TIMEOUT = 7 * 24 * 60
MAX_EPOCHS = 1_000_000
"""Most epochs. Larger numbers are mistakes, and their steps exceed 64 bits."""


@strict
@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning rate schedule."""

    learning_rate: float | None = None
    """Peak learning rate, by default that of the method: 5e-4 for lora, 5e-5 for full, 1e-3 for bitfit, 3e-4 for
    bottleneck, 1e-3 for prefix_embedding, 5e-4 for prefix_layer; the lowest one if several methods are combined."""
    lr_ratio: float = 1.0
    """Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024, who advise about 16 with a lower rate)."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: linear or cosine decay to 0, or constant."""
    warmup: float = 0.03
    """Steps over which the learning rate rises from 0: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices. Biases, norms and magnitudes have no weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update, the root of the mean square."""
    clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0 disables clipping."""
    on_divergence: Literal["stop", "rewind"] = "stop"
    """What to do when the loss or a gradient is not finite, or the loss explodes: stop; or rewind. Rewind goes back to
    the newest checkpoint before that, and halves the learning rate for the rest of the run. The fourth time it stops.
    The examples and their order stay the same, so it does not help against bad data."""
    explosion: float = 3.0
    """The loss has exploded if each of the last 10 losses is more than this many times the usual loss, the highest
    median of 50 steps so far. So single hard batches do not count, nor losses that rise from near 0. A run does not
    explode in its first 19 steps. 0 accepts every finite loss."""

    def __post_init__(self) -> None:
        conform(self, "optimizer")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0, for example 5e-4."
            )
        if not 0 < self.lr_ratio < math.inf:
            raise ConfigurationError(
                f"optimizer.lr_ratio is {self.lr_ratio}; it must be above 0 (1: A and B have the same rate)."
            )
        for name in ("warmup", "weight_decay", "eps", "clip", "explosion"):
            require_at_least(f"optimizer.{name}", getattr(self, name), 0)
        if 0 < self.explosion <= 1:
            raise ConfigurationError(
                f"optimizer.explosion is {self.explosion}; it must be above 1, or 0 to accept every loss."
            )
        if self.eps == 0:
            raise ConfigurationError(
                "optimizer.eps is 0, so a gradient of 0 would give 0 / 0; set it to 1e-8."
            )
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigurationError(
                f"optimizer.warmup is {self.warmup}; it must be a share below 1 or a whole number of steps."
            )
        for index, beta in enumerate(self.betas):
            require_at_least(f"optimizer.betas[{index}]", beta, 0, below=1)


@strict
@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Evaluation on the validation data during training, the best adapter and early stopping."""

    every: int | None = None
    """Steps between evaluations; by default once per epoch. A run also evaluates before its first and after its last
    step."""
    limit: int | None = None
    """Score this many evenly spaced validation examples; null scores all."""
    batch_size: int | None = None
    """Examples per forward pass; by default the batch size of training."""
    metric: str = "loss"
    """Score that selects the best adapter: loss; bleu or rouge_l (of the samples); accuracy, f1 (of two classes that of
    the second in order), matthews; pearson, spearman, mse; or another score that the named task computes during
    training."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best; null disables early stopping."""
    samples: int = 0
    """Generate text for this many validation prompts at each evaluation; writes samples.jsonl and the scores bleu
    and rouge_l."""
    max_new_tokens: int = 64
    """Maximum number of tokens in a generated sample."""

    def __post_init__(self) -> None:
        conform(self, "evaluation")
        for name in ("every", "limit", "batch_size", "patience", "max_new_tokens"):
            require_at_least(f"evaluation.{name}", getattr(self, name), 1)
        require_at_least("evaluation.samples", self.samples, 0)


@strict
@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which an interrupted run resumes and reaches the same weights."""

    every: int | None = None
    """Steps between checkpoints; by default once per epoch, and in an epoch of more than 500 steps every 500. Each
    best score writes another one, and so do Ctrl-C, SIGTERM and SIGHUP (a closed terminal)."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted, except up to two for optimizer.on_divergence rewind. The
    best adapter is saved separately."""

    def __post_init__(self) -> None:
        conform(self, "checkpoints")
        require_at_least("checkpoints.every", self.every, 1)
        require_at_least("checkpoints.keep", self.keep, 1)


@strict
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run: base model, data, method, optimizer and output.

    Raises:
        ConfigurationError: A value is invalid, or two settings exclude each other.
    """

    base: BaseConfig
    """The base model."""
    data: DataConfig
    """Training and validation data, and the format of their examples."""
    output: LocalPath
    """Run folder: configuration, metrics, checkpoints, the adapter."""
    method: str = "lora"
    """Training method: low-rank updates of weights (lora), all weights (full), biases (bitfit), adapter layers
    (bottleneck), or virtual tokens around the prompt, at the embedding (prefix_embedding) or in every block
    (prefix_layer). Combine methods with a plus: lora+prefix_embedding. Name your own method by its class in a file,
    path/to/file.py:Class, or by the entry point of an installed package."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of your own method, by name."""
    lora: LoRA = field(default_factory=LoRA)
    """Settings of the method lora. Every method also trains a new classification head."""
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
    from_adapter: LocalPath | None = None
    """Start from the weights and method of this adapter folder, with a new optimizer. Unlike resume, this starts a
    new run."""

    epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs. A resumed run can raise it; its schedule then extends to the new last step."""
    batch_size: int = 16
    """Examples per forward and backward pass."""
    accumulation: int = 1
    """Batches per optimizer step. A step uses the same batch_size x accumulation examples, however it is cut into
    batches, and without dropout gives the same result up to rounding."""
    packing: bool = True
    """Compute tokens that examples of a batch share (a common prompt) only once. Loss and gradients equal those of
    separate examples. If the model does not support packing, the run pads its batches and prints a note."""
    sampling: Sampling = "random"
    """Order of the data: random; or grouped, where examples with the same prompt share a batch, which is fast with
    packing. Grouping changes the order of the examples, so results differ."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all tokens or classes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, up to two thirds more time."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, which delays the start by a minute or more. For GPUs and
    long runs; on CPUs it gained 7 % with examples of similar lengths and lost 39 % with others."""
    shard: bool = False
    """Split the weights of the base over the processes of a run, so that each holds a part of every block. For models
    that do not fit into the memory of one device; it needs torchrun."""
    seed: int = 0
    """Seed of the adapter's initial weights, the order of the data and dropout."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Evaluation during training."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    processes_timeout: float = 30.0
    """Minutes that a process of a run under torchrun waits for the others. If one hangs, all others then end with an
    error. The others also wait while one writes a checkpoint, generates its share of evaluation.samples or decomposes
    the weights for lora.init pissa."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Additional loggers: tensorboard, wandb. Every run writes metrics.jsonl."""
    resume: bool = False
    """Resume from the newest checkpoint in output; start a new run if output has no checkpoint."""
    overwrite: bool = False
    """Delete the existing run in output first."""

    def __post_init__(self) -> None:
        conform(self)
        if not self.base.name:
            raise ConfigurationError(NO_NAME)
        if not self.data.has("train"):
            raise ConfigurationError(
                "data.train is not set; set it to your training data, for example --data.train yours.jsonl, or name a "
                "task that has data, for example --data.task mrpc."
            )
        if not self.output:
            raise ConfigurationError(
                "output is empty; name a folder for the run, for example out/first."
            )
        if not 0 < self.epochs <= MAX_EPOCHS:
            raise ConfigurationError(
                f"epochs is {self.epochs}; it must be a number above 0, at most {MAX_EPOCHS:,}. Set max_steps for a "
                "longer run."
            )
        for name in ("batch_size", "accumulation", "max_steps"):
            require_at_least(name, getattr(self, name), 1)
        if not 0 < self.processes_timeout <= MAX_TIMEOUT:
            raise ConfigurationError(
                f"processes_timeout is {self.processes_timeout}; it must be above 0 and at most {MAX_TIMEOUT:,} "
                "minutes (a week)."
            )
        require_at_least("label_smoothing", self.label_smoothing, 0, below=1)
        require_at_least("seed", self.seed, 0)
        if self.resume and self.overwrite:
            raise ConfigurationError(
                "resume and overwrite exclude each other: resume continues the run, overwrite deletes it."
            )
        self._check_shard()
        self._check_method()
        self._check_task()
        used = [f"evaluation.{name}" for name in changed(self.evaluation)]
        if used and not self.validates:
            raise ConfigurationError(
                f"{', '.join(used)} needs validation data. Set data.validation to a file, or hold out part of the "
                "training data with data.validation_fraction, for example 0.05."
            )

    def _check_shard(self) -> None:
        excluded = {
            "compile is true": self.compile,
            f"base.dtype is {self.base.dtype}": self.base.dtype in ("nf4", "int8"),
        }
        for setting in (text for text, is_set in excluded.items() if self.shard and is_set):
            raise ConfigurationError(
                f"shard is true and {setting}, but only plain weights of uncompiled blocks can be sharded. Change one "
                "of the two settings."
            )

    def _check_task(self) -> None:
        task, metric, samples = self.data.task_type, self.evaluation.metric, self.evaluation.samples
        if task is None:  # the data determines the task later
            require_choice("evaluation.metric", metric, DIRECTIONS)
            of_text = metric in TextTask.quick_scores
        else:
            losses = ("loss", "perplexity") if task.kind == "text" else ("loss",)
            choices = (*losses, *task.quick_scores)
            if metric in task.scores and metric not in task.quick_scores:
                raise ConfigurationError(
                    f"evaluation.metric is {metric}, which training does not compute; choose one of "
                    f"{', '.join(choices)}."
                )
            require_choice(f"for task {self.data.task}, evaluation.metric", metric, choices)
            if samples and not (task.kind == "text" and task.scores):
                raise ConfigurationError(
                    f"evaluation.samples is {samples}, but task {self.data.task} has no prompts to answer; set it to 0."
                )
            if self.label_smoothing and task.kind == "regression":
                raise ConfigurationError(
                    "label_smoothing is for classes and tokens, and regression has neither; set it to 0."
                )
            of_text = task.kind == "text" and metric in task.quick_scores
        if of_text and not samples:
            raise ConfigurationError(
                f"evaluation.metric is {metric}, which scores generated samples, but evaluation.samples is 0. "
                "Set evaluation.samples, for example to 100."
            )

    def _check_method(self) -> None:
        names = self.method_names
        custom = [name for name in names if name not in SECTIONS]
        for name in names:
            if name not in SECTIONS and not is_user_method(name):
                raise ConfigurationError(
                    f"method is {self.method!r}; it must be one of {', '.join(SECTIONS)}, several joined by a "
                    f"plus, or your own class in a file, path/to/file.py:Class.{nearest(name, SECTIONS)}"
                )
            if names.count(name) > 1:
                raise ConfigurationError(f"method is {self.method!r}, which names {name} twice.")
        sections = {name: getattr(self, name) for name in SECTIONS}
        changed = [name for name, section in sections.items() if section != type(section)()]
        for name in changed:
            if name not in names:
                raise ConfigurationError(
                    f"method is {self.method}, but the section {name} has settings that differ from their defaults "
                    f"and would have no effect. Set method to {name}, or remove the section."
                )
        if "lora" not in names and self.optimizer.lr_ratio != 1:
            raise ConfigurationError(
                f"optimizer.lr_ratio is {self.optimizer.lr_ratio}, which applies only to lora; with method "
                f"{self.method} set it to 1."
            )
        if self.method_settings and len(custom) != 1:
            raise ConfigurationError(
                f"method_settings apply to one method of your own, but {self.method} names {len(custom)}. Remove "
                "method_settings, or set defaults in the class."
            )
        # With from_adapter, a custom method only gives the location of its class.
        built_in = [name for name in names if name in SECTIONS]
        if self.from_adapter is not None and (built_in not in ([], ["lora"]) or changed):
            raise ConfigurationError(
                "from_adapter brings its own method and settings; remove method and the sections of methods "
                f"({', '.join(SECTIONS)})."
            )
        _ = self.chosen_method  # reports methods that exclude each other

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of the combined methods."""
        return tuple(self.method.split("+"))

    @property
    def chosen_method(self) -> Method:
        """The configured method, with the settings of its section."""
        chosen = tuple(
            getattr(self, name) if name in SECTIONS else user_method(name, self.method_settings)
            for name in self.method_names
        )
        return chosen[0] if len(chosen) == 1 else Combined(methods=chosen)

    @property
    def validates(self) -> bool:
        """Whether the run has validation data."""
        return self.data.source("validation") is not None

    @property
    def peak_rate(self) -> float:
        """The peak learning rate: as set, or the default of the method."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return default_rate(self.chosen_method)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as dicts, lists and scalars, for YAML and JSON."""
        return as_dict(self)
