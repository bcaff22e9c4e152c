"""Parameter counts without weights, against the paper's tables and the formula r (in + out)."""

from paper_models import paper_model

from lorakit.adapters.summary import count_parameters
from lorakit.methods.lora.method import LoRA


def test_counting_builds_no_weights_and_changes_nothing():
    model = paper_model("gpt2-medium")
    before = set(dict(model.named_parameters()))
    count_parameters(model, LoRA(rank=4, targets="all-linear"))
    assert set(dict(model.named_parameters())) == before
    assert all(p.is_meta for p in model.parameters())
