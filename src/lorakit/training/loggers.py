"""Loggers of a run: always metrics.jsonl; TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import storage
from lorakit.errors import ConfigurationError
from lorakit.file_names import TENSORBOARD
from lorakit.training.checkpoint import State
from lorakit.training.distributed import Processes
from lorakit.training.run_folder import RunFolder
from lorakit.training.step import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)


def require_loggers(names: Iterable[str]) -> None:
    """Import the packages of the loggers `names` and log in, before a run changes its folder.

    Raises:
        ConfigurationError: One is not installed, or Weights & Biases has no key for its server.
    """
    for name in names:
        try:
            module = "torch.utils.tensorboard" if name == "tensorboard" else name
            package = importlib.import_module(module)
        except ImportError:
            raise ConfigurationError(
                f"loggers has {name}, which is not installed: pip install {name}."
            ) from None
        if name == "wandb":
            with _wandb_errors():
                package.login()  # does nothing if WANDB_MODE is offline or disabled


@contextmanager
def _wandb_errors() -> Iterator[None]:
    """Raise a ConfigurationError for an error of Weights & Biases, whose classes differ between its versions."""
    try:
        yield
    except Exception as error:
        raise ConfigurationError(
            f"loggers has wandb, and Weights & Biases does not start: {error}. Run wandb login, set WANDB_MODE to "
            "offline, or leave out wandb."
        ) from error


class Loggers:
    """All loggers of a run; leaving the context closes them. Only the first process of a run logs."""

    def __init__(self, run: RunFolder, state: State, processes: Processes) -> None:
        self._metrics = run.metrics
        self._logs = processes.is_first
        self._run, self._first = run, state.step
        self._loggers: list[TensorBoard | WeightsAndBiases] = []

    def __enter__(self) -> Loggers:
        with ExitStack() as opened:
            opened.push(self)  # if one cannot be opened, those before it are closed
            for name in self._run.config.loggers if self._logs else ():
                self._loggers.append(
                    TensorBoard(self._run.path, after=self._first)
                    if name == "tensorboard"
                    else WeightsAndBiases(self._run.path, self._run.config.as_dict())
                )
            opened.pop_all()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        for logger in self._loggers:
            # An error here would replace the one that ends the run, or prevent a finished run from saving its adapter.
            try:
                logger.close(failed=error_type is not None)
            except Exception as error:
                _LOG.warning(
                    "%s may lack the last numbers, which metrics.jsonl has: it did not close (%s).",
                    type(logger).__name__,
                    error,
                )

    def restart(self, state: State) -> None:
        """Continue from `state`, to which the run went back."""
        for logger in self._loggers:
            logger.restart(after=state.step)

    def step(self, state: State, done: StepResult) -> None:
        """Record a finished step: mean loss, learning rate, gradient norm and totals so far."""
        self._log(
            state.step,
            "train",
            {
                "loss": done.loss,
                "learning_rate": done.rate,
                "gradient_norm": done.norm,
                "tokens": state.tokens,
                "computed_tokens": state.computed_tokens,
                "seconds": round(state.seconds, 3),
            },
        )

    def scores(self, state: State) -> None:
        """Record the latest validation scores."""
        self._log(state.step, "validation", state.scores)

    def _log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if not self._logs:
            return
        self._metrics.append(step=step, split=split, **values)
        for logger in self._loggers:
            logger.log(step, split, values)


class TensorBoard:
    """Logger that writes event files to tensorboard/ in the run folder."""

    def __init__(self, folder: Path, *, after: int) -> None:
        self._folder = str(folder / TENSORBOARD)
        self._writer = self._opened(after)

    def _opened(self, after: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        with storage.writing(self._folder):
            # purge_step hides the later steps, which an interrupted or diverged session logged.
            return SummaryWriter(self._folder, purge_step=after + 1)

    def restart(self, *, after: int) -> None:
        """Continue after this step."""
        self.close()
        self._writer = self._opened(after)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log each value as ``split/name``."""
        with storage.writing(self._folder):  # raises the errors of a thread that writes
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close."""
        with storage.writing(self._folder):
            self._writer.close()


class WeightsAndBiases:
    """Logger to a Weights & Biases run named after the run folder; environment variables set its project.

    The step is a metric and the horizontal axis of all others. Weights & Biases drops repeated steps of its own count.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]

        with _wandb_errors():
            self._run = wandb.init(name=folder.name, dir=str(folder), config=dict(config))
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        self._has_failed = False

    def restart(self, *, after: int) -> None:
        """Do nothing: the chart shows the steps that are repeated, and those before."""

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log each value as ``split/name``. After an error, which is logged once, the run goes on without it."""
        if self._has_failed:
            return
        try:
            self._run.log({"step": step, **{f"{split}/{name}": v for name, v in values.items()}})
        except Exception as error:  # such as the end of its service process
            self._has_failed = True
            _LOG.warning(
                "Weights & Biases lacks the numbers from step %d on, which metrics.jsonl has: %s.",
                step,
                error,
            )

    def close(self, *, failed: bool) -> None:
        """Flush and close; a run that failed is marked as such."""
        self._run.finish(exit_code=int(failed))
