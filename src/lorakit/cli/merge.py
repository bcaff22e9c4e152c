"""`lorakit merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.compute.adapted_config import AdaptedConfig
from lorakit.configuration import LocalPath
from lorakit.errors import RunFolderError
from lorakit.file_names import TOKENIZER_FILES
from lorakit.models.base_config import BaseConfig

MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    "model.safetensors.index.json",
)
"""Files that `save_pretrained` of a model writes."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(AdaptedConfig):
    """Options of `lorakit merge`."""

    adapter: LocalPath
    """Adapter folder."""
    output: LocalPath
    """Folder for the merged model. Must not exist unless overwrite is set."""
    base: BaseConfig | None = None
    """The base model; its dtype is that of the merged model. By default the base that the adapter records, in dtype
    auto. base.dtype float32 alone merges into that base without rounding."""
    overwrite: bool = False
    """Replace an existing output folder."""


CONFIGS = (MergeConfig,)


def run(argv: Sequence[str]) -> None:
    """Merge and save, and print how closely the merged model follows the adapter."""
    config = parse(
        MergeConfig,
        "merge",
        "Merge an adapter into its base and save an ordinary model, which needs neither lorakit nor PEFT.",
        argv,
        "adapter",
        "output",
    )
    # Before the imports of PyTorch, which take seconds.
    output = storage.require_free_folder(config.output, overwrite=config.overwrite)
    from transformers import PreTrainedModel
    from transformers.utils import logging

    from lorakit.adapters.handle import own_handle
    from lorakit.compute.adapted import open_adapted
    from lorakit.compute.adapter_file import AdapterFile, recorded_task
    from lorakit.compute.merge_verdict import judge_merge
    from lorakit.evaluation.generation_settings import ending_tokens, ending_tokens_of_model
    from lorakit.models.dtype_choice import MERGED
    from lorakit.models.dtypes import dtype_name
    from lorakit.models.loading import set_generation
    from lorakit.models.tokenizer import save_sentencepiece
    from lorakit.storage.tensors import use_default_mode

    storage.require_replaceable(
        output,
        "a merged model's",
        written=(*MODEL_FILES, *TOKENIZER_FILES),
        marks=("config.json",),
    )
    adapter = AdapterFile.read(config.adapter)
    assert adapter is not None  # the path is set
    task = recorded_task(adapter)
    base = open_adapted(config.base, adapter, allow_other_base=config.allow_other_base)
    if storage.is_within(base.source.path_or_id, output):
        raise RunFolderError(
            f"'{output}' is the base of the merge, and overwriting would delete it. Choose another folder."
        )
    model, tokenizer = base.model, base.text_tokenizer
    handle = own_handle(model)
    assert handle is not None
    handle.require_mergeable()  # fail before the first forward pass

    def merged() -> PreTrainedModel:
        handle.merge(keep_base=False)
        return model

    stops = task.type.stop_ids(tokenizer) if task else []
    new = [token for token in stops if token not in ending_tokens_of_model(model)]
    if new:  # a chat's end-of-turn token, which a base that is no chat model does not stop at
        ends = list(dict.fromkeys([*ending_tokens(model, tokenizer), *new]))
        set_generation(model.generation_config, eos_token_id=ends)
    verdict = judge_merge(base, adapter.stored, merged)
    logging.disable_progress_bar()
    with storage.atomic_folder(config.output, overwrite=config.overwrite) as temporary:
        setattr(model.config, MERGED, True)
        model.save_pretrained(temporary)
        use_default_mode(*temporary.glob("*.safetensors"))
        tokenizer.save_pretrained(temporary)
        save_sentencepiece(base.source, tokenizer, temporary)
    print(f"Merged model in {config.output} ({dtype_name(model.dtype)}).")
    if new:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
        print(f"Its generation_config.json ends texts at {names} too, as in training.")
    for sentence in verdict.sentences():
        print(sentence)
    print(f'Load it with: {type(model).__name__}.from_pretrained("{config.output}")')
