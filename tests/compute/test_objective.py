"""The training loss equals the plain cross-entropy of the model's logits."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from tiny_tokenizer import tiny_tokenizer

from lorakit.adapters import attach
from lorakit.compute.batching import collator
from lorakit.compute.computation import choose_computation, confirm_computation
from lorakit.compute.objective import (
    ClassificationLoss,
    LanguageModellingLoss,
    RegressionLoss,
    SequenceToSequenceLoss,
    confirm_loss_path,
    loss_paths,
    why_not_fused,
)
from lorakit.data import DataTask
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource
from lorakit.tasks import Example, LabelledExample, LanguageExample

# Capped logits (Gemma 2), scaled ones (Granite, Cohere), a head bias (Phi), a projection before the head (OPT).
PATHS = {
    "llama": "fused",
    "gpt2": "fused",
    "opt": "fused",
    "phi": "fused",
    "granite": "fused",
    "gpt-neox": "fused",
    "gemma2": "own head",
}


def batch_of_two() -> dict[str, torch.Tensor]:
    """Right-padded rows with targets in their second halves; row 1 has a gap between two targets."""
    input_ids = torch.randint(3, tiny_models.VOCABULARY, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 6:] = 0
    labels = torch.full_like(input_ids, -100)
    labels[0, 3:6] = input_ids[0, 3:6]
    labels[1, 4:] = input_ids[1, 4:]
    labels[1, 6] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def plain_loss(model, batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss by definition: cross-entropy of all logits, shifted by one, summed over targets."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits[:, :-1].float()
    return F.cross_entropy(
        logits.flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def randomise(adapters, std: float = 0.1) -> None:
    """Add noise to every trained tensor, so that the adapter has an effect."""
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(std * torch.randn_like(parameter))


def gradients(loss: torch.Tensor, parameters) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("arch", PATHS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_equal_plain_cross_entropy(arch: str, label_smoothing: float) -> None:
    model = tiny_models.build(arch)
    adapters = attach(model, LoRA(rank=4, targets="attention.qv"))
    batch = batch_of_two()
    objective = confirm_loss_path(model, batch, label_smoothing=label_smoothing)
    assert objective.path == PATHS[arch]
    randomise(adapters)
    assert objective.count(batch) == 7
    ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch, label_smoothing)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    parameters = adapters.trainable_parameters()
    for a, b in zip(gradients(ours, parameters), gradients(plain, parameters), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "granite", "opt"])
def test_adapter_on_the_head_takes_part(arch: str) -> None:
    model = tiny_models.build(arch, tie_word_embeddings=False)
    adapters = attach(model, LoRA(rank=4, targets=("attention.qv", "head")))
    batch = batch_of_two()
    # The check sees B = 0, where the head with adapter equals the head without.
    objective = confirm_loss_path(model, batch)
    before = objective.loss_sum(model, batch)
    randomise(adapters)
    ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch)
    assert (ours - before).abs() > 1e-2
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    head = [p for n, p in model.named_parameters() if "lm_head.adapters" in n]
    assert len(head) == 2
    for a, b in zip(gradients(ours, head), gradients(plain, head), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_adapter_on_a_tied_embedding_takes_part_in_the_head() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=True)
    adapters = attach(model, LoRA(rank=4, targets="embedding", tie_head=True))
    batch = batch_of_two()
    objective = confirm_loss_path(model, batch)
    randomise(adapters)
    torch.testing.assert_close(
        objective.loss_sum(model, batch), plain_loss(model, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "granite", "phi"])
def test_full_fine_tuning_projects_in_chunks_too(arch: str, tied: bool) -> None:
    """Every gradient, also that of the head, equals that of the model's own loss; the head of phi has a bias."""
    model = tiny_models.build(arch, tie_word_embeddings=tied)
    adapters = attach(model, FullFineTuning())
    batch = batch_of_two()
    objective = confirm_loss_path(model, batch, label_smoothing=0.1)
    assert objective.path == "fused"
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch, 0.1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    parameters = adapters.trainable_parameters()
    assert any(p is head.weight for p in parameters)
    assert len(parameters) == sum(p.requires_grad for p in model.parameters())
    for a, b in zip(gradients(ours, parameters), gradients(plain, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    (mean,) = torch.autograd.grad(model(**batch).loss, [head.weight])  # the model's own: a mean
    (summed,) = torch.autograd.grad(
        confirm_loss_path(model, batch).loss_sum(model, batch), [head.weight]
    )
    torch.testing.assert_close(summed / objective.count(batch), mean, rtol=1e-3, atol=1e-6)


def test_a_head_trained_beside_lora() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=False)
    adapters = attach(model, LoRA(rank=4, train_modules="lm_head"))
    batch = batch_of_two()
    objective = confirm_loss_path(model, batch)
    assert objective.path == "fused"
    randomise(adapters)
    ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch)
    parameters = adapters.trainable_parameters()
    assert any(p is model.lm_head.weight for p in parameters)
    for a, b in zip(gradients(ours, parameters), gradients(plain, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_master_of_the_head_gets_its_gradient_under_autocast() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=True).bfloat16()
    adapters = attach(model, FullFineTuning())
    for parameter in adapters.trainable_parameters():
        parameter.data = parameter.data.float()
    batch = batch_of_two()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = confirm_loss_path(model, batch)
        assert objective.path == "fused"
    # As a step: the autocast of torch 2.8 goes on with the copies of a pass without gradients.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch)
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=0)
    parameters = adapters.trainable_parameters()
    for a, b in zip(gradients(ours, parameters), gradients(plain, parameters), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 3e-2 * b.norm()


def test_rows_with_heads_of_their_own_are_not_projected_by_one() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=False)
    adapters = attach(model, LoRA(rank=4, train_modules="lm_head"), name="one")
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapters.activate(None)
    batch = batch_of_two()
    objective = LanguageModellingLoss(path="fused")
    base = objective.loss_sum(model, batch)
    with adapters.per_sample(["one", None]):
        assert "adapter" in why_not_fused(model)
        ours, plain = objective.loss_sum(model, batch), plain_loss(model, batch)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (ours - base).abs() > 1e-2


def test_a_head_that_does_more_than_we_know_is_found_out() -> None:
    model = tiny_models.build("llama").requires_grad_(False)
    forward = model.forward

    def louder(input_ids, attention_mask, use_cache=False):
        output = forward(input_ids, attention_mask)
        output.logits = 1.5 * output.logits
        return output

    model.forward = louder
    batch = batch_of_two()
    assert why_not_fused(model) == ""
    objective = confirm_loss_path(model, batch)
    assert objective.path == "whole logits"
    assert "not fused: its logits" in objective.note
    torch.testing.assert_close(objective.loss_sum(model, batch), plain_loss(model, batch))


@pytest.mark.skipif(not hasattr(transformers, "Gemma4Config"), reason="needs Gemma 4")
def test_a_cap_in_the_text_part_of_the_configuration_is_seen() -> None:
    """The logits are small, so the cap changes the probe's loss by less than bfloat16's rounding."""
    text = {
        "vocab_size": tiny_models.VOCABULARY,
        "vocab_size_per_layer_input": tiny_models.VOCABULARY,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "head_dim": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 30.0,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma4Config(
        text_config=text, vision_config={**vision, "intermediate_size": 64}, audio_config=None
    )
    model = transformers.Gemma4ForConditionalGeneration(config).bfloat16().eval()
    batch = batch_of_two()
    assert loss_paths(model)["fused"] == "the logits are capped"
    objective = confirm_loss_path(model, batch)
    assert objective.path == "own head"
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=4)
        ours = objective.loss_sum(model, batch)
        torch.testing.assert_close(ours, plain_loss(model, batch), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "setting", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
)
def test_every_name_of_a_cap_is_known(setting: str) -> None:
    model = tiny_models.build("llama").bfloat16()
    setattr(model.config, setting, 30.0)
    assert why_not_fused(model) == "the logits are capped"


def test_a_cap_that_the_configuration_does_not_name_is_found_out_in_bfloat16() -> None:
    """It moves the mean loss by less than bfloat16's rounding, but not the logits."""
    model = tiny_models.build("llama").bfloat16().requires_grad_(False)
    model.lm_head.weight.mul_(3)
    forward = model.forward

    def capped(input_ids, attention_mask, use_cache=False):
        output = forward(input_ids, attention_mask)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    batch = batch_of_two()
    fused, whole = (
        LanguageModellingLoss(path=path).loss_sum(model, batch)
        for path in ("fused", "whole logits")
    )
    assert abs(fused - whole) < 0.02 * (whole + 7)
    assert "not fused: its logits" in confirm_loss_path(model, batch).note


def test_a_hook_on_the_whole_model_is_not_bypassed() -> None:
    model = tiny_models.build("llama").requires_grad_(False)
    model.register_forward_hook(lambda module, args, output: output)
    objective = confirm_loss_path(model, batch_of_two())
    assert objective.path == "own head"
    assert "hook" in objective.note


def test_choosing_leaves_the_training_flag() -> None:
    model = tiny_models.build("llama").train()
    confirm_loss_path(model, batch_of_two())
    assert model.training


def test_bfloat16_keeps_the_loss_in_float32() -> None:
    model = tiny_models.build("llama").bfloat16().requires_grad_(False)
    objective = confirm_loss_path(model, batch_of_two())
    assert objective.path == "fused"
    batch = batch_of_two()
    ours = objective.loss_sum(model, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain_loss(model, batch), rtol=2e-2, atol=0)


def test_a_target_at_position_zero_is_not_counted() -> None:
    batch = batch_of_two()
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    model = tiny_models.build("llama")
    objective = LanguageModellingLoss(path="fused")
    assert objective.count(batch) == 7
    torch.testing.assert_close(
        objective.loss_sum(model, batch), plain_loss(model, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("arch", tiny_models.ENCODER_DECODERS)
def test_sequence_to_sequence_loss_is_the_models_own(arch: str) -> None:
    model = tiny_models.build(arch)
    inputs = torch.randint(3, tiny_models.VOCABULARY, (2, 5))
    labels = torch.randint(3, tiny_models.VOCABULARY, (2, 4))
    labels[0, 2:] = -100
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
    objective = SequenceToSequenceLoss()
    assert objective.count(batch) == 6
    mean = objective.loss_sum(model, batch) / objective.count(batch)
    torch.testing.assert_close(mean, model(**batch).loss)


def test_a_model_that_does_not_shift_its_labels() -> None:
    """Given labels, FSMT's decoder reads the input of the encoder."""
    config = transformers.FSMTConfig(
        **{f"{part}_vocab_size": tiny_models.VOCABULARY for part in ("src", "tgt")},
        **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        d_model=16,
        pad_token_id=tiny_models.PAD,
        eos_token_id=tiny_models.EOS,
        decoder_start_token_id=tiny_models.EOS,
    )
    model = transformers.FSMTForConditionalGeneration(config).eval()
    labels = torch.tensor([[5, 7, 9, tiny_models.EOS], [8, tiny_models.EOS, -100, -100]])
    before = torch.tensor([[tiny_models.EOS, 5, 7, 9], [tiny_models.EOS, 8, tiny_models.EOS, 0]])
    inputs = torch.randint(3, tiny_models.VOCABULARY, (2, 6))
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
    logits = model(input_ids=inputs, decoder_input_ids=before, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(SequenceToSequenceLoss().loss_sum(model, batch), expected)
    assert labels[1, 2] == -100


def test_classification_and_regression_losses_are_the_models_own() -> None:
    model = tiny_models.build("bert")
    batch = tiny_models.example_batch("bert", model)
    batch["labels"] = torch.tensor([2, 0])
    loss = ClassificationLoss().loss_sum(model, batch)
    torch.testing.assert_close(loss / 2, model(**batch).loss)
    model = tiny_models.build("bert", num_labels=1)
    batch["labels"] = torch.tensor([2.5, -1.0])
    loss = RegressionLoss().loss_sum(model, batch)
    torch.testing.assert_close(loss / 2, model(**batch).loss)


WRITING = [
    LanguageExample(
        input_ids=ids, loss_mask=mask, prompt_length=mask.count(False), prompt="", completion=""
    )
    for ids, mask in (([5, 7, 3, 9], [False, False, True, True]), ([6, 4, 8], [False, True, True]))
]
LABELLING = [
    LabelledExample(input_ids=ids, label=label, token_type_ids=None, prompt="", completion="")
    for ids, label in (([5, 7, 3, 9], 2), ([6, 4, 8], 0))
]


@pytest.mark.parametrize(
    ("arch", "task", "examples"),
    [
        ("llama", "completion", WRITING),
        ("t5", "completion", WRITING),
        ("bert", "classification", LABELLING),
    ],
)
def test_the_objective_of_a_run_smooths_the_labels(
    arch: str, task: str, examples: list[Example]
) -> None:
    """The smoothed loss is 0.9 times that of the label, and 0.1 times the mean of those of all labels."""
    base = Base(
        model=tiny_models.build(arch),
        tokenizer=tiny_tokenizer(),
        source=ModelSource(name=arch, kind="folder", path_or_id="."),
    )
    choice = choose_computation(base.model, DataTask(name=task), label_smoothing=0.1)
    objective = confirm_computation(choice, base, examples).objective
    batch = collator(base)(examples)
    logits, labels = base.model(**batch).logits.double(), batch["labels"]
    if arch == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = -logits.log_softmax(-1)[labels != -100]
    own = losses.gather(1, labels[labels != -100][:, None])
    expected = (0.9 * own.squeeze(1) + 0.1 * losses.mean(1)).sum()
    ours = objective.loss_sum(base.model, batch)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
