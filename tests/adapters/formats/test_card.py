"""The content of the model card; untrusted text is escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import yaml
from at_rest import adapter, convolution, embedding, linear, with_dora
from huggingface_hub import ModelCard
from tiny_runs import save_base
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import lorakit
from lorakit.adapters.formats import peft
from lorakit.adapters.formats.card import card, vllm_obstacle
from lorakit.adapters.formats.stored import StoredAdapter

PROVENANCE = {
    "config": {"learning_rate": 1e-3},
    "data": {
        "train": {"source": "e2e.jsonl", "sha256": "ab" * 32, "examples": 42061},
        "validation": {"source": "e2e.jsonl", "sha256": None, "examples": 4672},
    },
    "scores": {"loss": 1.23456, "bleu": 60.3},
    "scores_before": {"loss": 3.5},
    "seed": 7,
}


def live(arch: str = "llama", name: str = "owner/tiny", head=None, **settings) -> StoredAdapter:
    model = tiny_models.build(arch, head)
    model.config._name_or_path = name
    model.config._commit_hash = "0123abc"
    settings = {"rank": 4, "alpha": 6, "targets": "attention.qv", **settings}
    stored = lorakit.attach(model, lorakit.LoRA(**settings), seed=0).stored()
    stored.provenance = PROVENANCE
    return stored


def text_of(stored: StoredAdapter) -> str:
    return card(stored, peft.peft_form(stored))


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_the_hubs():
    text = text_of(live())
    assert front_matter(text) == {
        "base_model": "owner/tiny",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lorakit", "lora"],
    }
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("owner/tiny", "peft")
    head = live("roberta", train_modules=["classifier"])
    assert front_matter(text_of(head))["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize("name", ["/home/me/models/tiny", "./tiny", "tiny", "a/b/c", "a/b\nx: y"])
def test_a_base_that_is_not_on_the_hub_is_not_in_the_front_matter(name):
    found = front_matter(text_of(live(name=name)))
    assert "base_model" not in found
    assert found.keys() <= {"library_name", "pipeline_tag", "tags"}


def test_what_the_card_says():
    text = text_of(live(dropout=0.1, scaling="rslora"))
    for line in (
        "# LoRA adapter for owner/tiny",
        "| Base model | `owner/tiny` |",
        "| Base revision | `0123abc` |",
        "| Base class | `LlamaForCausalLM` |",
        "| Method | `LoRA(rank=4, alpha=6.0, targets=('attention.qv',), dropout=0.1, scaling='rslora')` |",
        "| Rank | 4 |",
        "| Scaling | 3 |",
        "| Adapted layers | 4 |",
        f"| Trained parameters | {2 * 4 * (32 + 32 + 32 + 16):,} |",
        "|  | before training | this adapter |",
        "| loss | 3.500 | 1.235 |",
        "| bleu |  | 60.30 |",
        "On 4,672 validation examples.\n",
        "| train | e2e.jsonl | 42,061 | `abababababababab…` |",
        "| validation | e2e.jsonl | 4,672 | not recorded |",
        '"learning_rate": 0.001',
        'model = lorakit.load_base("owner/tiny", task="causal-lm", revision="0123abc").model',
        'adapters = lorakit.load(model, "path/to/this/folder")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "vllm serve owner/tiny --revision 0123abc --enable-lora --max-lora-rank 8 \\",
    ):
        assert line in (text.splitlines() if line.startswith("|") else text), line


def test_a_gguf_file_is_a_base_that_only_lorakit_loads():
    """Its folder is not recorded: it means nothing on another machine."""
    text = text_of(live(name="tiny.Q4_K_M.gguf"))
    call = 'lorakit.load_base("path/to/tiny.Q4_K_M.gguf"'
    assert f'model = {call}, task="causal-lm", revision="0123abc").model' in text
    assert f"vLLM needs the base as a folder: `{call}).model.save_pretrained(...)`." in text
    assert "vllm serve path/to/that/folder" in text
    call = 'lorakit.load_base("path/to/t5.gguf", task="seq2seq-lm", revision="0123abc").model'
    assert f"model = {call}" in text_of(live("t5", name="t5.gguf"))


def test_a_folder_that_peft_cannot_load():
    stored = adapter({"a": with_dora(convolution(rank=4, groups=2))})
    text = card(stored, None)
    assert "PEFT and vLLM cannot load it" in text
    assert "PeftModel" not in text
    assert front_matter(text)["library_name"] == "lorakit"


@pytest.mark.parametrize(
    ("arch", "settings", "obstacle"),
    [
        ("llama", {}, None),
        ("llama", {"rank_pattern": {"v_proj": 2}}, "ranks or scalings differ"),
        ("llama", {"alpha_pattern": {"v_proj": 5.0}}, "ranks or scalings differ"),
        ("llama", {"dora": True}, "it uses DoRA"),
        ("qwen2", {"bias": "lora_only"}, "biases are trained"),
        ("llama", {"train_modules": ["norm"]}, "trained in full"),
        ("llama", {"targets": ["q_proj", "embed_tokens"]}, "adapts an embedding"),
        ("roberta", {}, "causal language models"),
    ],
)
def test_what_keeps_vllm_from_serving_it(arch, settings, obstacle):
    form = peft.peft_form(live(arch, **settings))
    found = vllm_obstacle(form)
    assert (found is None) == (obstacle is None)
    if obstacle is not None:
        assert found is not None
        assert obstacle in found
        assert "vllm serve" not in card(live(arch, **settings), form)


def test_text_from_outside_stays_text():
    hostile = "x`|<script>alert(1)</script>\n---\n# pwned [a](b)"
    stored = adapter(
        {"a": linear(), "b": embedding()},
        provenance={
            "peft": {"base_model_name_or_path": hostile},
            "data": {hostile: {"source": hostile, "sha256": hostile, "examples": hostile}},
            "scores": {hostile: hostile},
            "config": {"a": "```\n# pwned"},
        },
    )
    stored.notices.append(hostile)
    text = card(stored, peft.peft_form(stored))
    lines = text.splitlines()
    assert front_matter(text) == {"library_name": "peft", "tags": ["lorakit", "lora"]}
    assert lines.count("---") == 2
    headings = [line for line in lines if line.startswith("#")]
    assert all("pwned" not in h or h.startswith("# LoRA adapter for x") for h in headings)
    outside_code = [line for line in lines if "from_pretrained" not in line]
    for line in outside_code:
        assert "<script>" not in line.replace("\\<", "") or line.startswith("| Base model | `")
    for row in (line for line in lines if line.startswith("| Base model")):
        assert row.replace("\\|", "").count("|") == 3


# --- the code that loads the adapter --------------------------------------------------------------


def run_code(folder: Path, base: PreTrainedModel | None = None) -> list[dict[str, Any]]:
    """Run the card's blocks of Python, and return the names that each defines."""
    text = (folder / "README.md").read_text()
    found = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict[str, Any] = {} if base is None else {"base": base}
        exec(code.replace("path/to/this/folder", str(folder)), names)
        found.append(names)
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT
@pytest.mark.parametrize("labels", [1, 3])
def test_the_code_gives_a_classifier_its_number_of_labels(labels: int, tmp_path: Path) -> None:
    base = save_base(tmp_path / "encoder", "roberta", "masked-lm")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, train_modules="classifier"))
    folder = handle.save(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    with_lorakit, with_peft = run_code(folder, fresh)
    for loaded in (with_lorakit["model"], with_peft["model"].base_model.model):
        assert type(loaded) is type(model)
        assert loaded.config.num_labels == labels


def test_the_code_for_an_adapter_that_peft_cannot_load(tmp_path: Path) -> None:
    base = save_base(tmp_path / "decoder")
    model = AutoModelForCausalLM.from_pretrained(base)
    handle = lorakit.attach(model, lorakit.BottleneckAdapter(size=4))
    (names,) = run_code(handle.save(tmp_path / "adapter"))
    assert type(names["adapters"].method()) is lorakit.BottleneckAdapter


@pytest.mark.parametrize(
    ("labels", "arguments"),
    [
        (["a", "b", "c"], 'task="sequence-classification", revision="0123abc", num_labels=3'),
        ([], 'task="regression", revision="0123abc"'),
    ],
)
def test_the_code_for_a_base_in_a_python_package(labels: list[str], arguments: str) -> None:
    stored = live("roberta", "all-minilm-l6-v2", "sequence-classification")
    stored.layout = None  # as in a file
    generic_task = "classification" if labels else "regression"
    stored.provenance = {"labels": labels, "generic_task": generic_task}
    code = f'model = lorakit.load_base("all-minilm-l6-v2", {arguments}).model'
    assert code in text_of(stored)
