"""The eight tasks of GLUE (Wang et al. 2018) on which the LoRA paper reports its Table 2.

Labels are names, in the order of the official indices; a file may hold either. The test sets of GLUE have no public
labels, MRPC's excepted, so scores are those of the development sets, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lorakit import metrics
from lorakit.tasks.classification import Classification, Labelled, Regression, targets
from lorakit.tasks.data_set import DataSet
from lorakit.tasks.task import Example, Task

HUB = "nyu-mll/glue"
TRAIN = ("train", "train_subset")


class _Glue(Labelled):
    """What the tasks share: GLUE's own scores, and the development set as what is scored."""

    scored_split = "validation"
    parts: ClassVar[tuple[str, ...]] = ()
    """What tells several development sets apart, as in `validation_matched`: each has scores of its own too."""

    def __init_subclass__(cls, texts: tuple[str, ...] = (), **splits: tuple[str, ...]) -> None:
        """Fill in what follows from a task's name and the columns of its texts."""
        super().__init_subclass__()
        cls.texts = texts
        cls.layouts = ((*texts, "label"),)
        cls.quick_scores = metrics.GLUE[cls.name]
        cls.metric = cls.quick_scores[0]
        cls.scores = tuple(
            f"{s}{p}" for p in ("", *(f" {part}" for part in cls.parts)) for s in cls.quick_scores
        )
        cls.data_set = DataSet(
            folder=cls.name,
            hub=f"{HUB}:{cls.name}",
            **{"train": TRAIN, "test": (), **splits},
        )

    @classmethod
    def score(
        cls, outputs: Sequence[Any], examples: Sequence[Sequence[Example]], **settings: Any
    ) -> dict[str, float]:
        """Return what GLUE reports, :func:`lorakit.metrics.glue`; of several sets scored as one also for each."""
        del settings
        scores = metrics.glue(cls.name, outputs, targets(examples))
        for part in cls.parts:
            chosen = [i for i, (e,) in enumerate(examples) if e.split == f"validation_{part}"]
            if 0 < len(chosen) < len(examples):
                labels = targets([examples[i] for i in chosen])
                found = metrics.glue(cls.name, [outputs[i] for i in chosen], labels)
                scores |= {f"{name} {part}": value for name, value in found.items()}
        return scores


class CoLA(_Glue, Classification, texts=("sentence",)):
    """Whether a sentence is acceptable English; the Matthews correlation."""

    name = "cola"
    classes = ("unacceptable", "acceptable")


class SST2(_Glue, Classification, texts=("sentence",)):
    """Whether a sentence of a film review is positive; accuracy."""

    name = "sst2"
    classes = ("negative", "positive")


class MRPC(_Glue, Classification, texts=("sentence1", "sentence2"), test=("test",)):
    """Whether two sentences say the same; accuracy, and F1."""

    name = "mrpc"
    classes = ("not_equivalent", "equivalent")


class STSB(_Glue, Regression, texts=("sentence1", "sentence2")):
    """How alike two sentences are in meaning, from 0 to 5; Pearson's correlation, and Spearman's."""

    name = "stsb"


class QQP(
    _Glue,
    Classification,
    texts=("question1", "question2"),
    validation=("validation", "heldout_from_train"),
):
    """Whether two questions ask the same; accuracy, and F1."""

    name = "qqp"
    classes = ("not_duplicate", "duplicate")


class MNLI(
    _Glue,
    Classification,
    texts=("premise", "hypothesis"),
    validation=("validation_matched+validation_mismatched", "validation_matched"),
):
    """Whether a premise entails a hypothesis, is neutral to it or contradicts it; accuracy.

    Two development sets are scored as one, as in the paper's Table 2: of matched genres, which training has, and of
    mismatched ones. `validation_split: validation_matched` takes the first alone.
    """

    name = "mnli"
    classes = ("entailment", "neutral", "contradiction")
    parts = ("matched", "mismatched")


class QNLI(_Glue, Classification, texts=("question", "sentence")):
    """Whether a sentence answers a question; accuracy."""

    name = "qnli"
    classes = ("entailment", "not_entailment")


class RTE(_Glue, Classification, texts=("sentence1", "sentence2")):
    """Whether a first sentence entails a second; accuracy."""

    name = "rte"
    classes = ("entailment", "not_entailment")


GLUE: tuple[type[Task], ...] = (CoLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE)
