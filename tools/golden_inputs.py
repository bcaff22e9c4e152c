"""What the golden cases read: tiny bases, data files, command files and PEFT folders. Built without lorakit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, TURN, EOS = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [PAD, BOS, TURN, EOS]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The river pub near the park serves cheap English food.",
    "Return the index where to insert the item in the list.",
    "Amanda baked cookies and will bring Jerry some tomorrow.",
)
WORDS = [
    *("river", "pub", "park", "food", "cheap", "English", "index", "list", "item"),
    *("Amanda", "Jerry", "cookies", "tomorrow"),
]

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES = {**_WIDTHS, "intermediate_size": 64, "max_position_embeddings": 128}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}

BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", _LLAMA),
    "llama-biased": ("Llama", "CausalLM", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-dropout": ("Llama", "CausalLM", {**_LLAMA, "attention_dropout": 0.1}),
    "gpt2": ("GPT2", "CausalLM", {**_GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "roberta": ("Roberta", "SequenceClassification", {**_SIZES, **_NO_DROPOUT}),
    "t5": ("T5", "Seq2SeqLM", {**_T5, "decoder_start_token_id": 0}),
}
"""Family, head and configuration of each tiny base."""

_QV = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
PEFT_FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qv": ("llama", _QV),
    "all-linear": ("llama", {**_QV, "target_modules": "all-linear"}),
    "rslora": ("llama", {**_QV, "use_rslora": True}),
    "dora": ("llama", {**_QV, "use_dora": True}),
    "rank-pattern": (
        "llama",
        {**_QV, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "embedding": (
        "llama",
        {**_QV, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "conv1d": ("gpt2", {**_QV, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bias": ("llama-biased", {**_QV, "bias": "lora_only"}),
}
"""Base and `peft.LoraConfig` of each PEFT folder."""

SERVED = ("qv", "all-linear", "dora")
"""The PEFT folders that the server serves."""

COMMAND_FILES = {
    "run.yaml": "base: {name: llama}\ndata: {train: pairs.jsonl}\noutput: out/run\nlora: {rank: 4, dropout: 0.1}\n",
    "long.yaml": "max_steps: 500\nlora: {rank: 2, rank_pattern: {q_proj: 4}}\noptimizer: {learning_rate: 0.001}\n",
    "shared.yaml": "base: {name: llama}\nadapter: some/adapter\nport: 9000\ndecoding: {beams: 4}\noutput: out/run\n",
    "wrong-key.yaml": "base: {name: llama}\ndata: {train: pairs.jsonl}\noutput: out\nlora: {ranks: 4}\n",
    "wrong-type.yaml": "base: {name: llama}\ndata: {train: pairs.jsonl}\noutput: out\nlora: {rank: many}\n",
    "broken.yaml": "base: {name: llama\n",
}


def build_inputs(folder: Path) -> None:
    """Write everything below `folder`. The same libraries write the same tensors."""
    for name, (family, head, settings) in BASES.items():
        _save_base(folder / name, family, head, settings)
    _write_data(folder / "data")
    for name, (base, settings) in PEFT_FOLDERS.items():
        _save_peft(folder / "peft" / name, folder / base, settings)
    for name in SERVED:
        shutil.copytree(folder / "peft" / name, folder / "served" / name)
    commands = folder / "commands"
    shutil.copytree(folder / "data", commands)
    for name, text in COMMAND_FILES.items():
        (commands / name).write_text(text, encoding="utf-8")


def example_ids() -> torch.Tensor:
    """Return the token ids (2, 9) on which logits are compared."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(len(SPECIAL), 256, (2, 9), generator=generator)


def load_model(folder: Path) -> PreTrainedModel:
    """Return a tiny causal language model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _save_base(folder: Path, family: str, head: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tokenizer = _tokenizer(is_encoder=family == "Roberta")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=3, **settings
    )
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    _randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _randomise(model: torch.nn.Module, seed: int = 0, *, only_trained: bool = False) -> None:
    """Add noise to every parameter: a bias of zero or a norm of one would hide that it is lost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trained:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _tokenizer(*, is_encoder: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; an encoder's puts a text between BOS and EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if is_encoder:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}",
            pair=f"{BOS} $A {EOS} {EOS} $B {EOS}",
            special_tokens=[(BOS, 1), (EOS, 3)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = None if is_encoder else CHAT_TEMPLATE
    return tokenizer


def _write_data(folder: Path) -> None:
    """Write pairs that share prompts, chats and labelled texts."""
    draw = random.Random(0)
    pairs, chats, labelled = [], [], []
    for index in range(48):
        words = draw.sample(WORDS, draw.randint(3, 6))
        prompt, answer = " ".join(words) + ":", f" {words[0]}"
        pairs += [{"prompt": prompt, "completion": answer + end} for end in ("", f" {words[1]}")]
        turns = zip(("system", "user", "assistant"), (words[2], prompt, answer), strict=True)
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        labelled.append({"text": f"{prompt} {WORDS[index % 2]}", "label": ("no", "yes")[index % 2]})
    for name, rows in {"pairs": pairs, "chats": chats, "labelled": labelled}.items():
        _write_rows(folder / f"{name}.jsonl", rows)
        _write_rows(folder / f"{name}-test.jsonl", rows[:8])
    _write_rows(folder / "unlabelled.jsonl", [{"text": row["text"]} for row in labelled[:8]])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _save_peft(folder: Path, base: Path, settings: dict[str, Any]) -> None:
    """Let PEFT write an adapter folder with random tensors, and beside it PEFT's own logits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load_model(base), config).eval()
    _randomise(model, only_trained=True)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=example_ids()).logits
    save_file({"logits": logits}, folder.with_suffix(".safetensors"))
