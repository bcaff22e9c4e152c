"""The model card: README.md in an adapter's folder, in the format of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

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
With PEFT, on the base model of transformers:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
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
    base, provenance = stored.base_name, stored.provenance
    own = [m for m in map(type, methods_in(stored.method)) if m.__name__ not in METHODS]
    text = _CARD.format(
        front_matter=_front_matter(stored, form),
        title=f"{kind} adapter" + (f" for {_plain(base)}" if base else ""),
        facts=_facts(stored),
        base=_base_code(stored),
        use_methods="".join(
            f'lorakit.use_method("path/to/its/file.py:{method.__name__}")\n' for method in own
        ),
        others="\n\n".join(_other_libraries(stored, form)),
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
    if name is None or base is None:
        return "...  # the base model"
    is_encoder_decoder = bool((base.configuration or {}).get("is_encoder_decoder"))
    head = head_of_class(base.class_name, is_encoder_decoder=is_encoder_decoder)
    arguments: dict[str, Any] = {"task": head or "base", "revision": base.revision}
    if base.class_name.endswith("Classification"):
        labels = _num_labels(stored)
        arguments |= {"task": "regression"} if labels == 1 else {"num_labels": labels}
    words = (f"{key}={json.dumps(value)}" for key, value in arguments.items() if value is not None)
    return f"lorakit.load_base({', '.join([json.dumps(_path_of(name)), *words])}).model"


def _path_of(name: str) -> str:
    """Return the name of a base, with a folder before that of a GGUF file, whose folder is not recorded."""
    return f"path/to/{PurePath(name).name}" if is_gguf(name) else name


def _num_labels(stored: StoredAdapter) -> int | None:
    """Return the number of outputs of the classifier or regressor, None if it is not known."""
    if stored.layout is not None:
        return stored.layout.num_labels
    if stored.provenance.get("generic_task") == "regression":
        return 1
    labels = stored.provenance.get("labels")
    return len(labels) if isinstance(labels, list) and labels else None


def _other_libraries(stored: StoredAdapter, form: PeftForm | None) -> list[str]:
    if form is None:
        return ["PEFT and vLLM cannot load it: PEFT's format cannot represent it."]
    parts = [_PEFT, *form.notices]
    if (obstacle := vllm_obstacle(form)) is not None:
        return [*parts, f"vLLM cannot load it as an adapter: {obstacle}"]
    name, revision = stored.base_name or "", stored.base.revision if stored.base else None
    if is_gguf(name) or any(name == model.name for model in PACKAGED_MODELS):
        call = f"lorakit.load_base({json.dumps(_path_of(name))}).model.save_pretrained(...)"
        parts.append(f"vLLM needs the base as a folder: {_code(call)}.")
        name = "path/to/that/folder"
    shell = [name, *(["--revision", revision] if revision else [])]
    is_plain = all(re.fullmatch(r"[\w./:-]+", word) for word in shell)
    highest = max([form.config["r"], *form.config["rank_pattern"].values()])
    rank = next(rank for rank in _VLLM_RANKS if rank >= highest)
    base = " ".join(shell) if is_plain else "<the base model>"
    return [*parts, _VLLM.format(base=base, rank=rank)]


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
