"""Score a model on held-out data: its loss, its generated text, its predicted labels."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit import storage
from lorakit.adapters.handle import own_handle
from lorakit.compute.adapted import base_of, open_adapted, tokenizer_of_adapted
from lorakit.compute.adapter_file import AdapterFile, as_recorded, recorded_task
from lorakit.compute.base import check_context, is_encoder_decoder
from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import Collate, collator
from lorakit.compute.computation import objective_for
from lorakit.compute.finite import why_not_finite
from lorakit.compute.objective import LabelLoss, Objective
from lorakit.data import DataTask, RowReader, load_examples, task_of
from lorakit.data.columns import ColumnMap
from lorakit.data.examples import evenly_spaced
from lorakit.errors import (
    ConfigurationError,
    DataError,
    DivergenceError,
    LorakitError,
    RunFolderError,
)
from lorakit.evaluation.computed import ALONE, Progress, Workers, computed, logits_of
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.evaluation.generate import generate
from lorakit.evaluation.inputs import by_prompt, prompts_of
from lorakit.evaluation.scoring_config import ScoredSplit
from lorakit.formatting import counted, number
from lorakit.models.loading import Base
from lorakit.tasks import Completion, Example, Labelled, LanguageExample, Task, generic_task
from lorakit.tasks.classification import targets
from lorakit.tasks.task import Groups

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores by name, and a record of each example."""

    scores: dict[str, float] = field(default_factory=dict)
    """Scores by the names in `lorakit.evaluation.score.DIRECTIONS`, or those of a named task."""
    base_scores: dict[str, float] = field(default_factory=dict)
    """The same scores of the base without its adapter; empty if they were not computed."""
    examples: int = 0
    """Number of scored examples."""
    cut: int = 0
    """Number of generated texts that were cut at the maximum number of new tokens."""
    split: ScoredSplit = "test"
    """Scored split of the data."""
    sha256: str = ""
    """Digest of the data in this split."""
    f1_class: str = ""
    """Name of the class whose F1 is the score `f1`; "" unless lorakit computed it for two named classes."""
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """One record per prompt or example: prompt, output, references or label, the special tokens in the prompt, and
    the names of classes."""

    def write_outputs(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the records to a .jsonl file, whole or not at all.

        Raises:
            RunFolderError: The file cannot be written. Or it exists and `overwrite` is false: then the records are in
                the file beside it that the message names.
        """
        storage.write_rows(path, self.outputs, overwrite=overwrite)


def evaluate(config: EvaluateConfig, *, progress: Progress | None = None) -> Evaluation:
    """Score a base model, with or without an adapter, on held-out data.

    Args:
        config: What to score.
        progress: Called after each batch with what is done, how many are done and their total: ("examples scored",
            32, 600), ("prompts answered by the base", 16, 40).

    Raises:
        LorakitError: There is no data, or the base, the adapter or the data cannot be read, or do not fit each other,
            or the output file exists. If it cannot be written, the error has the scores.
    """
    if config.output is not None:
        storage.require_free_file(config.output, overwrite=config.overwrite)
    result = evaluate_adapter(config, AdapterFile.read(config.adapter), progress=progress)
    if config.output is not None:
        try:
            result.write_outputs(config.output, overwrite=config.overwrite)
        except RunFolderError as error:
            # The disk may be full after hours of work: show the scores in the error.
            raise RunFolderError(*error.args, *_score_lines(result)) from error
    return result


def evaluate_adapter(
    config: EvaluateConfig, adapter: AdapterFile | None, *, progress: Progress | None = None
) -> Evaluation:
    """Score a base model with an adapter that has been read; None scores the base alone.

    The adapter replaces that of `config.adapter`, and `config.output` is not written. Loading completes
    `adapter.stored` in place; pass a copy to keep it.

    Raises:
        LorakitError: As for `evaluate`.
    """
    data = _read(config, adapter)
    task = data.task
    base = open_adapted(
        config.base,
        adapter,
        task=task,
        allow_other_base=config.allow_other_base,
        tokenizer=data.tokenizer,
    )
    check_context(base, data.examples)
    decoding = (config.decoding or Decoding()).over(task.type.decoding)
    if "text" in config.scores and task.has_references:  # an error must not come after the losses
        prompts_of(base, by_prompt(data.examples), decoding.new_tokens)
    score = functools.partial(_score, config, base, task, data.examples, decoding)
    progress = (lambda *_: None) if progress is None else progress
    result = score(progress=progress)
    if result.cut:
        _LOG.warning(
            "decoding.max_new_tokens (%s) cut %s of %s, which lowers their scores. Raise it if the references are "
            "longer.",
            decoding.new_tokens,
            result.cut,
            counted(len(result.outputs), "answer"),
        )
    if config.compare and adapter is not None and task.generates:
        handle = own_handle(base.model)
        assert handle is not None
        handle.activate(None)
        compared = score(progress=lambda what, *counts: progress(f"{what} by the base", *counts))
        result = dataclasses.replace(result, base_scores=compared.scores)
    return dataclasses.replace(result, split=data.split, sha256=data.sha256)


def check_evaluation(config: EvaluateConfig, adapter: AdapterFile | None = None) -> None:
    """Read what `evaluate` scores with an adapter, without the model: hours of training may come before the scores.

    Raises:
        LorakitError: There is no data, it cannot be read, or a package of the scores is missing.
    """
    for note in config.data.template_notes:
        _LOG.warning(note)
    _read(config, adapter)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ScoredData:
    """What an evaluation scores."""

    task: DataTask
    split: ScoredSplit
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """Digest of the split's whole content."""
    examples: Sequence[Example]
    """The scored examples, in the order of their prompts if text is generated."""


def _read(config: EvaluateConfig, adapter: AdapterFile | None) -> _ScoredData:
    """Read the examples, and check that the task can score them."""
    reader = RowReader()
    task = _task(config, adapter, reader)
    if "loss" not in config.scores and task.generates and not task.has_references:
        raise ConfigurationError(
            f"scores is text, but task {task.name} has no references for generated text; set scores to loss."
        )
    data = dataclasses.replace(config.data, task=task.name)
    split = config.scored_split(data)
    rows = reader.read(data, split)
    data = as_recorded(data, adapter, rows.columns)
    if adapter is not None and issubclass(task.type, Labelled):
        _require_labels(ColumnMap(data, rows.columns, rows.name), task.type, adapter.path)
    tokenizer = tokenizer_of_adapted(config.base, adapter)
    loaded = load_examples(
        data,
        split,
        tokenizer,
        labels=task.labels,
        reader=reader,
        is_encoder_decoder=is_encoder_decoder(base_of(config.base, adapter)),
    )
    groups: Groups = by_prompt(loaded) if task.has_references else [[e] for e in loaded]
    groups = evenly_spaced(groups, config.limit)
    if "text" in config.scores or not task.has_references:
        task.type.check_scoring(groups)
    return _ScoredData(
        task=task,
        split=split,
        tokenizer=tokenizer,
        sha256=loaded.sha256,
        examples=[example for group in groups for example in group],
    )


def _score_lines(result: Evaluation) -> list[str]:
    return [
        f"{of}: {', '.join(f'{name} {number(score)}' for name, score in scores.items())}"
        for of, scores in (("Scores", result.scores), ("Scores of the base", result.base_scores))
        if scores
    ]


def _score(
    config: EvaluateConfig,
    base: Base,
    task: DataTask,
    examples: Sequence[Example],
    decoding: Decoding,
    *,
    progress: Progress,
) -> Evaluation:
    """Score the model with its active adapter."""
    result = Evaluation()
    if "loss" in config.scores or not task.has_references:
        result = held_out(
            base.model,
            objective_for(base, task, examples),
            examples,
            collator(base),
            batch_size=BatchSize(config.batch_size),
            task=task.type,
            labels=task.labels,
            progress=progress,
        )
    if "text" in config.scores and task.has_references:
        text = generated(
            base,
            examples,
            decoding,
            task=task.type,
            lowercase=config.lowercase,
            progress=progress,
        )
        result = dataclasses.replace(text, scores={**result.scores, **text.scores})
    return dataclasses.replace(result, examples=len(examples))


def held_out(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    collate: Collate,
    *,
    batch_size: BatchSize,
    task: type[Task],
    labels: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    workers: Workers = ALONE,
) -> Evaluation:
    """Return the mean loss over all targets of `examples`, and the scores that need no generation.

    Language modelling adds the perplexity. Labels add the scores of `task`. Records name the classes if `labels` gives
    their names, in index order. The `workers` share the batches.
    """
    scored = computed(
        model,
        objective,
        examples,
        collate,
        batch_size=batch_size,
        progress=progress,
        workers=workers,
    )
    loss = sum(batch.loss for batch in scored) / max(sum(batch.count for batch in scored), 1)
    if not math.isfinite(loss):
        raise DivergenceError(
            f"The held-out loss is {loss}, because the model's output is not finite: {why_not_finite(model)}"
        )
    if not isinstance(objective, LabelLoss):
        return Evaluation(scores={"loss": loss, "perplexity": math.exp(min(loss, 700.0))})
    logits = logits_of(scored)
    classes = logits.shape[-1]
    answers = (logits.argmax(-1) if classes > 1 else logits.squeeze(-1)).tolist()
    groups = [[example] for example in examples]
    scores = _scores(task, answers, groups, classes=classes)
    outputs: list[dict[str, Any]] = [
        {"prompt": example.prompt, "output": answer, "label": label}
        for example, answer, label in zip(examples, answers, targets(groups), strict=True)
    ]
    for record in outputs if labels else ():
        record |= {f"{key}_name": labels[record[key]] for key in ("output", "label")}
    # A task of the user's own may give the name f1 to another score.
    is_ours = "f1" in scores and task.score.__module__.startswith("lorakit.tasks.")
    f1_class = labels[1] if is_ours and len(labels) == 2 else ""
    return Evaluation(scores={"loss": loss, **scores}, outputs=outputs, f1_class=f1_class)


def generated(
    base: Base,
    examples: Sequence[Example],
    decoding: Decoding | None = None,
    *,
    task: type[Task] = Completion,
    quick: bool = False,
    lowercase: bool = True,
    batch_size: BatchSize | None = None,
    progress: Progress = lambda *_: None,
    workers: Workers = ALONE,
) -> Evaluation:
    """Generate once per distinct prompt of `examples` and score against all completions it has there.

    The scores are those of `task`, with `quick` only the cheap ones. `batch_size` overrides that of `decoding`, and
    keeps the number of prompts that fit into memory. The `workers` share the prompts, and each returns all answers.
    """
    groups = by_prompt(examples)
    tokenizer = base.text_tokenizer
    decoding = decoding or Decoding()
    prompts = prompts_of(base, groups, decoding.new_tokens)
    cut: set[int] = set()
    own = generate(
        base.model,
        tokenizer,
        workers.share(prompts),
        decoding,
        batch_size=batch_size,
        progress=lambda done: progress("prompts answered", done, len(prompts)),
        on_cut=cut.add,
        stop_ids=task.stop_ids(tokenizer),
    )
    # A task may end a text itself, at a blank line: then nothing is missing.
    cut = {i for i in cut if task.answer(f"{own[i]} a") != task.answer(own[i])}
    texts, total = [""] * len(prompts), 0
    for rank, (answers_of_one, cut_of_one) in enumerate(workers.gather((own, len(cut)))):
        texts[rank :: workers.count] = answers_of_one
        total += cut_of_one
    added = tokenizer.added_tokens_decoder.values()
    special = [str(token) for token in added if token.special]
    outputs = [
        {
            "prompt": group[0].prompt,
            "output": task.answer(text),
            "references": [task.answer(example.completion) for example in group],
            "special_tokens": [token for token in special if token in group[0].prompt],
            **group[0].gold,
            **_golds(group),
        }
        for text, group in zip(texts, groups, strict=True)
    ]
    answers = [record["output"] for record in outputs]
    scores = _scores(task, answers, groups, quick=quick, lowercase=lowercase)
    return Evaluation(scores=scores, outputs=outputs, cut=total)


def _scores(
    task: type[Task], outputs: Sequence[Any], examples: Groups, **settings: Any
) -> dict[str, float]:
    """Return the scores of a task as numbers of Python: a record cannot hold those of NumPy and torch.

    Reject a score that is not a number.
    """
    scores: dict[str, float] = {}
    for name, score in task.score(outputs, examples, **settings).items():
        try:
            scores[name] = score if isinstance(score, int) else float(score)
        except (TypeError, ValueError):
            raise LorakitError(
                f"The score {name} of task {task.name} is {score!r}; it must be a number. Return one from the task's "
                "score method."
            ) from None
    return scores


def _golds(group: Sequence[LanguageExample]) -> dict[str, Any]:
    """Return `golds` of an input that several rows have, which counts once for each of them (WikiSQL)."""
    rows = {id(e.gold): e.gold for e in group}  # the references of one row share their gold
    return {"golds": [*rows.values()]} if len(rows) > 1 and group[0].gold else {}


def _task(config: EvaluateConfig, adapter: AdapterFile | None, reader: RowReader) -> DataTask:
    """Return the task that the adapter was trained for, whose labels its head has; else the task of the data."""
    configured = config.data.task_type
    named = None if configured is None else config.data.task
    if adapter is None or (recorded := recorded_task(adapter, named)) is None:
        return task_of(config.data, config.scored_split(), reader=reader)
    if configured is None or config.data.task == recorded.name:
        return recorded
    # A named task inherits the format of its generic task, so that one adapter serves both.
    labels = configured.classes or recorded.labels
    if generic_task(configured) is not generic_task(recorded.type) or labels != recorded.labels:
        trained = recorded.name + (f" ({', '.join(recorded.labels)})" if recorded.labels else "")
        of = f" ({', '.join(configured.classes)})" if configured.classes else ""
        raise ConfigurationError(
            f"data.task is {config.data.task}{of}, but the adapter {adapter.path} was trained for {trained}. "
            "Leave data.task out, or name data of that task."
        )
    return DataTask(name=config.data.task, labels=recorded.labels)


def _require_labels(columns: ColumnMap, task: type[Labelled], adapter: str) -> None:
    """Reject rows that have the texts of `task` and no labels; `lorakit predict` reads these."""
    if columns.has_inputs(task) and set(columns.fields).isdisjoint(task.targets):
        target = next(name for name in task.layouts[0] if name in task.targets)
        raise DataError(
            f"{columns.source_name}: its columns are {', '.join(columns.columns)}, without a {target} to compare with. "
            f"Name the column, for example --data.columns.{target} COLUMN. For rows without it, run lorakit predict "
            f"--adapter {adapter} --data.test {columns.source_name} --output predictions.jsonl."
        )
