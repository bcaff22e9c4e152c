"""Parameter counts of LoRA and the paper's baselines: the rows of its tables that the formulas agree with."""

import pytest
from paper_models import paper_model

from lorakit import (
    BitFit,
    BottleneckAdapter,
    Combined,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
    count_parameters,
)

HEAD = 592_899  # RoBERTa-base's classification head with 3 labels


def dropped(count: int, **settings) -> BottleneckAdapter:
    return BottleneckAdapter(kind="pfeiffer", drop_layers=tuple(range(count)), **settings)


def with_prefix(rank: int, prefix) -> Combined:
    """LoRA+PE or LoRA+PL of the paper's Table 15."""
    return Combined(methods=(LoRA(rank=rank), prefix(prefix_length=8, infix_length=4)))


ROWS = [
    ("roberta-base", LoRA(rank=8), 294_912),
    ("roberta-large", LoRA(rank=8), 786_432),
    ("deberta-xxl", LoRA(rank=8), 2_359_296),
    ("deberta-xxl", LoRA(rank=16), 4_718_592),
    ("gpt2-medium", LoRA(rank=4), 393_216),
    ("gpt2-large", LoRA(rank=4), 737_280),
    ("gpt2-medium", FullFineTuning(), 354_823_168),
    ("gpt2-large", FullFineTuning(), 774_030_080),
    ("gpt2-medium", FullFineTuning(top_layers=2), 25_192_448),
    ("roberta-base", FullFineTuning(), 124_645_632),
    ("roberta-large", FullFineTuning(), 355_359_744),
    ("gpt3-175b", FullFineTuning(), 174_604_259_328),
    ("gpt3-175b", LoRA(rank=2, targets="attention.v"), 4_718_592),
    ("gpt3-175b", LoRA(rank=1), 4_718_592),
    ("gpt3-175b", LoRA(rank=1, targets="attention"), 9_437_184),
    ("gpt3-175b", LoRA(rank=4), 18_874_368),
    ("gpt3-175b", LoRA(rank=8, targets="attention.q"), 18_874_368),
    ("gpt3-175b", LoRA(rank=2, targets="attention"), 18_874_368),
    ("gpt3-175b", LoRA(rank=8), 37_748_736),
    ("gpt3-175b", LoRA(rank=4, targets="attention"), 37_748_736),
    ("gpt3-175b", LoRA(rank=64), 301_989_888),
    ("gpt3-175b", LoRA(rank=64, targets="attention"), 603_979_776),
    # GPT-2 and RoBERTa blocks have 11 d biases, and the model one more norm of width d.
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
    *(
        ("gpt3-175b", PrefixEmbedding(prefix_length=length, infix_length=8), count)
        for length, count in (
            (32, 491_520),
            (64, 884_736),
            (128, 1_671_168),
            (256, 3_244_032),
            (512, 6_389_760),
        )
    ),
    # The paper's own figures for PreLayer lie above its formula, L d (l_p + l_i), by 1 to 8 %.
    ("gpt2-medium", PrefixLayer(prefix_length=14), 344_064),
    ("gpt2-large", PrefixLayer(prefix_length=17), 783_360),
    ("gpt3-175b", PrefixLayer(prefix_length=2, infix_length=2), 4_718_592),
    ("gpt3-175b", PrefixLayer(prefix_length=32, infix_length=4), 42_467_328),
    ("gpt3-175b", with_prefix(8, PrefixEmbedding), 37_896_192),
    ("gpt3-175b", with_prefix(32, PrefixEmbedding), 151_142_400),
    ("gpt3-175b", with_prefix(64, PrefixEmbedding), 302_137_344),
    ("gpt3-175b", with_prefix(8, PrefixLayer), 51_904_512),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "trainable"), ROWS, ids=str)
def test_counts_of_the_paper(model, method, trainable):
    counts = count_parameters(paper_model(model), method)
    assert counts.trainable == trainable
    assert sum(counts.by_layer.values()) == trainable
