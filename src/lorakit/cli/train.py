"""`lorakit train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.training.config import TrainConfig
    from lorakit.training.run_folder import RunResult


def run(argv: Sequence[str]) -> None:
    """Train as the configuration says and print where the result lies."""
    from lorakit.cli.parsing import parse, take_option
    from lorakit.cli.report import write_run_report
    from lorakit.formatting import duration, gigabytes
    from lorakit.training.config import TrainConfig
    from lorakit.training.loop import train

    recipe, rest = take_option(argv, "--recipe")
    config = parse(
        TrainConfig,
        "train",
        "Train an adapter on your data: base, data, method and schedule in one configuration. "
        "The run folder holds the resolved configuration, metrics, checkpoints and the adapter. "
        "--recipe NAME starts from the paper's settings ('lorakit recipes' lists them), which the other options "
        "override.",
        rest,
        defaults=_recipe(recipe, rest) if recipe else None,
        typed_only="--recipe",
    )
    result = train(config)
    early = ", stopped early" if result.stopped_early else ""
    print(
        f"\n{result.steps:,} steps in {duration(result.seconds)} ({result.tokens:,} tokens, "
        f"{result.tokens / max(result.seconds, 1e-9):,.0f} a second), peak memory "
        f"{gigabytes(result.peak_memory)}{early}"
    )
    planned, predicted = _planned(config, result)
    print(planned)
    for name, value in result.scores.items():
        before = result.scores_before.get(name)
        print(f"  {name:<12} {'' if before is None else f'{before:.4f} -> '}{value:.4f}")
    print(f"adapter  {result.adapter}")
    if result.best is not None and result.best_step != result.steps:
        print(f"best     {result.best} (step {result.best_step})")
    print(f"report   {write_run_report(result.folder, predicted=predicted)}")
    print(f"next     {_next(config, result)}")


def _next(config: TrainConfig, result: RunResult) -> str:
    """The command that shows the adapter; it has to be told where the class of one's own method is."""
    from lorakit.methods.registry import is_own

    own = [name for name in config.method_names if is_own(name)]
    option = ["--method", own[0]] if own else []
    return shlex.join(["lorakit", "inspect", str(result.adapter), *option])


def _planned(config: TrainConfig, result: RunResult) -> tuple[str, dict[str, float] | None]:
    """What `lorakit plan` says of the run, to be printed and for its report; None where it says nothing."""
    from lorakit.formatting import gigabytes
    from lorakit.planning import plan

    try:
        found = plan(config, compare=False)
    except Exception as error:  # a run that is finished does not fail for a prediction
        return f"planned  nothing: {' '.join(str(error).split())}", None
    tokens = found.tokens / found.chosen.seconds
    line = (
        f"planned  {tokens:,.0f} tokens a second, peak memory {gigabytes(found.process_peak)} "
        f"('lorakit plan' shows its parts)"
    )
    return line, {
        "seconds": found.chosen.seconds * result.steps,
        "tokens_per_second": tokens,
        "peak_memory": found.process_peak,
        "adapter_bytes": found.chosen.file_bytes,
    }


def _recipe(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a recipe; an adapter to start from brings its own method."""
    from lorakit.paper.recipes import recipe

    found = recipe(name)
    from_adapter = any(word.split("=")[0] == "--from_adapter" for word in argv)
    return found.starting_from_adapter() if from_adapter else found.settings
