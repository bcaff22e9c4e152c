"""The fields of a model's configuration that change what the model computes.

Every field counts unless it is listed here, so a field of a new architecture counts too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

VERSION = "transformers_version"
"""Key of the version of transformers that interpreted the configuration; it is not compared."""

_NOT_COMPUTED = frozenset(
    {
        # names and paths
        *("architectures", "auto_map", "model_type", "name_or_path", "tokenizer_class"),
        *("finetuning_task", "task_specific_params", "prefix", "language"),
        # labels; transformers sets problem_type itself in the first pass with labels
        *("id2label", "label2id", "num_labels", "problem_type"),
        # how the same numbers are stored and computed; the record of the weights has dtype and tied tensors
        *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "return_dict"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "torchscript", "use_bfloat16"),
        *("pretraining_tp", "tie_word_embeddings", "lorakit_merged"),
        # only for new weights
        *("initializer_range", "initializer_factor", "init_std"),
        VERSION,
    }
)

_IN_TRAINING = re.compile("drop|loss|jitter")
"""Matches the fields that act in training only: dropout, auxiliary losses, noise of a router."""


def computing_fields(config: Any) -> dict[str, Any] | None:
    """Return the fields of a configuration that change the computation, as JSON values, and `VERSION`.

    The fields of a nested configuration have dotted names: ``text_config.rms_norm_eps``. Fields that only generation
    reads are left out, also the ids of the bos, eos and pad tokens: `load_base` sets the pad id itself. Floats are
    rounded to six digits, because GGUF stores float32. The result is None if `config` is not a configuration of
    transformers.
    """
    if not hasattr(config, "to_dict"):  # do not import transformers for other models
        return None
    from transformers import PretrainedConfig
    from transformers import __version__ as version

    if not isinstance(config, PretrainedConfig):
        return None
    ignored = _ignored()

    def fields(part: PretrainedConfig, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in part.to_dict().items():
            # getattr rejects fields that differ between layers (Gemma 4).
            nested = vars(part).get(name)
            if name in ignored or name.startswith("_"):
                continue
            if isinstance(nested, PretrainedConfig):
                yield from fields(nested, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", _plain(value)

    return {**dict(fields(config, "")), VERSION: version}


@functools.cache
def _ignored() -> frozenset[str]:
    from transformers import GenerationConfig

    # Training shifts the labels of an encoder-decoder by the start token.
    return _NOT_COMPUTED | (GenerationConfig().to_dict().keys() - {"decoder_start_token_id"})


def changed_fields(
    then: Mapping[str, Any] | None, now: Mapping[str, Any] | None, *, training: bool = True
) -> list[str]:
    """Return the fields that differ, each as ``name old -> new``.

    A field that only one side has is not compared: other versions of transformers have other fields, and a
    configuration holds every field that its model class reads. Inside a field (`rope_parameters`), entries of one side
    count if both sides were read by the same version.

    Args:
        then: What `computing_fields` returned for the earlier configuration; None compares nothing.
        now: The same of the present one.
        training: Whether fields that act in training only (dropout) are compared.
    """
    if then is None or now is None:
        return []
    same_version = then.get(VERSION) == now.get(VERSION)
    return [
        change
        for name in then.keys() & now.keys() - {VERSION}
        if training or not _IN_TRAINING.search(name)
        for change in sorted(_changes(name, then[name], now[name], same_version))
    ]


def _changes(name: str, then: Any, now: Any, same_version: bool) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in then.keys() | now.keys() if same_version else then.keys() & now.keys():
            yield from _changes(f"{name}.{key}", then.get(key), now.get(key), same_version)
    elif then != now:
        yield f"{name} {_shown(then)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any) -> Any:
    """Return a JSON value that is equal for equal settings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        if rounded.is_integer():
            return int(rounded)
        return rounded if rounded - rounded == 0 else str(value)  # JSON has no infinity
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
