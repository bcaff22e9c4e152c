"""The eight GLUE tasks (Wang et al. 2018) of the LoRA paper's Table 2.

Labels are names in the order of the official indices; a file may contain names or indices. Only MRPC's test set has
public labels, so scores are those of the development sets, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lorakit import metrics
from lorakit.tasks.classification import Classification, Labelled, Regression, targets
from lorakit.tasks.task import DataSet, Groups, Task


class _Glue(Labelled):
    """Base class of the GLUE tasks: GLUE's scores on the development set."""

    scored_split = "validation"
    parts: ClassVar[tuple[str, ...]] = ()
    """Suffixes of several development sets, as in `validation_matched`. Each is also scored separately."""

    def __init_subclass__(cls, texts: tuple[str, ...] = (), **splits: tuple[str, ...]) -> None:
        """Set the attributes that follow from the task's name and its text columns."""
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
            hub=f"nyu-mll/glue:{cls.name}",
            **{"train": ("train", "train_subset"), "test": (), **splits},
        )

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return GLUE's scores, :func:`lorakit.metrics.glue`; for several development sets also those of each."""
        scores = metrics.glue(cls.name, outputs, targets(examples))
        for part in cls.parts:
            chosen = [i for i, (e,) in enumerate(examples) if e.split == f"validation_{part}"]
            if 0 < len(chosen) < len(examples):
                labels = targets([examples[i] for i in chosen])
                part_scores = metrics.glue(cls.name, [outputs[i] for i in chosen], labels)
                scores |= {f"{name} {part}": value for name, value in part_scores.items()}
        return scores


class CoLA(_Glue, Classification, texts=("sentence",)):
    """Whether a sentence is acceptable English. Score: the Matthews correlation."""

    name = "cola"
    classes = ("unacceptable", "acceptable")


class SST2(_Glue, Classification, texts=("sentence",)):
    """Whether a sentence of a film review is positive. Score: accuracy."""

    name = "sst2"
    classes = ("negative", "positive")


class MRPC(_Glue, Classification, texts=("sentence1", "sentence2"), test=("test",)):
    """Whether two sentences have the same meaning. Scores: accuracy and F1."""

    name = "mrpc"
    classes = ("not_equivalent", "equivalent")


class STSB(_Glue, Regression, texts=("sentence1", "sentence2")):
    """Similarity in meaning of two sentences, from 0 to 5. Scores: Pearson's and Spearman's correlation."""

    name = "stsb"
    targets = ("label",)


class QQP(
    _Glue,
    Classification,
    texts=("question1", "question2"),
    validation=("validation", "heldout_from_train"),
):
    """Whether two questions have the same meaning. Scores: accuracy and F1."""

    name = "qqp"
    classes = ("not_duplicate", "duplicate")


class MNLI(
    _Glue,
    Classification,
    texts=("premise", "hypothesis"),
    validation=("validation_matched+validation_mismatched", "validation_matched"),
):
    """Whether a premise entails a hypothesis, is neutral to it or contradicts it. Score: accuracy.

    Two development sets are scored as one, as in the paper's Table 2: matched (genres of the training set) and
    mismatched (other genres). `validation_split: validation_matched` scores only the first.
    """

    name = "mnli"
    classes = ("entailment", "neutral", "contradiction")
    parts = ("matched", "mismatched")


class QNLI(_Glue, Classification, texts=("question", "sentence")):
    """Whether a sentence answers a question. Score: accuracy."""

    name = "qnli"
    classes = ("entailment", "not_entailment")


class RTE(_Glue, Classification, texts=("sentence1", "sentence2")):
    """Whether the first sentence entails the second. Score: accuracy."""

    name = "rte"
    classes = ("entailment", "not_entailment")


GLUE: tuple[type[Task], ...] = (CoLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE)
