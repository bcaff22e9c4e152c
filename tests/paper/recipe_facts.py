"""The facts of recipes.json in the names of lorakit's settings, with a reason where a recipe differs on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ORIGINS = {
    "paper": "paper",
    "prior work the paper reuses": "prior",
    "official script": "code",
    "official README command": "code",
}
TASKS = {"SST-2": "sst2", "STS-B": "stsb", "E2E": "e2e_nlg"}
METRICS = {"CoLA": "matthews", "STS-B": "pearson"}
"""Of Table 2; accuracy elsewhere."""
LIMITS = {"100": 100, "1k": 1000, "10k": 10_000, "392k": None}

RECIPES = {
    "LoRA": ("lora",),
    "LoRA dagger": ("lora-restricted",),
    "AdapterP": ("pfeiffer-0.8m",),
    "AdapterP 0.8M dagger": ("pfeiffer-0.8m",),
    "AdapterP 3M dagger": ("pfeiffer-3m",),
    "AdapterH": ("houlsby-0.8m",),
    "AdapterH 0.8M dagger": ("houlsby-0.8m",),
    "AdapterH 6M dagger": ("houlsby-6m",),
    "AdapterL 0.1%": ("lin-0.4m",),
    "AdapterL 3%": ("lin-11m",),
    "PreEmbed": ("prefix_embedding",),
    "PreLayer": ("prefix_layer",),
    "BitFit": ("bitfit",),
    "FT": ("full",),
    "FT-Top2": ("full-top2",),
}
"""Last parts of the recipes' names, by the method and variant of a fact."""
SEVERAL = {
    "AdapterH": ("houlsby-7.1m", "houlsby-40.1m"),
    "LoRA": ("lora-4.7m", "lora-4.7m-v", "lora-37.7m", "lora-37.7m-qkvo"),
}
"""The same for the facts of GPT-3 on all data, which state several sizes."""
SIZES: dict[str, dict[str, Any]] = {
    "houlsby-7.1m": {"bottleneck.size": 1},
    "houlsby-40.1m": {"bottleneck.size": 8},
    "lora-4.7m": {"lora.rank": 1, "lora.targets": ("attention.qv",)},
    "lora-4.7m-v": {"lora.rank": 2, "lora.targets": ("attention.v",)},
    "lora-37.7m": {"lora.rank": 8, "lora.targets": ("attention.qv",)},
    # Section D.4 prints rank 2; 37.7M parameters and Table 15 give 4.
    "lora-37.7m-qkvo": {"lora.rank": 4, "lora.targets": ("attention",)},
    # Li and Liang print shares of the parameters; these sizes give the 0.37M and 11.09M of Table 3.
    "lin-0.4m": {"bottleneck.size": 6},
    "lin-11m": {"bottleneck.size": 224},
    "full-top2": {"full.top_layers": 2},
}

SETTINGS = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "per_device_batch_size": "batch_size",
    "n_gpus": "accumulation",  # one accumulation step for each process of a script
    "grad_accumulation": "accumulation",
    "max_seq_len": "data.max_length",
    "seq_len": "data.max_length",
    "label_smoothing": "label_smoothing",
    "seed": "seed",
    "learning_rate": "optimizer.learning_rate",
    "lr_schedule": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
    "warmup_tokens": "warmup_tokens",
    "weight_decay": "optimizer.weight_decay",
    "adam_betas": "optimizer.betas",
    "adam_eps": "optimizer.eps",
    "max_grad_norm": "optimizer.clip",
    "grad_clip": "optimizer.clip",
    "eval_every": "evaluation.every",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "dropout": "lora.dropout",  # Table 11 does not say of what; in the code it is LoRA's
    "adapted": "lora.targets",
    "adapter_r": "bottleneck.size",
    "adapter_activation": "bottleneck.activation",
    "prefix_length": "prefix_layer.prefix_length",
}
VALUES: dict[str, Callable[[Any], Any]] = {
    "adam_betas": tuple,
    "adapted": lambda names: {"qv": ("attention.qv",)}["".join(names)],
    "adapter_activation": {"swish": "silu", "relu": "relu"}.__getitem__,
    "eval_every": lambda text: None if text == "epoch" else int(text.removesuffix(" steps")),
}
NOTES: dict[str, Callable[[Any], str]] = {
    "init_from": lambda start: "--from_adapter" if "MNLI" in start else "",
    "aggregation": lambda text: text.partition(",")[0].replace(" of ", " over "),
    "cls_dropout": lambda share: f"dropout before the classifier to {share:g};",
    "other_dropout": lambda share: f"the model's own dropout to {share:g};",
    "fp16": lambda is_on: "float16" if is_on else "",
}
"""Words that must be in the notes of a recipe, for facts that have no setting."""
DECODING = {
    "beam": "beams",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "length_penalty": "length_penalty",
    "max_new_tokens": "max_new_tokens",
}
WITHOUT_A_SETTING = {
    "optimizer",  # always AdamW
    "bias_correction",  # always on
    "loss_on",  # always the completion
    "global_batch_size",  # the product of two others
    "budgets",  # in SIZES
    *("valid_batch_size", "save_interval", "named_checkpoint_step"),  # change no weight
}


@dataclass(frozen=True)
class Expected:
    """What a recipe must hold."""

    settings: dict[str, Any]
    decoding: dict[str, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)


def expected_recipes(fact: dict[str, Any]) -> dict[str, Expected]:
    """Return what the recipes of a fact must hold, by name."""
    model, task, origin = fact["model"], fact["task"], ORIGINS[fact["origin"]]
    variant = fact["variant"] or ""
    words = f"{fact['method']} {variant}".removesuffix("low-data").strip()
    methods = RECIPES[words]
    if model == "gpt3-175b" and not variant:
        methods = SEVERAL.get(words, methods)
    found = {}
    for method in methods:
        recipe = Expected({**_implied(model, task, origin, method), **SIZES.get(method, {})})
        for key, value in fact["hyper"].items():
            _state(recipe, key, value)
        if "warmup_tokens" in recipe.settings:
            per_step = recipe.settings["batch_size"] * recipe.settings["data.max_length"]
            tokens = recipe.settings.pop("warmup_tokens")
            recipe.settings["optimizer.warmup"] = -(-tokens // per_step)  # in full-length steps
        found[f"{model}/{TASKS.get(task, task.lower())}/{method}@{origin}"] = recipe
    return found


def _implied(model: str, task: str, origin: str, method: str) -> dict[str, Any]:
    """Return the settings that the names imply, and those that only another place of the source states."""
    data, _, size = task.partition("-") if task.startswith("MNLI-") else (task, "", "")
    settings: dict[str, Any] = {"data.task": TASKS.get(data, data.lower())}
    kind = method.partition("-")[0]
    is_bottleneck = kind in ("houlsby", "pfeiffer", "lin")
    settings["method"] = "bottleneck" if is_bottleneck else kind
    if is_bottleneck:
        settings["bottleneck.kind"] = kind
    if kind == "lora":
        # The paper draws A from a Gaussian, and so does the code of DeBERTa; loralib's layers are Kaiming-uniform.
        is_gaussian = origin == "paper" or model.startswith("deberta")
        settings["lora.init"] = "gaussian" if is_gaussian else "kaiming"
    if model.startswith("gpt2"):
        settings["data.max_length"] = 512  # the code's; the paper and Li and Liang print none
        settings["optimizer.schedule"] = "linear"  # Table 11; Li and Liang print none
    elif model == "gpt3-175b":
        settings["optimizer.weight_decay"] = 0.1  # section D.4, for every run
        settings["data.max_length"] = {"WikiSQL": 384, "MNLI": 768, "SAMSum": 2048}[data]
        settings["data.limit"] = LIMITS[size] if size else None
        if data == "MNLI":
            settings["data.validation_split"] = "validation_matched"  # MNLI-m in Tables 4 and 16
            settings["evaluation.metric"] = "accuracy"
    else:
        settings["evaluation.metric"] = METRICS.get(task, "accuracy")
    return settings


def _state(recipe: Expected, key: str, value: Any) -> None:
    """Add what a fact states under a key to a recipe."""
    settings = recipe.settings
    if key in NOTES:
        recipe.notes.update(filter(None, [NOTES[key](value)]))
    elif key == "decode":
        recipe.decoding.update({DECODING[name]: v for name, v in value.items() if name in DECODING})
    elif key in ("l_p", "l_i"):
        settings[f"{settings['method']}.{'prefix' if key == 'l_p' else 'infix'}_length"] = value
    elif key == "adapter_r" and isinstance(value, list):
        assert settings["bottleneck.size"] in value
    elif key not in WITHOUT_A_SETTING:
        settings[SETTINGS[key]] = VALUES[key](value) if key in VALUES else value
