"""`lorakit demo`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath, changed
from lorakit.errors import RunFolderError, require_at_least
from lorakit.file_names import CONFIG
from lorakit.formatting import shell_command
from lorakit.methods.lora import LoRA
from lorakit.models.base_config import BaseConfig

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.data import DataConfig, ExampleSet
    from lorakit.evaluation.evaluate import Evaluation
    from lorakit.models.loading import Base
    from lorakit.reporting.run_record import RunRecord
    from lorakit.training.config import TrainConfig

EXAMPLE = "# shutil\ndef copy_tree(source, target, overwrite=False):\n"
"""A prompt in the form of the training data."""

SHOWN = 3
"""Number of test examples to print side by side."""


@dataclass(frozen=True)
class Size:
    """How much a demo trains and scores."""

    max_steps: int
    test_loss: int
    test_texts: int

    def seconds(self, per_step: float) -> float:
        """Return the expected time of a whole demo, where a training step takes `per_step` seconds.

        Scoring an example before and after training takes as long as 0.08 steps; generating a text twice 0.16 steps;
        the validation in training 0.03 steps per test example. The measurement and the check of the merge take 12
        steps. The ratios and the constant are estimates for a CPU.
        """
        scoring = 0.11 * self.test_loss + 0.16 * self.test_texts
        return 30 + per_step * (self.max_steps + scoring + 12)


SIZES = (
    Size(12, 32, 12),
    Size(20, 32, 12),
    Size(30, 48, 12),
    Size(45, 64, 24),
    Size(60, 96, 24),
    Size(90, 144, 36),
    Size(120, 200, 48),
    Size(180, 200, 48),
    Size(240, 200, 48),
    Size(360, 200, 48),
    Size(480, 200, 48),
)
"""The sizes to choose from. They are fixed, so that machines of similar speed run the same demo. The largest is about
three epochs, as in `lorakit train`."""

SECONDS = 200.0
"""Limit on the expected time of a demo, a sixth below four minutes because the estimate has an error."""


def size_for(per_step: float) -> Size:
    """Return the largest size that takes at most `SECONDS`, or the smallest one."""
    fitting = [size for size in SIZES if size.seconds(per_step) <= SECONDS]
    return fitting[-1] if fitting else SIZES[0]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `lorakit demo`."""

    base: BaseConfig = field(default_factory=lambda: BaseConfig(name="smollm2-135m"))
    """The base model."""
    output: LocalPath = "out/demo"
    """Run folder. Replaces an earlier demo in it."""
    max_steps: int | None = None
    """Optimizer steps, 16 examples each. By default 12 to 480, so that the demo takes two to four minutes."""
    lora: LoRA = field(default_factory=lambda: LoRA(rank=8, alpha=16, targets="all-linear"))
    """The adapter."""
    test_loss: int | None = None
    """Number of test examples for the held-out loss. By default 32 to 200, chosen with the steps."""
    test_texts: int | None = None
    """Number of test prompts to generate and score text for. By default 12 to 48, chosen with the steps."""
    open: bool = False
    """Serve the adapter at the end, and open the playground in the default browser. Ctrl-C ends the server."""

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("test_loss", 1), ("test_texts", SHOWN)):
            require_at_least(name, getattr(self, name), least)


CONFIGS = (DemoConfig,)


def run(argv: Sequence[str]) -> int:
    """Score a base, adapt it, score it again, merge it, and print the next commands to try. Then serve it if asked."""
    config = parse(
        DemoConfig,
        "demo",
        "Train a LoRA adapter that turns the signature of a Python function into a one-line summary. The data are "
        "the docstrings of the standard library. Prints scores and texts before and after, then merges the adapter.",
        argv,
    )
    if not config.open:
        _demonstrate(config)
        return 0
    from lorakit.cli import serve

    serve.require_packages()  # before minutes of training
    _demonstrate(config)
    sys.stdout.flush()
    command = [sys.executable, "-m", "lorakit", "serve", *_serving(config)]
    if sys.platform == "win32":  # its exec quotes no argument and returns to the shell at once
        return subprocess.run(command).returncode
    # Serving replaces this process: no memory of the demo stays, and the engine has the only computing threads.
    os.execv(sys.executable, command)


def _serving(config: DemoConfig) -> list[str]:
    """Return the arguments of `lorakit serve` for the adapter of a demo, on a free port."""
    base = [
        text
        for name, value in changed(config.base).items()
        for text in (f"--base.{name}", str(value))
    ]
    served = ["--follow", f"demo={config.output}", "--port", "0"]
    return [*base, *served, "--open", "true", "--prompt", EXAMPLE]


def _demonstrate(config: DemoConfig) -> None:
    from lorakit.adapters.loading import load
    from lorakit.cli.console import console as standard_output
    from lorakit.cli.report import write_run_report
    from lorakit.compute.adapted import TEXT
    from lorakit.compute.base import open_base
    from lorakit.data import DataConfig, load_examples
    from lorakit.formatting import duration
    from lorakit.reporting.run_record import read_run
    from lorakit.training.loop import train

    _require_demo_folder(Path(config.output))
    console = standard_output()
    began = time.monotonic()
    data = DataConfig(
        train="docstrings",
        validation="docstrings",
        test="docstrings",
        too_long="skip",
        max_length=160,
    )
    base = open_base(config.base, TEXT)
    test = load_examples(data, "test", base.text_tokenizer)
    console.print("[bold]1. The base[/bold]", end="  ")
    console.print(f"{base.source.name}. {base.source.note}", markup=False)
    console.print(
        f"Task: summarise a function of the standard library from its signature. The test set has "
        f"{len(test):,} functions from modules that are not in the training set."
    )
    size = _size(console, config, data, base)
    before = _score(base, test, size)

    console.print("\n[bold]2. Training[/bold]")
    result = train(_training(config, data, size))

    console.print("\n[bold]3. Before and after[/bold], on the test modules")
    adapters = load(base.model, result.adapter, name="demo")
    after = _score(base, test, size)
    _print_scores(console, before, after)
    _print_examples(console, before, after)
    _print_sizes(console, read_run(result.folder))
    adapters.detach()

    console.print("\n[bold]4. Merging[/bold]")
    _verify_merge(console, config, result.adapter, test)
    page = write_run_report(result.folder)
    console.print(f"\nReport of the run: {page}", soft_wrap=True, markup=False)
    console.print(f"Done in {duration(time.monotonic() - began)}. Next:")
    for command, purpose in _next_commands(config, result.adapter):
        console.print(f"  {command}", soft_wrap=True, markup=False)
        console.print(f"      {purpose}", style="dim", soft_wrap=True)


def _require_demo_folder(output: Path) -> None:
    """Reject a folder that holds a run other than a demo."""
    from lorakit.configuration import setting
    from lorakit.training.run_folder import read_settings

    if (output / CONFIG).exists() and setting(read_settings(output), "data.train") != "docstrings":
        raise RunFolderError(
            f"'{output}' contains a run that is not a demo. Choose another --output."
        )


def _size(console: Console, config: DemoConfig, data: DataConfig, base: Base) -> Size:
    """Return the options' size, with the missing ones chosen by the measured speed of the machine."""
    from lorakit.compute.adapted import TEXT
    from lorakit.data import load_examples
    from lorakit.formatting import duration, short_duration
    from lorakit.training.probe import seconds_per_step

    set_by_user = {
        f.name: value for f in fields(Size) if (value := getattr(config, f.name)) is not None
    }
    if len(set_by_user) == len(fields(Size)):
        return Size(**set_by_user)
    train = load_examples(data, "train", base.text_tokenizer)
    per_step = seconds_per_step(_training(config, data, SIZES[-1]), TEXT, base, train)
    size = replace(size_for(per_step), **set_by_user)
    console.print(
        f"A training step takes {short_duration(per_step)} on this machine, so the demo trains {size.max_steps} steps "
        f"and scores {size.test_loss} examples and {size.test_texts} texts. It takes about "
        f"{duration(size.seconds(per_step))}."
    )
    return size


def _training(config: DemoConfig, data: DataConfig, size: Size) -> TrainConfig:
    from lorakit.training.config import HeldOutConfig, OptimizerConfig, TrainConfig

    return TrainConfig(
        base=config.base,
        data=data,
        output=config.output,
        overwrite=True,
        lora=config.lora,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=HeldOutConfig(limit=max(1, size.test_loss // 2)),
        max_steps=size.max_steps,
    )


def _score(base: Base, test: ExampleSet, size: Size) -> Evaluation:
    """Return the held-out loss, and the texts of greedy generation with their scores."""
    from lorakit.compute.adapted import TEXT
    from lorakit.compute.batch_size import BatchSize
    from lorakit.compute.batching import collator
    from lorakit.compute.computation import objective_for
    from lorakit.evaluation.decoding import Decoding
    from lorakit.evaluation.evaluate import Evaluation, generated, held_out

    objective = objective_for(base, TEXT, test.examples)
    loss = held_out(
        base.model,
        objective,
        test.examples[: size.test_loss],
        collator(base),
        batch_size=BatchSize(16),
        task=TEXT.type,
    )
    decoding = Decoding(max_new_tokens=32, batch_size=24)
    text = generated(base, test.examples[: size.test_texts], decoding)
    return Evaluation(scores={**loss.scores, **text.scores}, outputs=text.outputs)


def _print_scores(console: Console, before: Evaluation, after: Evaluation) -> None:
    from lorakit.cli.console import table
    from lorakit.formatting import number

    names = {
        "loss": "loss per token",
        "perplexity": "perplexity",
        "bleu": "BLEU",
        "rouge_l": "ROUGE-L",
    }
    rows = [
        (name, number(before.scores[key]), number(after.scores[key])) for key, name in names.items()
    ]
    console.print(table(("", "before", "after"), rows))


def _print_examples(console: Console, before: Evaluation, after: Evaluation) -> None:
    for old, new in list(zip(before.outputs, after.outputs, strict=True))[:SHOWN]:
        console.print(f"\n{old['prompt'].strip()}", style="cyan", markup=False)
        for label, text in (
            ("before", old["output"]),
            ("after", new["output"]),
            ("library", old["references"][0]),
        ):
            line = " ".join(text.split()) or "(nothing)"
            console.print(f"  [bold]{label:<8}[/bold]", end="")
            console.print(line if len(line) < 160 else line[:157] + "...", markup=False)


def _print_sizes(console: Console, run: RunRecord) -> None:
    from lorakit.formatting import size

    small, large = run.adapter_bytes, run.sizes["base_bytes"]
    assert small is not None  # training has just written it
    console.print(
        f"\nThe adapter is {size(small)}; the base is {size(large)}, {large / small:.0f} times as large, and unchanged."
    )


def _verify_merge(console: Console, config: DemoConfig, adapter: Path, test: ExampleSet) -> None:
    """Compare texts and logits before and after merging, in float32, where rounding is smallest."""
    import torch

    from lorakit.adapters.loading import load
    from lorakit.compute.adapted import TEXT
    from lorakit.compute.base import open_base
    from lorakit.evaluation.decoding import Decoding
    from lorakit.evaluation.generate import generate
    from lorakit.tasks import LanguageExample

    in_float32 = replace(config.base, dtype="float32")
    base = open_base(in_float32, TEXT)
    adapters = load(base.model, adapter, name="demo")
    prompts = [e.prompt_ids for e in test.examples[:8] if isinstance(e, LanguageExample)]
    decoding = Decoding(max_new_tokens=24, batch_size=8)

    def run_model() -> tuple[list[str], torch.Tensor]:
        with torch.no_grad():
            logits = base.model(torch.tensor([prompts[0]], device=base.model.device)).logits
        return generate(base.model, base.text_tokenizer, prompts, decoding), logits

    texts, logits = run_model()
    adapters.merge()
    merged_texts, merged_logits = run_model()
    same = sum(a == b for a, b in zip(texts, merged_texts, strict=True))
    difference = (logits - merged_logits).abs().max().item()
    console.print(
        f"Merged in float32: same text for {same} of {len(texts)} prompts, largest logit difference "
        f"{difference:.1e}."
    )
    adapters.detach()
    fresh = open_base(in_float32, TEXT).model.state_dict()
    identical = all(
        torch.equal(fresh[key], value) for key, value in base.model.state_dict().items()
    )
    console.print(f"After detach, the base weights are bit-identical to the original: {identical}.")


def _next_commands(config: DemoConfig, adapter: Path) -> list[tuple[str, str]]:
    """Return commands with their purposes."""
    prompt = "$'" + EXAMPLE.replace("\n", r"\n") + "'"
    if sys.platform == "win32":  # cmd.exe cannot write a line break
        prompt = shell_command([EXAMPLE.splitlines()[-1]])
    path, base = str(adapter), ["--base.name", config.base.name]
    return [
        (
            f"{_command('generate', '--adapter', path)} --prompt {prompt}",
            "summarise one of your own functions",
        ),
        (_command("inspect", path), "show the contents of the adapter"),
        (
            _command("merge", path, f"{config.output}/merged"),
            "save an ordinary model folder that any tool loads",
        ),
        (
            _command("data", *base, "--data.train", "docstrings"),
            "show the training examples, token by token",
        ),
        (
            _command("train", *base, "--data.train", "yours.jsonl", "--output", "out/mine"),
            "train on your own data: rows with prompt and completion, or chat messages",
        ),
    ]


def _command(*words: str) -> str:
    return shell_command(["lorakit", *words])
