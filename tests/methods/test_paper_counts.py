"""Parameter counts of the paper's baselines: the rows of its tables that the formulas agree with."""

import pytest
from paper_models import paper_model

from lorakit import BitFit, count_parameters

HEAD = 592_899  # RoBERTa-base's classification head with 3 labels

ROWS = [
    # A GPT-2 block has 11 d biases, a RoBERTa block too; beside them stand one norm of width d.
    ("roberta-base, 3 labels", BitFit(), 102_144),
    ("roberta-base, 3 labels", BitFit(train_modules="classifier"), 102_144 + HEAD),
    ("gpt3-175b", BitFit(), 12_988_416),
]


@pytest.mark.parametrize(("model", "method", "trainable"), ROWS, ids=str)
def test_counts_of_the_paper(model, method, trainable):
    counts = count_parameters(paper_model(model), method)
    assert counts.trainable == trainable
    assert sum(counts.by_layer.values()) == trainable
