"""Data-to-text tasks, which express a set of facts as text: E2E NLG, WebNLG 2017 and DART.

The scores are those of the official scorers, which compare an output with all references of its input. An output is
cut at its first blank line, as in the paper's code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lorakit import metrics
from lorakit.tasks.language_modelling import references
from lorakit.tasks.named_text import NamedText
from lorakit.tasks.task import BadRow, DataSet, Fields, Groups, checked_text, json_type, text_field

SLOT = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*")

SEEN = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter"),
    *("Food", "Monument", "SportsTeam", "University", "WrittenWork"),
)
"""Categories of WebNLG's training set. The paper says nine; its code has these ten."""


class DataToText(NamedText):
    """Base class of E2E NLG, WebNLG and DART."""

    official_scores: ClassVar[Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]]
    """Scores of outputs and references by the official definition: a function of `lorakit.metrics`."""

    @classmethod
    def check_scoring(cls, examples: Groups) -> None:
        """Score one word, so that a missing package raises before generation, not after it."""
        metrics.e2e(["word"], [["word"]], java=False)
        metrics.webnlg(["word"], [["word"]], java=False)

    @classmethod
    def answer(cls, text: str) -> str:
        """Return a text up to its first blank line."""
        return re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].strip()

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return the official scores of the task; with `quick`, BLEU and ROUGE-L."""
        if settings.get("quick"):
            return super().score(outputs, examples, **settings)
        return cls.official_scores(outputs, references(cls, examples))


class E2E(DataToText):
    """Describe a restaurant from its meaning representation in one or two sentences (Novikova et al. 2017)."""

    name = "e2e_nlg"
    layouts = (("meaning_representation", "human_reference"),)
    metric = "BLEU"
    scores = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
    official_scores = staticmethod(metrics.e2e)
    # From the paper's table 11; its code has a length penalty of 0.8.
    decoding = {"beams": 10, "length_penalty": 0.9, "no_repeat_ngram": 4, "max_new_tokens": 64}  # noqa: RUF012
    data_set = DataSet(folder="e2e_nlg", hub="tuetschek/e2e_nlg")
    template = (
        "Describe the restaurant in one or two sentences that say all of these facts and nothing else.\n"
        "Facts: {context}\nDescription:"
    )

    def context(self, fields: Fields) -> str:
        """Return `slot : value | slot : value`."""
        column = "meaning_representation"
        text = text_field(fields, column)
        slots = SLOT.findall(text)
        if not slots or SLOT.sub("", text).strip(" ,"):
            raise BadRow(f"is {text!r:.80}, expected slot[value], slot[value], ...", column)
        return " | ".join(f"{slot.strip()} : {value.strip()}" for slot, value in slots)

    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the single reference of the row."""
        return [text_field(fields, "human_reference").strip()]


class Triples(DataToText):
    """Base class of the tasks that express triples of subject, relation and object as text."""

    metric = "BLEU"
    scores = ("BLEU", "METEOR", "TER")
    less_is_better = ("TER",)
    official_scores = staticmethod(metrics.webnlg)
    decoding = {"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "max_new_tokens": 64}  # noqa: RUF012
    template = (
        "Write a text that says all of these facts and nothing else, each given as subject : relation : object.\n"
        "Facts: {context}\nText:"
    )


class WebNLG(Triples):
    """Express DBpedia triples as text (Gardent et al. 2017). Each text marked good is one example.

    The category of a test input occurs in training (seen) or does not (unseen). Scores cover all inputs and each part.
    """

    name = "webnlg"
    layouts = (("modified_triple_sets", "lex"),)
    scores = tuple(
        f"{score}{part}" for part in ("", " seen", " unseen") for score in Triples.scores
    )
    less_is_better = ("TER", "TER seen", "TER unseen")
    data_set = DataSet(
        folder="webnlg",
        hub="webnlg-challenge/web_nlg:webnlg_challenge_2017",
        validation=("dev", "validation"),
    )

    def context(self, fields: Fields) -> str:
        """Return `subject : relation : object | ...` of the modified triples."""
        column = "modified_triple_sets"
        sets = _member(fields, column, "mtriple_set")
        if not isinstance(sets, Sequence) or not sets or not isinstance(sets[0], Sequence):
            raise BadRow("has no list of triples in 'mtriple_set'", column)
        return _joined([_split(triple, column) for triple in sets[0]], column)

    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the texts marked good, possibly none."""
        texts, comments = (_member(fields, "lex", name) for name in ("text", "comment"))
        lists = isinstance(texts, Sequence) and isinstance(comments, Sequence)
        if not lists or len(texts) != len(comments):
            raise BadRow("needs lists 'text' and 'comment' of equal length", "lex")
        return [
            _text(text, "lex").strip()
            for text, comment in zip(texts, comments, strict=True)
            if comment == "good"
        ]

    def gold(self, fields: Fields) -> Mapping[str, Any]:
        """Return the category and whether it is seen or unseen in training."""
        category = str(fields.get("category", ""))
        test_category = fields.get("test_category")
        if test_category not in ("seen", "unseen"):
            test_category = "seen" if category in SEEN else "unseen"
        return {"category": category, "test_category": test_category}

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return BLEU, METEOR and TER of all inputs, and separately of seen and unseen categories."""
        scores = super().score(outputs, examples, **settings)
        if settings.get("quick"):
            return scores
        for part in ("seen", "unseen"):
            chosen = [i for i, g in enumerate(examples) if g[0].gold["test_category"] == part]
            if chosen and len(chosen) < len(examples):
                part_scores = super().score(
                    [outputs[i] for i in chosen], [examples[i] for i in chosen], **settings
                )
                scores |= {_of_part(name, part): value for name, value in part_scores.items()}
        return scores


class DART(Triples):
    """Express triples from tables, WebNLG and E2E as text (Nan et al. 2021). Each text is one example."""

    name = "dart"
    layouts = (("tripleset", "annotations"),)
    data_set = DataSet(folder="dart", hub="Yale-LILY/dart", validation=("validation", "dev"))

    def context(self, fields: Fields) -> str:
        """Return `subject : relation : object | ...` with the relation in lower case, as in the paper's code."""
        column = "tripleset"
        triples = fields.get(column)
        if not isinstance(triples, Sequence) or isinstance(triples, str):
            raise BadRow(f"is {json_type(triples)}, expected a list of triples", column)
        parts = []
        for triple in triples:
            if not isinstance(triple, Sequence) or isinstance(triple, str) or len(triple) != 3:
                raise BadRow(f"has {triple!r:.80}, expected [subject, relation, object]", column)
            subject, relation, thing = (_text(part, column) for part in triple)
            parts.append((subject, relation.lower(), thing))
        return _joined(parts, column)

    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the texts, from the hub's layout (lists by name) or the official file's (a list of objects)."""
        annotations = fields.get("annotations")
        if isinstance(annotations, Mapping):
            texts = annotations.get("text")
        elif isinstance(annotations, Sequence) and not isinstance(annotations, str):
            texts = [a.get("text") if isinstance(a, Mapping) else None for a in annotations]
        else:
            texts = None
        if not isinstance(texts, Sequence) or isinstance(texts, str):
            raise BadRow("needs a list of texts under 'text'", "annotations")
        return [_text(text, "annotations").strip() for text in texts]


def _of_part(name: str, part: str) -> str:
    """Return the name of a score of a part of the inputs: "METEOR seen (without Java)"."""
    suffix = metrics.WITHOUT_JAVA if name.endswith(metrics.WITHOUT_JAVA) else ""
    return f"{name.removesuffix(suffix)} {part}{suffix}"


def _joined(triples: Sequence[Sequence[str]], column: str) -> str:
    if not triples:
        raise BadRow("has no triple", column)
    return " | ".join(" : ".join(triple) for triple in triples)


def _split(triple: object, column: str) -> Sequence[str]:
    """Split `subject | relation | object` into its three parts."""
    parts = [part.strip() for part in _text(triple, column).split(" | ")]
    if len(parts) != 3:
        raise BadRow(f"has {triple!r:.80}, expected 'subject | relation | object'", column)
    return parts


def _member(fields: Fields, column: str, name: str) -> Any:
    value = fields.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"is {json_type(value)}, expected an object with '{name}'", column)
    return value.get(name)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"has {value!r:.80}, expected text", column)
    return checked_text(value, column)


DATA_TO_TEXT: tuple[type[NamedText], ...] = (E2E, WebNLG, DART)
