"""Parameter counts without weights, against the paper's tables and the formula r (in + out)."""

import pytest
from paper_models import paper_model

from lorakit.adapters.summary import count_parameters
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "trainable"),
    [
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
    ],
    ids=str,
)
def test_counts_of_the_paper(model, method, trainable):
    counts = count_parameters(paper_model(model), method)
    assert counts.trainable == trainable
    assert sum(counts.by_layer.values()) == trainable


def test_counting_builds_no_weights_and_changes_nothing():
    model = paper_model("gpt2-medium")
    before = set(dict(model.named_parameters()))
    count_parameters(model, LoRA(rank=4, targets="all-linear"))
    assert set(dict(model.named_parameters())) == before
    assert all(p.is_meta for p in model.parameters())
