"""The model card: README.md in an adapter's folder, in the format of the Hugging Face hub."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import transformers
from huggingface_hub import ModelCardData

from lorakit.adapters.formats.peft import PeftForm
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.configuration import setting
from lorakit.formatting import counted, listed, number
from lorakit.methods.combined import lora_of
from lorakit.methods.combined import parts as methods_in
from lorakit.methods.lora import LoRA
from lorakit.methods.method import describe
from lorakit.methods.registry import METHODS, unused_settings
from lorakit.models.model_classes import head_of_class
from lorakit.models.packaged import PACKAGED_MODELS
from lorakit.models.sources import is_gguf

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank."""

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
"""PEFT's task_type -> the hub's pipeline_tag."""

_KINDS = {
    "LoRA": "LoRA adapter",
    "FullFineTuning": "Fine-tuned weights",
    "BitFit": "BitFit biases",
    "BottleneckAdapter": "Bottleneck adapter",
    "Combined": "Combined adapter",
    "PrefixEmbedding": "Prefix embeddings",
    "PrefixLayer": "Prefix vectors of every block",
}

_PACKAGED = {model.name for model in PACKAGED_MODELS}


def card(stored: StoredAdapter, form: PeftForm | None) -> str:
    """Return the card's text; `form` is the adapter in PEFT's format, or None if PEFT cannot load the folder."""
    sections = [
        _front_matter(stored, form),
        f"# {_title(stored)}",
        _summary(stored),
        *_loading(stored, form),
        _scores(stored.provenance),
        _data(stored.provenance),
        _settings(stored),
        _notes(stored),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(stored: StoredAdapter, form: PeftForm | None) -> str:
    base = stored.base_name
    data = ModelCardData(
        # The hub rejects a card whose base_model is not of the form owner/name.
        base_model=base if base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) else None,
        library_name="peft" if form is not None else "lorakit",
        pipeline_tag=_PIPELINES.get(form.config["task_type"]) if form is not None else None,
        tags=["lorakit", "lora"] if lora_of(stored.method) else ["lorakit"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _title(stored: StoredAdapter) -> str:
    kind = _KINDS.get(type(stored.method).__name__, "Adapter")
    base = stored.base_name
    return f"{kind} for {_plain(base)}" if base else kind


def _summary(stored: StoredAdapter) -> str:
    method, base = stored.method, stored.base
    rows = {"Base model": _code(stored.base_name or "not recorded")}
    if base is not None:
        if base.source.revision:
            rows["Base revision"] = _code(base.source.revision)
        rows["Base class"] = _code(base.architecture.class_name)
        rows["Base weights"] = f"{base.weights.dtype}, SHA-256 {_hash(base.weights.exact)}"
    if isinstance(method, LoRA):
        ranks = sorted({layer.rank for layer in stored.layers.values()})
        scalings = sorted({layer.scaling for layer in stored.layers.values()})
        options = [
            name
            for name, used in (
                ("DoRA", method.dora),
                ("Bias of B", method.lora_bias),
                ("rsLoRA", method.scaling == "rslora"),
                ("PiSSA", method.init == "pissa"),
                (f"dropout {method.dropout:g}", bool(method.dropout)),
                (f"biases: {method.bias}", method.bias != "none"),
            )
            if used
        ]
        rows["Method"] = ", ".join(["LoRA", *options])
        rows["Rank"] = ", ".join(map(str, ranks))
        rows["Scaling"] = ", ".join(f"{scaling:g}" for scaling in scalings)
        rows["Targets"] = listed([_code(target) for target in method.targets], 8)
        if method.train_modules:
            rows["Trained in full"] = ", ".join(_code(m) for m in method.train_modules)
        rows["Adapted layers"] = str(len(stored.layers))
    else:
        rows["Method"] = _code(describe(method))
    rows["Trained parameters"] = f"{stored.num_parameters:,}"
    return _table(("", ""), rows.items())


def _loading(stored: StoredAdapter, form: PeftForm | None) -> list[str]:
    base, revision = stored.base_name or "<the base model>", _revision(stored)
    load = _base_code(stored)
    own = [m for m in map(type, methods_in(stored.method)) if m.__name__ not in METHODS]
    parts = [
        "## How to load it",
        "With lorakit, which checks that the base is the right one:",
        _python(
            load,
            *(f'lorakit.use_method("path/to/its/file.py:{method.__name__}")' for method in own),
            'adapters = lorakit.load(model, "path/to/this/folder")',
            imports=["import lorakit"],
        ),
    ]
    if form is None:
        return [*parts, "PEFT and vLLM cannot load it: PEFT's format cannot represent it."]
    parts += [
        "With PEFT:",
        _python(
            load,
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            imports=["from peft import PeftModel"],
        ),
    ]
    parts += form.notices
    obstacle = vllm_obstacle(form)
    if obstacle is not None:
        return [*parts, f"vLLM cannot load it as an adapter: {obstacle}"]
    highest = max([form.config["r"], *form.config["rank_pattern"].values()])
    rank = next(rank for rank in _VLLM_RANKS if rank >= highest)
    if (own_name := _name_of_lorakit(stored)) is not None:
        call = f"lorakit.load_base({json.dumps(own_name)}).model.save_pretrained(...)"
        parts.append(f"vLLM needs the base as a folder: {_code(call)}.")
        base = "path/to/that/folder"
    at = f" --revision {_shell(revision)}" if revision else ""
    command = (
        f"vllm serve {_shell(base)}{at} --enable-lora --max-lora-rank {rank} \\\n"
        "    --lora-modules adapter=path/to/this/folder"
    )
    return [*parts, "With vLLM:", _block("sh", command)]


def _base_code(stored: StoredAdapter) -> str:
    """Return the expression with which Python loads the base."""
    name, revision = stored.base_name, _revision(stored)
    class_name = stored.base.architecture.class_name if stored.base else ""
    labels = _num_labels(stored) if class_name.endswith("Classification") else None
    if (own_name := _name_of_lorakit(stored)) is not None:
        unknown = "base" if class_name else None
        # Of these bases, T5 alone has the suffix that encoder-decoders share with models of images and text.
        head = head_of_class(class_name, is_encoder_decoder=True) or unknown
        arguments = {"task": head, "num_labels": labels}
        if labels == 1:
            arguments = {"task": "regression"}
        return f"lorakit.load_base({_arguments(own_name, arguments)}).model"
    if name is None or not class_name.isidentifier() or class_name not in _class_names():
        return "...  # the base model"
    arguments = {"num_labels": labels, "revision": revision}
    return f"transformers.{class_name}.from_pretrained({_arguments(name, arguments)})"


def _name_of_lorakit(stored: StoredAdapter) -> str | None:
    """Return the name of a base that transformers does not load: a GGUF file, or a short name for a Python package."""
    name = stored.base_name
    if name is not None and is_gguf(name):
        return f"path/to/{PurePath(name).name}"
    return name if name in _PACKAGED else None


@functools.cache
def _class_names() -> frozenset[str]:
    """Return the names in transformers. Listing them takes a tenth of a second; `hasattr` would import a class."""
    return frozenset(dir(transformers))


def _num_labels(stored: StoredAdapter) -> int | None:
    """Return the number of outputs of the classifier or regressor, None if it is not known."""
    if stored.base is not None and stored.base.layout is not None:
        return stored.base.layout.num_labels
    if stored.provenance.get("generic_task") == "regression":
        return 1
    labels = stored.provenance.get("labels")
    return len(labels) if isinstance(labels, list) and labels else None


def _revision(stored: StoredAdapter) -> str | None:
    return stored.base.source.revision if stored.base is not None else None


def vllm_obstacle(form: PeftForm) -> str | None:
    """Return why vLLM cannot serve an adapter in this form, or None."""
    config = form.config
    ranks = {config["r"], *config["rank_pattern"].values()}
    merge = "Merge the adapter and serve the model."
    obstacles = (
        (config["task_type"] != "CAUSAL_LM", "it adapts only causal language models."),
        (config["modules_to_save"], f"modules are trained in full (modules_to_save). {merge}"),
        (config["use_dora"], f"it uses DoRA. {merge}"),
        (config.get("lora_bias"), f"B has a bias (lora_bias). {merge}"),
        (config["bias"] != "none", f"biases are trained. {merge}"),
        # Older versions of vLLM scale every layer by lora_alpha / r and ignore the patterns without an error.
        (config["alpha_pattern"] or len(ranks) > 1, f"ranks or scalings differ by layer. {merge}"),
        (any("lora_embedding" in key for key in form.tensors), f"it adapts an embedding. {merge}"),
        (any(t.ndim > 2 for t in form.tensors.values()), f"it adapts convolutions. {merge}"),
        (max(ranks) > _VLLM_RANKS[-1], f"its rank is above {_VLLM_RANKS[-1]}. {merge}"),
    )
    return next((reason for applies, reason in obstacles if applies), None)


def _scores(provenance: Mapping[str, Any]) -> str:
    after, before = provenance.get("scores"), provenance.get("scores_before")
    if not isinstance(after, Mapping) or not after:
        return ""
    columns = [before, after] if isinstance(before, Mapping) and before else [after]
    # Before its training a classifier has a random head, so that its scores are not those of the base.
    header = ("", "before training", "this adapter") if len(columns) == 2 else ("", "")
    rows = [(_plain(k), *(_number(scores.get(k)) for scores in columns)) for k in sorted(after)]
    return f"## Scores\n\n{_scored_on(provenance)}{_table(header, rows)}"


def _scored_on(provenance: Mapping[str, Any]) -> str:
    """Return the sentence with the number of examples that a run scores; "" if it is not recorded."""
    count = setting(provenance, "data.validation.examples")
    limit = setting(provenance, "config.evaluation.limit")
    if not isinstance(count, int):
        return ""
    count = min(count, limit) if isinstance(limit, int) else count
    return f"On {counted(count, 'validation example')}.\n\n"


def _data(provenance: Mapping[str, Any]) -> str:
    data = provenance.get("data")
    if not isinstance(data, Mapping) or not data:
        return ""
    rows = []
    for split, about in sorted(data.items()):
        about = about if isinstance(about, Mapping) else {"source": about}
        source, digest = _plain(about.get("source", "")), _hash(about.get("sha256"))
        rows.append((_plain(split), source, _number(about.get("examples")), digest))
    return "## Data\n\n" + _table(("split", "source", "examples", "SHA-256"), rows)


def _settings(stored: StoredAdapter) -> str:
    shown = {
        k: stored.provenance[k]
        for k in ("config", "made_by", "made_from", "seed", "versions")
        if k in stored.provenance
    }
    if not shown:
        return ""
    config = shown.get("config")
    if isinstance(config, Mapping):
        unused = unused_settings(config)
        shown["config"] = {name: value for name, value in config.items() if name not in unused}
    text = json.dumps(shown, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    return f"## How it was made\n\n{_block('json', text)}\n\n`lorakit.json` holds the full record."


def _notes(stored: StoredAdapter) -> str:
    if not stored.notices:
        return ""
    return "## Notes\n\n" + "\n".join(f"- {_plain(notice)}" for notice in stored.notices)


# --- text ----------------------------------------------------------------------------------------


def _python(base: str, *lines: str, imports: list[str]) -> str:
    """Return a block of Python that loads the base, and then runs `lines`."""
    first = base.partition(".")[0]
    if first in ("lorakit", "transformers"):
        imports = sorted({*imports, f"import {first}"}, key=lambda line: line.startswith("from"))
    return _block("python", "\n".join([*imports, "", f"model = {base}", *lines]))


def _arguments(first: str, others: Mapping[str, Any]) -> str:
    named = (f"{name}={json.dumps(value)}" for name, value in others.items() if value is not None)
    return ", ".join([json.dumps(first), *named])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(value: Any) -> str:
    """Return untrusted text on one line, escaped for Markdown and HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).split()).replace('`', '').replace('|', '/')}`"


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text) or [""]))
    return f"{fence}{language}\n{text}\n{fence}"


def _shell(value: str) -> str:
    return value if re.fullmatch(r"[\w./:-]+", value) else "<the base model>"


def _hash(digest: Any) -> str:
    return f"`{digest[:16]}…`" if isinstance(digest, str) and digest.isalnum() else "not recorded"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _plain(value or "")
    return number(value)
