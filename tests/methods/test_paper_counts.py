"""Parameter counts of the paper's baselines: the rows of its tables that the formulas agree with."""

import pytest
from paper_models import paper_model

from lorakit import BitFit, BottleneckAdapter, count_parameters

HEAD = 592_899  # RoBERTa-base's classification head with 3 labels


def dropped(count: int, **settings) -> BottleneckAdapter:
    return BottleneckAdapter(kind="pfeiffer", drop_layers=tuple(range(count)), **settings)


ROWS = [
    # A GPT-2 block has 11 d biases, a RoBERTa block too; beside them stand one norm of width d.
    ("roberta-base, 3 labels", BitFit(), 102_144),
    ("roberta-base, 3 labels", BitFit(train_modules="classifier"), 102_144 + HEAD),
    ("gpt3-175b", BitFit(), 12_988_416),
    ("gpt2-medium", BottleneckAdapter(kind="lin", size=6), 368_784),
    ("gpt2-medium", BottleneckAdapter(kind="lin", size=224), 11_089_152),
    ("gpt2-large", BottleneckAdapter(kind="lin", size=8), 875_808),
    ("gpt2-large", BottleneckAdapter(kind="lin", size=248), 23_002_848),
    # The paper gives neither size nor dropped layers of AdapterD; these give its counts.
    ("roberta-base, 3 labels", BottleneckAdapter(kind="pfeiffer", size=48), 894_528),
    ("roberta-base, 3 labels", BottleneckAdapter(size=48, drop_layers=tuple(range(6))), 894_528),
    ("roberta-base, 3 labels", BottleneckAdapter(kind="pfeiffer", size=16), 304_320),
    ("roberta-base, 3 labels", dropped(8, size=48), 298_176),
    ("roberta-large, 3 labels", BottleneckAdapter(kind="pfeiffer", size=16), 811_392),
    ("roberta-large, 3 labels", BottleneckAdapter(kind="houlsby", size=8), 835_968),
    ("gpt3-175b", BottleneckAdapter(kind="houlsby", size=1), 7_078_080),
    ("gpt3-175b", BottleneckAdapter(kind="houlsby", size=4), 21_234_432),
    ("gpt3-175b", BottleneckAdapter(kind="houlsby", size=8), 40_109_568),
    ("gpt3-175b", BottleneckAdapter(kind="houlsby", size=16), 77_859_840),
    ("gpt3-175b", BottleneckAdapter(kind="houlsby", size=64), 304_361_472),
]


@pytest.mark.parametrize(("model", "method", "trainable"), ROWS, ids=str)
def test_counts_of_the_paper(model, method, trainable):
    counts = count_parameters(paper_model(model), method)
    assert counts.trainable == trainable
    assert sum(counts.by_layer.values()) == trainable
