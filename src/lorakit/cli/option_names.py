"""Unknown option names: what to write instead."""

from __future__ import annotations

from collections.abc import Iterable

from lorakit.errors import nearest

OTHER_NAMES = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "modules_to_save": "lora.train_modules",
    "init_lora_weights": "lora.init",
    "use_dora": "lora.dora",
    "use_rslora": "lora.scaling",
    "base_model": "base.name",
    "base_model_name_or_path": "base.name",
    "model_name_or_path": "base.name",
    "model_name": "base.name",
    "model": "base.name",
    "torch_dtype": "base.dtype",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "dataset_name": "data.train",
    "max_seq_length": "data.max_length",
    "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
    "max_grad_norm": "optimizer.clip",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "save_steps": "checkpoints.every",
    "eval_steps": "evaluation.every",
    "resume_from_checkpoint": "resume",
    "output_dir": "output",
    "num_beams": "decoding.beams",
}
"""Names of PEFT, transformers and axolotl, and the options of the same meaning."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the option to write instead of an unknown one, or an empty string."""
    known = list(known)
    head, _, last = name.rpartition(".")
    if (ours := OTHER_NAMES.get(last)) in known and head in ("", str(ours).rpartition(".")[0]):
        return f" Its name in lorakit is --{ours}."
    if same := [option for option in known if option.rpartition(".")[2] == last]:
        return f" Did you mean '--{same[0]}'?" if len(same) == 1 else _several(same)
    options = [f"--{option}" for option in known]
    return nearest(f"--{name}", options) or nearest(f"--{name.split('.')[0]}", options)


def _several(options: list[str]) -> str:
    names = [f"--{option}" for option in options]
    return f" Did you mean {', '.join(names[:-1])} or {names[-1]}?"
