from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

from lorakit.errors import DataError
from lorakit.tasks import BadRow, Classification, Regression, TooLong, UnknownLabel

ENCODER = tiny_encoder_tokenizer()
DECODER = tiny_tokenizer()
LONG, SHORT = "The river pub near the park serves cheap English food.", "A pub."


def classify(fields, tokenizer=ENCODER, labels=("no", "yes"), **settings):
    settings = {"max_length": 99} | settings
    return Classification(tokenizer, labels=labels, **settings).encode(fields)


def test_a_pair_is_what_the_tokenizer_makes_of_it():
    example = classify({"sentence1": LONG, "sentence2": SHORT, "label": "yes"})
    expected = ENCODER(LONG, SHORT)
    assert example.input_ids == expected["input_ids"]
    assert example.token_type_ids == expected["token_type_ids"]
    assert set(example.token_type_ids) == {0, 1}
    assert (example.label, example.completion) == (1, "yes")
    assert example.prompt == f"{LONG}\n{SHORT}"


def test_a_tokenizer_without_separator_gets_a_line_feed_between_texts():
    example = classify({"sentence1": LONG, "sentence2": SHORT, "label": "no"}, DECODER)
    assert DECODER.decode(example.input_ids) == f"{LONG}\n{SHORT}"
    assert example.token_type_ids is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_takes_from_the_end_of_the_longer_text(side):
    tokenizer = tiny_encoder_tokenizer()
    tokenizer.truncation_side = side
    fields = {"sentence1": LONG, "sentence2": SHORT, "label": "no"}
    example = classify(fields, tokenizer, max_length=16, truncate=True)
    assert tokenizer.truncation_side == side
    assert example.truncated
    assert len(example) == len(example.token_type_ids) == 16
    kept = ENCODER.decode(example.input_ids)
    assert kept.endswith(f"[SEP]{SHORT}[SEP]")
    assert LONG.startswith(kept.removeprefix("[CLS]").split("[SEP]")[0])
    with pytest.raises(TooLong, match="more than max_length 16"):
        classify({"text": LONG, "label": "no"}, max_length=16)


def test_names_beside_those_that_the_data_set_declares_are_an_error() -> None:
    """Indices of an own file beside the names of a hub data set would be classes of their own."""
    rows = [{"label": label} for label in ("neg", "pos", 0, 1)]
    assert Classification.labels_of(rows[:2], ("pos", "neg")) == ("pos", "neg")
    with pytest.raises(DataError, match=r"labels 0, 1, and its data set declares pos, neg"):
        Classification.labels_of(rows, ("pos", "neg"))
    assert Classification.labels_of([{"label": "sad"}, *rows[:2]], ("pos", "neg")) == (
        "neg",
        "pos",
        "sad",
    )


def test_a_tokenizer_that_fails_keeps_its_truncation_side(monkeypatch):
    tokenizer = tiny_encoder_tokenizer()
    tokenizer.truncation_side = "left"
    call = type(tokenizer).__call__

    def fail(self, *texts, **settings):
        assert "truncation" not in settings, "fails"
        return call(self, *texts, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    with pytest.raises(AssertionError, match="fails"):
        classify({"text": LONG, "label": "no"}, tokenizer, max_length=8, truncate=True)
    assert tokenizer.truncation_side == "left"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 2, 2, 1], ("1", "2", "10")),
        ([1.0, 0.0], ("0", "1")),
        (["1.0", "0.0", "10."], ("0", "1", "10")),
        ([True, False], ("false", "true")),
        (["spam", "ham", " spam "], ("ham", "spam")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([1, None, "", 2.5, 0], ("0", "1")),  # encode() reports invalid labels
    ],
)
def test_labels_are_sorted_by_size_or_alphabet(values, labels):
    assert Classification.labels_of({"label": label} for label in values) == labels


def test_declared_class_names_keep_their_order_and_unseen_classes():
    rows = [{"label": "neutral"}, {"label": "entailment"}]
    known = ("entailment", "neutral", "contradiction")
    assert Classification.labels_of(rows, known) == known


@pytest.mark.parametrize("known", [(), ("neg", "pos")])
@pytest.mark.parametrize("values", [["neg", "neg"], []])
def test_a_single_label_is_rejected(values, known):
    """The first rows of a data set that is sorted by label, of which `data.limit` reads no others."""
    with pytest.raises(DataError, match=r"needs at least two.* raise data\.limit"):
        Classification.labels_of(({"label": label} for label in values), known)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (("dry", "wet"), {"dry": 0, "wet": 1, 0: 0, "1": 1, 2: None}),
        (("1", "2", "3"), {1: 0, 2: 1, "3": 2, 0: None}),
        (("0", "1", "other"), {0: 0, "1": 1, 2: 2, "other": 2}),
    ],
)
def test_a_name_of_a_class_comes_before_its_index(monkeypatch, classes, labels):
    monkeypatch.setattr(Classification, "classes", classes)
    task = Classification(ENCODER, max_length=99, labels=classes)
    for label, index in labels.items():
        fields = {"text": "a", "label": label}
        if index is None:
            with pytest.raises(UnknownLabel, match="does not have; write one of"):
                task.encode(fields)
        else:
            assert task.encode(fields).label == index


def test_an_unknown_label_names_the_known_ones():
    with pytest.raises(UnknownLabel, match=r"'yess'.* its labels are no, yes\. Did you mean 'yes'"):
        classify({"text": "a", "label": "yess"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, "'label' is missing"),
        ({"text": "a", "label": 0.5}, r"'label' is a number \(0.5\), expected a name"),
        ({"text": "a", "label": ["yes"]}, "'label' is a list"),
        ({"text": "a", "label": " "}, "'label' is empty"),
        ({"label": "yes"}, "'text' is missing"),
        ({"text": "", "label": "yes"}, "'text' is empty"),
        ({"sentence1": "a", "label": "yes"}, "'sentence2' is missing"),
        ({"sentence1": "a", "sentence2": 5, "label": "yes"}, "'sentence2' is a number"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(BadRow, match=message):
        classify(fields)


@pytest.mark.parametrize(("value", "score"), [(5.0, 5.0), (3, 3.0), ("3.8", 3.8)])
@pytest.mark.parametrize("column", ["score", "label"])
def test_a_score_is_a_number(column, value, score):
    example = Regression(ENCODER, max_length=99).encode({"text": "a", column: value})
    assert example.label == score
    assert type(example.label) is float


@pytest.mark.parametrize(
    "value", ["high", float("nan"), "inf", True, [1.0], 10**400, 1e39, "1.8e308"]
)
def test_a_score_that_is_no_finite_number_is_refused(value):
    with pytest.raises(BadRow, match=r"'score' is .* expected a (finite )?number"):
        Regression(ENCODER, max_length=99).encode({"text": "a", "score": value})


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([5.0, 3.8], True),
        ([5, 3.8], True),
        (["5.0", "3.8"], True),
        ([0.0, 1.0, float("nan")], False),  # pandas stores integers so if one is missing
        (["0.0", "1.0", "N/A"], False),
        ([1, 0], False),
        (["1", "0"], False),
        (["high", "low"], False),
        ([True, False], False),
    ],
)
def test_labels_with_a_fraction_are_scores(labels, scores):
    rows = [{"text": "a", "label": label} for label in labels]
    assert Regression.reads(["text", "label"], rows) is scores
    assert Classification.reads(["text", "label"], rows) is not scores
