"""The model card: README.md in an adapter's folder, in the format of the Hugging Face hub."""

from __future__ import annotations

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
from lorakit.formatting import counted, number
from lorakit.methods.combined import lora_of
from lorakit.methods.combined import parts as methods_in
from lorakit.methods.method import describe
from lorakit.methods.registry import METHODS, unused_settings
from lorakit.models.model_classes import head_of_class
from lorakit.models.packaged import PACKAGED_MODELS
from lorakit.models.sources import is_gguf

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank."""

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
"""PEFT's task_type -> the hub's pipeline_tag."""

_CARD = """\
---
{front_matter}
---

# {title}

{facts}

## How to load it

With lorakit, which checks that the base is the right one:

```python
import lorakit
import transformers

model = {base}
{use_methods}adapters = lorakit.load(model, "path/to/this/folder")
```

{others}

{scores}

{data}

{settings}

{notes}
"""

_PEFT = """\
With PEFT:

```python
import lorakit
import transformers
from peft import PeftModel

model = {base}
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```"""

_VLLM = """\
With vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} \\
    --lora-modules adapter=path/to/this/folder
```"""


def card(stored: StoredAdapter, form: PeftForm | None) -> str:
    """Return the card's text; `form` is the adapter in PEFT's format, or None if PEFT cannot load the folder."""
    kind = "LoRA" if lora_of(stored.method) else type(stored.method).__name__
    base, provenance, base_code = stored.base_name, stored.provenance, _base_code(stored)
    own = [m for m in map(type, methods_in(stored.method)) if m.__name__ not in METHODS]
    text = _CARD.format(
        front_matter=_front_matter(stored, form),
        title=f"{kind} adapter" + (f" for {_plain(base)}" if base else ""),
        facts=_facts(stored),
        base=base_code,
        use_methods="".join(
            f'lorakit.use_method("path/to/its/file.py:{method.__name__}")\n' for method in own
        ),
        others="\n\n".join(_other_libraries(stored, form, base_code)),
        scores=_scores(provenance),
        data=_data(provenance),
        settings=_settings(provenance),
        notes="\n".join(f"- {_plain(notice)}" for notice in stored.notices),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _front_matter(stored: StoredAdapter, form: PeftForm | None) -> str:
    base = stored.base_name
    return ModelCardData(
        # The hub rejects a card whose base_model is not of the form owner/name.
        base_model=base if base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) else None,
        library_name="peft" if form is not None else "lorakit",
        pipeline_tag=_PIPELINES.get(form.config["task_type"]) if form is not None else None,
        tags=["lorakit", "lora"] if lora_of(stored.method) else ["lorakit"],
    ).to_yaml()


def _facts(stored: StoredAdapter) -> str:
    base, layers = stored.base, stored.layers.values()
    rows = {"Base model": _code(stored.base_name or "not recorded")}
    if base is not None:
        rows |= {"Base revision": _code(base.revision)} if base.revision else {}
        rows["Base class"] = _code(base.class_name)
        rows["Base weights"] = f"{base.dtype}, SHA-256 {_hash(base.exact)}"
    method = describe(stored.method)  # which may list hundreds of layers
    rows["Method"] = _code(method if len(method) < 300 else f"{method[:297]}...")
    if layers:
        rows["Rank"] = ", ".join(map(str, sorted({layer.rank for layer in layers})))
        rows["Scaling"] = ", ".join(f"{s:g}" for s in sorted({layer.scaling for layer in layers}))
        rows["Adapted layers"] = str(len(layers))
    rows["Trained parameters"] = f"{stored.num_parameters:,}"
    return _table(("", ""), rows.items())


# --- how to load it ------------------------------------------------------------------------------


def _base_code(stored: StoredAdapter) -> str:
    """Return the expression with which Python loads the base."""
    name, base = stored.base_name, stored.base
    class_name = base.class_name if base is not None else ""
    labels = _num_labels(stored) if class_name.endswith("Classification") else None
    if name is not None and (path := _lorakits_name(name)) is not None:
        # Of these bases, T5 alone has the suffix that encoder-decoders share with models of images and text.
        head = head_of_class(class_name, is_encoder_decoder=True) or (
            "base" if class_name else None
        )
        arguments = {"task": head, "num_labels": labels}
        if labels == 1:
            arguments = {"task": "regression"}
        return f"lorakit.load_base({_arguments(path, arguments)}).model"
    if name is None or not class_name.isidentifier() or class_name not in dir(transformers):
        return "...  # the base model"
    arguments = {"num_labels": labels, "revision": base.revision if base is not None else None}
    return f"transformers.{class_name}.from_pretrained({_arguments(name, arguments)})"


def _lorakits_name(name: str) -> str | None:
    """Return the name of a base that transformers does not load: a GGUF file, or a short name for a Python package."""
    if is_gguf(name):
        return f"path/to/{PurePath(name).name}"
    return name if any(name == model.name for model in PACKAGED_MODELS) else None


def _num_labels(stored: StoredAdapter) -> int | None:
    """Return the number of outputs of the classifier or regressor, None if it is not known."""
    if stored.layout is not None:
        return stored.layout.num_labels
    if stored.provenance.get("generic_task") == "regression":
        return 1
    labels = stored.provenance.get("labels")
    return len(labels) if isinstance(labels, list) and labels else None


def _arguments(first: str, others: Mapping[str, Any]) -> str:
    named = (f"{name}={json.dumps(value)}" for name, value in others.items() if value is not None)
    return ", ".join([json.dumps(first), *named])


def _other_libraries(stored: StoredAdapter, form: PeftForm | None, base_code: str) -> list[str]:
    if form is None:
        return ["PEFT and vLLM cannot load it: PEFT's format cannot represent it."]
    parts = [_PEFT.format(base=base_code), *form.notices]
    if (obstacle := vllm_obstacle(form)) is not None:
        return [*parts, f"vLLM cannot load it as an adapter: {obstacle}"]
    base, revision = stored.base_name or "", stored.base.revision if stored.base else None
    if (path := _lorakits_name(base)) is not None:
        call = f"lorakit.load_base({json.dumps(path)}).model.save_pretrained(...)"
        parts.append(f"vLLM needs the base as a folder: {_code(call)}.")
        base = "path/to/that/folder"
    shell = [base, *(["--revision", revision] if revision else [])]
    is_plain = all(re.fullmatch(r"[\w./:-]+", word) for word in shell)
    highest = max([form.config["r"], *form.config["rank_pattern"].values()])
    rank = next(rank for rank in _VLLM_RANKS if rank >= highest)
    return [
        *parts,
        _VLLM.format(base=" ".join(shell) if is_plain else "<the base model>", rank=rank),
    ]


def vllm_obstacle(form: PeftForm) -> str | None:
    """Return why vLLM cannot serve an adapter in this form, or None."""
    config = form.config
    ranks = {config["r"], *config["rank_pattern"].values()}
    obstacles = (
        (config["task_type"] != "CAUSAL_LM", "it adapts only causal language models"),
        (config["modules_to_save"], "modules are trained in full (modules_to_save)"),
        (config["use_dora"], "it uses DoRA"),
        (config.get("lora_bias"), "B has a bias (lora_bias)"),
        (config["bias"] != "none", "biases are trained"),
        # Older versions of vLLM scale every layer by lora_alpha / r and ignore the patterns without an error.
        (config["alpha_pattern"] or len(ranks) > 1, "ranks or scalings differ by layer"),
        (any("lora_embedding" in key for key in form.tensors), "it adapts an embedding"),
        (any(t.ndim > 2 for t in form.tensors.values()), "it adapts convolutions"),
        (max(ranks) > _VLLM_RANKS[-1], f"its rank is above {_VLLM_RANKS[-1]}"),
    )
    found = next((reason for applies, reason in obstacles if applies), None)
    return None if found is None else f"{found}. Merge the adapter and serve the model."


# --- how it was made -----------------------------------------------------------------------------


def _scores(provenance: Mapping[str, Any]) -> str:
    after, before = provenance.get("scores"), provenance.get("scores_before")
    if not isinstance(after, Mapping) or not after:
        return ""
    columns = [before, after] if isinstance(before, Mapping) and before else [after]
    # Before its training a classifier has a random head, so that its scores are not those of the base.
    header = ("", "before training", "this adapter") if len(columns) == 2 else ("", "")
    rows = [(_plain(k), *(_number(scores.get(k)) for scores in columns)) for k in sorted(after)]
    count, limit = (
        setting(provenance, name)
        for name in ("data.validation.examples", "config.evaluation.limit")
    )
    scored = ""
    if isinstance(count, int):
        count = min(count, limit) if isinstance(limit, int) else count
        scored = f"On {counted(count, 'validation example')}.\n\n"
    return f"## Scores\n\n{scored}{_table(header, rows)}"


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


def _settings(provenance: Mapping[str, Any]) -> str:
    names = ("config", "made_by", "made_from", "seed", "versions")
    shown = {name: provenance[name] for name in names if name in provenance}
    if not shown:
        return ""
    config = shown.get("config")
    if isinstance(config, Mapping):
        unused = unused_settings(config)
        shown["config"] = {name: value for name, value in config.items() if name not in unused}
    text = json.dumps(shown, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text) or [""]))
    return (
        f"## How it was made\n\n{fence}json\n{text}\n{fence}\n\n"
        "`lorakit.json` holds the full record."
    )


# --- text ----------------------------------------------------------------------------------------


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(value: Any) -> str:
    """Return untrusted text on one line, escaped for Markdown and HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).split()).replace('`', '').replace('|', '/')}`"


def _hash(digest: Any) -> str:
    return f"`{digest[:16]}…`" if isinstance(digest, str) and digest.isalnum() else "not recorded"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _plain(value or "")
    return number(value)
