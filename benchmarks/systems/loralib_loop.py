"""loralib in a plain PyTorch loop, with its layers inserted by hand as in its README.

Uses bfloat16 autocast with float32 weights if bfloat16 is fast. Settings: order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import torch
from torch import nn

from benchmarks.examples import Prepared
from benchmarks.systems import Trained, load_model
from benchmarks.systems.peft_trainer import TARGETS
from benchmarks.workloads import Workload
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.heads import classification_head


def train(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> Trained:
    """Train the layers of loralib, and the head of a classifier."""
    workload = prepared.workload
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(workload.seed)
    model = load_model(prepared, "float32")
    insert_layers(model, workload)
    loralib.mark_only_lora_as_trainable(model)
    if workload.task == "classification":
        for path in classification_head(model):  # type: ignore[arg-type]
            model.get_submodule(path).requires_grad_(True)
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=workload.learning_rate, weight_decay=0.0, fused=True
    )
    half = compute_dtype("auto") == torch.bfloat16
    for examples in prepared.in_order(settings["order"]):
        batch = {name: tensor.to(device) for name, tensor in prepared.collate(examples).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(settings["order"], lambda: model)


def insert_layers(model: nn.Module, workload: Workload) -> None:
    """Replace the targets with `loralib.Linear` layers that share their weights."""
    names = TARGETS[workload.targets]
    for path, layer in list(model.base_model.named_modules()):  # type: ignore[operator]
        if not isinstance(layer, nn.Linear):
            continue
        if names != "all-linear" and not path.endswith(tuple(f".{name}" for name in names)):
            continue
        new = loralib.Linear(
            layer.in_features,
            layer.out_features,
            r=workload.rank,
            lora_alpha=workload.alpha,  # type: ignore[arg-type]
            lora_dropout=workload.dropout,
            merge_weights=False,
            bias=layer.bias is not None,
        )
        new.weight, new.bias = layer.weight, layer.bias
        model.base_model.set_submodule(path, new)  # type: ignore[operator]
