"""The input embeddings of a model, and its output or task head."""

from __future__ import annotations

from torch import nn

from lorakit.models.direct_reads import never_calls
from lorakit.models.layers import StackedWeight, why_not_adaptable
from lorakit.models.tree import LocatedModule, base_modules, is_inside, submodule, unwrapped


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that computes hidden states; the model itself if it has no head."""
    return unwrapped(getattr(model, "base_model", model))


def classification_head(model: nn.Module) -> list[str]:
    """Return the paths of the modules that a task head adds to the pre-trained model.

    They are the children of the root other than the base model: ``["classifier"]`` for RoBERTa,
    ``["pooler", "classifier"]`` for DeBERTa-v2, ``["score"]`` for Llama. The list is empty for
    language models and for models without a head.
    """
    base = backbone_of(model)
    if base is model or output_embeddings(model) is not None:
        return []
    return [
        name
        for name, child in model.named_children()
        if unwrapped(child) is not base and any(True for _ in child.parameters())
    ]


def logits_layer(model: nn.Module) -> str | None:
    """Return the path of the layer that computes the logits of a task head, or None if there is none.

    It is the last linear layer of the head that has one output for each label.
    """
    count = getattr(getattr(model, "config", None), "num_labels", None)
    found = None
    for head in classification_head(model):
        for path, module in base_modules(submodule(model, head)):
            if isinstance(module, nn.Linear) and module.out_features == count:
                found = f"{head}.{path}" if path else head
    return found


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that projects to the vocabulary, or None if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    return unwrapped(getter()) if getter else None


def embedding_paths(model: nn.Module, modules: list[LocatedModule]) -> list[str]:
    """Return the paths of the adaptable layers that embed the model's input, of encoder and decoder.

    T5 and BART share the weight of one embedding with those of encoder and decoder. The model calls
    only these two, so they are returned.
    """
    get_decoder = getattr(model, "get_decoder", None)
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    parts = [model, get_decoder()] if get_decoder and is_pair else [model]
    embeddings = [input_embeddings(part) for part in parts]
    called: set[str] = set()
    for at in modules:
        if tied := called_instead(at):
            start = at.path[: at.path.rfind(".") + 1]
            called |= {start + path for path in tied}
        elif any(at.module is one for one in embeddings):
            called.add(at.path)
    # ViT's input embedding is a module that contains the convolution over patches.
    return [
        at.path
        for at in modules
        if why_not_adaptable(at.module) is None and is_inside(at.path, *called)
    ]


def is_never_called(at: LocatedModule) -> bool:
    """Whether the model uses this layer's weight without calling it, always or in training.

    A stacked weight is never called either, but its adapter needs no call: it acts in the call of the experts' module.
    """
    if isinstance(at.module, StackedWeight):
        return False
    return bool(called_instead(at)) or never_calls(at.parent, at.path.rpartition(".")[2])


def is_adaptable(at: LocatedModule) -> bool:
    """Whether an adapter on this layer has an effect: its kind is supported, and the model calls it."""
    return why_not_adaptable(at.module) is None and not is_never_called(at)


def called_instead(at: LocatedModule) -> list[str]:
    """Return the embeddings that are tied to an embedding and called in its place, by their paths in its parent."""
    keys = getattr(at.parent, "_tied_weights_keys", None)  # of a class of transformers
    if not isinstance(keys, dict) or not isinstance(at.module, nn.Embedding):
        return []
    weight = f"{at.path.rpartition('.')[2]}.weight"
    tied = [key.removesuffix(".weight") for key, source in keys.items() if source == weight]
    inside = dict(base_modules(at.parent)) if tied else {}
    return [path for path in tied if isinstance(inside.get(path), nn.Embedding)]


def head_paths(model: nn.Module, modules: list[LocatedModule]) -> list[str]:
    """Return the paths of the adaptable layers of the output head or the classification head."""
    output = output_embeddings(model)
    heads = classification_head(model)
    return [
        at.path
        for at in modules
        if (at.module is output or is_inside(at.path, *heads)) and is_adaptable(at)
    ]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that embeds the input, or None if the model has none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return unwrapped(getter()) if getter else None
    except (AttributeError, NotImplementedError):  # transformers raises them if the model has none
        return None
