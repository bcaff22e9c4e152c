"""Load base models: model, tokenizer, and notices for the user."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch

from lorakit.errors import BaseModelError, ConfigurationError, LorakitError, nearest
from lorakit.formatting import listed
from lorakit.models.devices import pick_device
from lorakit.models.dtype_choice import choose_dtype, compute_dtype
from lorakit.models.dtypes import QUANTISATIONS, dtype_name
from lorakit.models.heads import classification_head, input_embeddings
from lorakit.models.locating import Located, locate, read_config
from lorakit.models.model_classes import MODEL_CLASSES, ModelHead, is_encoder, model_class
from lorakit.models.quantised import prevent_repacking, require_exact_layers
from lorakit.models.quantising import check_available, projections_as_stored, quantise_base
from lorakit.models.shared_setting import SharedSetting
from lorakit.models.sources import ModelSource, resolve
from lorakit.models.tokenizer import tokenizer_of
from lorakit.models.tree import is_inside
from lorakit.ops.seeding import seeded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOCATED: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[ModelSource, ModelSource]] = (
    WeakKeyDictionary()
)
"""Sources of the tokenizers that `load_tokenizer` has read, without and with the commit on the hub."""

_CLASSIFICATION: tuple[str, ...] = ("sequence-classification", "image-classification")
NEW_WEIGHTS = "Newly initialised weights"
"""Start of the notice about `Base.new_weights`."""
_WITH_NEW_HEADS: tuple[str, ...] = (*_CLASSIFICATION, "regression")
"""Tasks for which a checkpoint may lack the head; it is then initialised and trained."""


@dataclasses.dataclass(slots=True)
class Base:
    """A loaded base model.

    Attributes:
        model: in eval mode, on the CPU; `compute.base.open_base` moves it to the device.
        tokenizer: with a padding token; None if the source has none.
        source: where it was loaded from; for the hub, its revision is the commit.
        notices: sentences for the user: newly initialised heads, a missing padding token.
        new_weights: names of the weights that the checkpoint lacks, which are random until they are trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: ModelSource
    notices: list[str] = dataclasses.field(default_factory=list)
    new_weights: list[str] = dataclasses.field(default_factory=list)

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a base that reads text.

        Raises:
            BaseModelError: The source has none.
        """
        if self.tokenizer is None:
            raise BaseModelError(
                f"'{self.source.name}' has no tokenizer, which lorakit needs to read text. Use a base with a "
                f"tokenizer, or save the tokenizer into its folder.{self.source.if_incomplete}"
            )
        return self.tokenizer


def load_base(
    name: str | os.PathLike[str],
    *,
    task: ModelHead = "causal-lm",
    num_labels: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4", "int8"] | torch.dtype = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        name: a short name (``smollm2-135m``, ``minilm-l6``), a hub id, a model folder, or a
            ``.gguf`` file.
        task: the model's task, which determines its head.
        num_labels: number of classes, for classification only; None for that of the checkpoint.
        dtype: dtype of the weights; see :func:`compute_dtype`. ``nf4`` and ``int8`` quantise the
            projections to 4 or 8 bits and keep the other weights in the dtype of ``auto``; see
            :func:`lorakit.models.quantising.quantise`.
        trust_remote_code: run the Python code that the hub or the folder has for the model.
        revision: branch, tag or commit on the hub.
        device: the device that will run the model, which determines ``auto``; None is a CUDA GPU if
            the machine has one, else the CPU. The model itself stays on the CPU: move it with ``to``.
        seed: seed for a head that the checkpoint lacks. The global random state does not change.
        tokenizer: the model's tokenizer, if :func:`load_tokenizer` has read it before. The model is then of the
            same commit, also if the hub has a newer one by now.

    Raises:
        BaseModelError: the model does not exist, the hub is unreachable, a file is damaged or
            lacks weights, or the architecture has no head for ``task``.
        ConfigurationError: the arguments contradict each other.
    """
    _check_arguments(task, num_labels)
    device = pick_device("auto" if device is None else str(device))
    quantisation: Any = dtype if dtype in QUANTISATIONS else None
    if quantisation:
        check_available(quantisation)
    source = resolve(name, revision=revision)
    if tokenizer is not None and tokenizer in _LOCATED:
        asked, known = _LOCATED[tokenizer]
        source = known if asked == source else source
    with quiet():
        located = locate(source, trust_remote_code, weights=True)
        source, notices = located.source, located.notices
        with _explained(located, task):
            config = read_config(located)
            if dtype == "auto":
                choice = choose_dtype(device, config)
                dtype = choice.dtype
                if choice.saves_memory:
                    notices.append(f"The dtype is {dtype_name(choice.dtype)}: {choice.reason}.")
            weights_dtype = compute_dtype(dtype, device)
            with projections_as_stored() if quantisation else nullcontext() as dtypes:
                settings = _head_settings(task, num_labels)
                if _unpack_while_loading(config):
                    config.update(settings)
                    settings = {"config": config}
                model, info = _load_model(located, task, weights_dtype, seed, settings)
        new_weights, checked = _check_weights(source, model, info, task, seed)
        notices += checked
        if tokenizer is None:
            tokenizer = tokenizer_of(located)
    if quantisation:
        notices += quantise_base(model, quantisation, dtypes, weights_dtype)
    require_exact_layers(model)
    prevent_repacking(model)
    if source.packaged or source.kind == "gguf":
        # The path of the weights on this machine means nothing on another one.
        model.config._name_or_path = source.name
    if source.revision is not None:  # transformers 5 does not set it, and an adapter records it
        model.config._commit_hash = source.revision
    base = Base(model.eval(), tokenizer, source, notices, new_weights)
    set_padding(base)
    return base


def load_tokenizer(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a base model; arguments as for :func:`load_base`.

    Raises:
        BaseModelError: the model does not exist, it has no tokenizer, or its tokenizer cannot be read.
    """
    asked = resolve(name, revision=revision)
    with quiet():
        located = locate(asked, trust_remote_code, weights=False)
        tokenizer = tokenizer_of(located)
    source = located.source
    if tokenizer is None:
        raise BaseModelError(
            f"'{source.name}' has no tokenizer. Name a base model that has one.{source.if_incomplete}"
        )
    _LOCATED[tokenizer] = asked, source
    return tokenizer


def _check_arguments(task: str, num_labels: int | None) -> None:
    if task not in MODEL_CLASSES:
        raise ConfigurationError(
            f"task '{task}' is not one of {', '.join(MODEL_CLASSES)}.{nearest(str(task), MODEL_CLASSES)}"
        )
    if num_labels is None:
        return
    if task not in _CLASSIFICATION:
        raise ConfigurationError(
            f"num_labels is only for classification, but the task is '{task}'. Leave num_labels out."
        )
    if num_labels < 2:
        raise ConfigurationError(
            f"num_labels is {num_labels}, but classification needs at least 2 classes. For a score, "
            "set task='regression'."
        )


def _silence() -> Callable[[], None]:
    """Silence the reports and progress bars of transformers; return a function that restores them."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:  # transformers has just disabled these too, but downloads can take minutes
        enable_progress_bars()

    def restore() -> None:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()

    return restore


quiet = SharedSetting(_silence).changed


@contextmanager
def _explained(located: Located, task: str) -> Iterator[None]:
    """Convert exceptions of transformers to a BaseModelError with the cause and, if it is known, the fix."""
    try:
        yield
    except LorakitError:
        raise
    # A checkpoint is untrusted input; its readers raise almost any exception.
    except Exception as error:
        source = located.source
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            reason = (
                "it needs Python code of its own. Read that code, and if you trust it, set "
                "trust_remote_code"
            )
        elif message.startswith("Unrecognized configuration class"):
            reason = f"transformers has no head for the task '{task}' on this architecture"
        elif "ignore_mismatched_sizes" in message:
            reason = (
                "the shapes of its weights differ from those that its config.json declares. Restore both files from "
                "the model's source"
            )
        elif type(error).__name__ == "SafetensorError":
            reason = (
                f"its weights file is damaged or cut off ({message}). Download or copy it again"
            )
        else:
            reason = f"{type(error).__name__}: {message[:500].rstrip('.')}"
            if isinstance(error, OSError) and source.from_cache:
                reason += f".{source.if_incomplete}"
        if source.kind == "gguf":
            reason += f". To convert the GGUF file again, delete '{located.path}'"
        raise BaseModelError(
            f"'{source.name}' cannot be loaded for the task '{task}': {reason.rstrip('.')}."
        ) from error


def _head_settings(task: ModelHead, num_labels: int | None) -> dict[str, Any]:
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    return {} if num_labels is None else {"num_labels": num_labels}


def _unpack_while_loading(config: PretrainedConfig) -> bool:
    """Let transformers unpack a checkpoint of compressed-tensors while it loads it; return whether it is one.

    Without this setting the first forward pass unpacks all weights, and leaves layers that no adapter can be on
    (`lorakit.models.packed.require_own_parameters`).
    """
    record = getattr(config, "quantization_config", None)
    if not isinstance(record, dict) or record.get("quant_method") != "compressed-tensors":
        return False
    record["dequantize"] = True
    return True


def _load_model(
    located: Located, task: ModelHead, dtype: torch.dtype, seed: int, settings: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model, and transformers' report of missing, unexpected and mismatched weights."""
    # With PEFT installed, transformers adds an adapter that lies beside the model, and reports the adapter's missing
    # weights in place of the model's. Let it search in a folder that does not exist.
    no_adapter = {"subfolder": "no-adapter", "local_files_only": located.source.from_cache}
    # By default, transformers 5.25 replaces layers by compiled code from the hub, which may skip a layer's adapter.
    own = {"adapter_kwargs": no_adapter, "use_kernels": False}
    settings = located.options | settings | own
    with seeded(seed, [torch.get_default_device()]):
        return model_class(task).from_pretrained(
            located.path,
            dtype=dtype,
            output_loading_info=True,
            # Replaces a head with another number of classes by a new one; _check_weights rejects
            # other replaced weights.
            ignore_mismatched_sizes=task in _WITH_NEW_HEADS,
            **settings,
        )


def _check_weights(
    source: ModelSource, model: PreTrainedModel, info: dict[str, Any], task: str, seed: int
) -> tuple[list[str], list[str]]:
    """Reject a model with random weights that the checkpoint should contain; return the other ones, and notices."""
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *mismatched})
    heads = classification_head(model) if task in _WITH_NEW_HEADS else []

    def may_be_new(name: str) -> bool:
        # Encoders trained on masked tokens have no pooler; classifiers add one.
        in_pooler = "pooler" in name.split(".") and name not in mismatched
        return in_pooler or is_inside(name, *heads)

    wrong = [name for name in new if not may_be_new(name)]
    if wrong and task == "causal-lm" and is_encoder(model.config):
        raise BaseModelError(
            f"'{source.name}' is an encoder without a language-model head, so it cannot generate text. Use a decoder "
            "such as smollm2-135m, or data with labels (load_base(..., task='sequence-classification'))."
        )
    if wrong:
        raise BaseModelError(
            f"The checkpoint of '{source.name}' lacks {len(wrong)} of the weights that "
            f"{type(model).__name__} needs ({listed(wrong, 4)}), so they would be random. It was saved for "
            f"another task than '{task}', or is incomplete."
        )
    notices = []
    if new:
        replaced = " (the checkpoint's has another number of outputs)" if mismatched else ""
        notices.append(f"{NEW_WEIGHTS} (seed {seed}), to be trained{replaced}: {listed(new, 4)}.")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        notices.append(
            f"Weights of the checkpoint that this task does not use: {listed(unused, 4)}."
        )
    return new, notices


def set_padding(base: Base) -> None:
    """Set the padding token of the tokenizer, and the same one in the model's configuration."""
    model, tokenizer = base.model, base.tokenizer
    if tokenizer is None:
        if model.main_input_name == "input_ids":
            base.notices.append(
                f"'{base.source.name}' has no tokenizer.{base.source.if_incomplete}"
            )
        return
    config = model.config.get_text_config()
    ids = 1 + max(tokenizer.get_vocab().values())
    embeddings = getattr(input_embeddings(model), "num_embeddings", ids)
    found = []
    if ids > embeddings:
        found.append(
            f"The tokenizer has {ids} ids, but the model only {embeddings} embeddings. "
            "Check that they belong together."
        )
    # Where transformers warns, which `quiet` hides; also where the setting is false on purpose.
    setting, backend = "fix_mistral_regex", getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, setting, None) is False and setting not in tokenizer.init_kwargs:
        found.append(
            "The tokenizer may split some texts in another way than in the model's training: it was saved with a wrong "
            f'pattern. In tokenizer_config.json of a local copy, set "{setting}" to true, or to false to keep it.'
        )
    # The tokenizer of an adapter may be a copy of the base's own one.
    base.notices += [notice for notice in found if notice not in base.notices]
    if notice := _set_pad_token(tokenizer, config, embeddings):
        base.notices.append(notice)
    if tokenizer.pad_token is None:
        return
    # A classifier skips padding to find the last token of a row, so both must use the same token.
    if (configured := getattr(config, "pad_token_id", None)) != tokenizer.pad_token_id:
        if configured is not None:
            base.notices.append(
                f"The tokenizer pads with token {tokenizer.pad_token_id}, but the model's configuration says "
                f"{configured}; the tokenizer's is used."
            )
        config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        set_generation(generation, pad_token_id=tokenizer.pad_token_id)


def set_generation(generation: Any, **settings: Any) -> None:
    """Change a model's generation configuration so that it can still be saved.

    transformers refuses to save flags that contradict each other, such as a temperature without do_sample. It only
    warns if the configuration is as it was loaded, and some published bases have such flags.
    """
    is_as_loaded = getattr(generation, "_original_object_hash", None) == hash(generation)
    for name, value in settings.items():
        setattr(generation, name, value)
    if is_as_loaded:
        generation._original_object_hash = hash(generation)


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, config: Any, embeddings: int) -> str:
    """Give a tokenizer a padding token that has an embedding; return a notice if it had none, else an empty string."""
    own: Any = tokenizer.pad_token_id
    problem = "The tokenizer has no padding token"
    if own is not None and own >= embeddings:  # many bases have such a token, which needs no vector
        problem = f"The tokenizer pads with token {own}, which has no embedding"
        tokenizer.pad_token = None
    if tokenizer.pad_token is None:
        known = getattr(config, "pad_token_id", None)
        if known is not None and 0 <= known < min(len(tokenizer), embeddings):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token is not None:
        return ""
    if tokenizer.eos_token is None:
        return f"{problem}, and there is no end token."
    tokenizer.pad_token = tokenizer.eos_token
    return f"{problem}; {tokenizer.eos_token} is used."
