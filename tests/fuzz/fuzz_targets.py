"""The readers under test: small valid files, a mutator, and a check of what the reader returns.

A check reads the files of a folder. It returns the messages of the rows that the reader rejected, raises LorakitError
if the reader rejected the file, and `Mismatch` if the reader accepted a file and is wrong about its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutators as mutators
import jinja2.sandbox
import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet
import torch
from fuzz_parsers import (
    Gguf,
    strict_csv,
    strict_json,
    strict_jsonl,
    strict_safetensors,
)
from tokenizers import Tokenizer

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "adapters/formats", TESTS / "models"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import at_rest
import tiny_gguf
import tiny_models
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from lorakit.adapters import formats
from lorakit.adapters.formats import lorakit_json
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.data.readers import reader_for
from lorakit.data.rows import Problem, Row
from lorakit.errors import BaseModelError
from lorakit.models.gguf import converted_folder
from lorakit.models.loading import load_tokenizer
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.task import BadRow

Files = dict[str, bytes]
"""The content of a folder."""


class Mismatch(Exception):
    """A reader accepts a file and is wrong about its content."""

    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, str(detail)


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    seeds: Callable[[Path], list[Files]]
    """Returns valid inputs; may use the folder for temporary files."""
    mutate: Callable[[Random, Files, Files], Files]
    """Changes an input; the other one is to splice from."""
    check: Callable[[Path], list[str]]


def _strictly(parse: Callable[..., Any], *arguments: Any) -> Any:
    """Parse a file that a reader has accepted."""
    try:
        return parse(*arguments)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mismatch(
            f"accepts what a strict parser rejects: {type(error).__name__}", error
        ) from error


def _require(truth: bool, kind: str, detail: object = "") -> None:
    if not truth:
        raise Mismatch(kind, detail)


def _same(one: Any, two: Any) -> bool:
    """Whether values are equal and of equal types, also those inside."""
    return repr(one) == repr(two)


def _of_file(
    name: str, *choices: mutators.Mutator, raw: float = 0.1
) -> Callable[[Random, Files, Files], Files]:
    """Return a function that mutates one file; with probability `raw`, any of its bytes."""

    def mutate(random: Random, files: Files, other: Files) -> Files:
        choice = mutators.bytes_mutator if random.random() < raw else random.choice(choices)
        return {**files, name: choice(random, files[name], other.get(name, b""))}

    return mutate


def _content(folder: Path) -> Files:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# --- adapters -------------------------------------------------------------------------------------

RECORD, CONFIG = "lorakit.json", "adapter_config.json"
OWN_TENSORS, PEFT_TENSORS = "lorakit_model.safetensors", "adapter_model.safetensors"


def _adapters(folder: Path) -> list[StoredAdapter]:
    linear, embedding = at_rest.linear, at_rest.embedding
    slices = at_rest.contiguous(8, 0, 2)
    return [
        at_rest.adapter(
            {"a.q": linear(), "a.v": linear(rank=1, alpha=3.0)},
            settings={"rank_pattern": {"a.v": 1}},
        ),
        at_rest.adapter({"a.q": at_rest.with_dora(linear())}),
        at_rest.adapter({"c_attn": at_rest.fused(*slices)}),
        at_rest.adapter(
            {"a.q": linear(), "wte": embedding(rank=2)},
            trained={"a.q.bias": at_rest.numbers(8)},
            settings={"bias": "lora_only"},
        ),
        at_rest.adapter({"conv": at_rest.convolution()}),
        at_rest.adapter({"a.q": at_rest.with_start(linear())}, settings={"init": "pissa"}),
    ]


def _lorakit_folders(folder: Path) -> list[Files]:
    found = []
    for number, stored in enumerate(_adapters(folder)):
        formats.write(stored, folder / str(number))
        found.append(_content(folder / str(number)))
        own = folder / f"own-{number}"
        formats.write(stored, own, for_peft=False)
        found.append(_content(own))
    return found


def _peft_folders(folder: Path) -> list[Files]:
    return [
        {name: data for name, data in files.items() if name in (CONFIG, PEFT_TENSORS)}
        for files in _lorakit_folders(folder)
        if CONFIG in files
    ]


def _checksum(record: dict[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def _with_checksums(random: Random, files: Files) -> Files:
    """Correct the checksums in lorakit.json, so that the reader goes on to what they protect; most often."""
    if random.random() < 0.1:
        return files
    try:
        record = json.loads(files[RECORD])
        for name in record["files"]:
            if name in files:
                record["files"][name] = hashlib.sha256(files[name]).hexdigest()
        record["sha256"] = _checksum(record)
        return {**files, RECORD: json.dumps(record, ensure_ascii=False).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files


def _mutate_tensors(random: Random, files: Files, other: Files) -> Files:
    name = OWN_TENSORS if OWN_TENSORS in files else PEFT_TENSORS
    other = {name: next(data for key, data in other.items() if key.endswith("safetensors"))}
    return _with_checksums(
        random, _of_file(name, mutators.safetensors_mutator)(random, files, other)
    )


def _mutate_record(random: Random, files: Files, other: Files) -> Files:
    return _with_checksums(random, _of_file(RECORD, mutators.json_mutator)(random, files, other))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _equal(tensor: torch.Tensor, array: np.ndarray) -> bool:
    found = _array(tensor)
    return found.shape == array.shape and np.array_equal(found, array, equal_nan=True)


def _check_finite(stored: StoredAdapter) -> None:
    tensors = [t for layer in stored.layers.values() for t in layer.tensors.values()]
    tensors += [*stored.trained.values(), *stored.module_tensors.values()]
    _require(all(t.isfinite().all() for t in tensors), "numbers that are not finite")
    for layer in stored.layers.values():
        _require(math.isfinite(layer.scaling) and layer.scaling != 0, "a scaling without effect")


def _check_tensors(folder: Path) -> list[str]:
    """Each tensor is that of its own file, or the one in PEFT's that lorakit.json names."""
    stored = formats.read(folder)
    _check_finite(stored)
    record = _strictly(strict_json, (folder / RECORD).read_bytes())
    own, theirs = (
        _strictly(strict_safetensors, path.read_bytes()) if path.exists() else {}
        for path in (folder / OWN_TENSORS, folder / PEFT_TENSORS)
    )
    tensors = own | {name: theirs[key] for name, key in record["in_peft"].items()}
    found = lorakit_json.tensors_of(stored)
    _require(found.keys() == tensors.keys(), "other tensors than the file's", sorted(tensors))
    _require(all(_equal(t, tensors[n]) for n, t in found.items()), "other numbers than the file's")
    _check_round_trip(stored, folder)
    return []


def _check_round_trip(stored: StoredAdapter, folder: Path) -> None:
    """Writing what was read and reading it again gives the same adapter."""
    if stored.base_copies:
        return  # only a live model completes it
    copy = folder / "written again"
    formats.write(stored, copy, for_peft=False)
    again, stored = (
        dataclasses.replace(adapter, layers=dict(sorted(adapter.layers.items())))
        for adapter in (formats.read(copy), stored)
    )
    try:
        at_rest.assert_equal(again, stored)
    except AssertionError as error:
        raise Mismatch("another adapter after writing and reading", error) from error


_RECORD_KEYS = {
    *("format", "format_version", "lorakit_version", "method", "layers", "modules", "in_peft"),
    *("base", "provenance", "files", "sha256"),
}
_LAYER_KEYS = {"kind", "alpha", "scaling", "grouped", "transposed", "tied_head", "slices"}


def _check_record(folder: Path) -> list[str]:
    """Each field of lorakit.json has the effect that it names; none is unknown."""
    stored = formats.read(folder)
    _check_finite(stored)
    record = _strictly(strict_json, (folder / RECORD).read_bytes())
    _require((record["format"], record["format_version"]) == ("lorakit", 2), "another format")
    _require(_checksum(record) == record["sha256"], "a wrong checksum")
    extra = record.keys() ^ _RECORD_KEYS
    _require(not extra, "keys unknown or missing", sorted(extra))
    _require(list(stored.layers) == list(record["layers"]), "other layers than the file's")
    for path, layer in stored.layers.items():
        described = record["layers"][path]
        extra = described.keys() ^ _LAYER_KEYS
        _require(not extra, "keys of a layer unknown or missing", sorted(extra))
        for name in ("kind", "alpha", "scaling", "grouped", "transposed", "tied_head"):
            found, told = getattr(layer, name), described[name]
            told = float(told) if name in ("alpha", "scaling") and type(told) is int else told
            same = found == told and isinstance(told, bool) == isinstance(found, bool)
            _require(same, f"{name} differs from the file", (found, told))
        slices = json.dumps([dataclasses.asdict(piece) for piece in layer.slices], sort_keys=True)
        told = json.dumps(described["slices"], sort_keys=True)
        _require(slices == told, "slices differ from the file", (slices, told))
    settings = json.loads(json.dumps(dataclasses.asdict(stored.method)))
    told = {}
    for key, value in record["method"].items():
        if isinstance(settings.get(key), list) and isinstance(value, str):
            value = [value]
        told[key] = float(value) if key == "alpha" and type(value) is int else value
    del told["name"]
    _require({**settings, **told} == settings, "the method differs from the file", (settings, told))
    _require(stored.provenance == (record["provenance"] or {}), "provenance differs from the file")
    _check_round_trip(stored, folder)
    return []


_PEFT_OPTIONS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def _check_peft(folder: Path) -> list[str]:
    """Rank, alpha and scaling of each layer follow the options, none of which is unknown."""
    stored = formats.read(folder)
    _check_finite(stored)
    options = _strictly(strict_json, (folder / CONFIG).read_bytes())
    _require(_same(stored.peft_config, options), "other options than the file's")
    _require(options["peft_type"] == "LORA", "another type of adapter")
    unknown = {name for name, value in options.items() if value} - _PEFT_OPTIONS
    _require(not unknown, "unknown options", sorted(unknown))
    method = stored.method
    for name, default, found in (
        ("r", 8, method.rank),
        ("lora_alpha", 8, method.alpha),
        ("lora_dropout", 0.0, method.dropout),
        ("bias", "none", method.bias),
        ("use_dora", False, method.dora),
    ):
        told = default if options.get(name) is None else options[name]
        told = float(told) if name == "lora_alpha" and type(told) is int else told
        same = found == told and isinstance(found, bool) == isinstance(told, bool)
        _require(same, f"{name} differs from the file", (found, told))
    for name in ("rank_pattern", "alpha_pattern"):
        found, told = getattr(method, name), options.get(name) or {}
        used = {
            k: v for k, v in told.items() if any(_by_pattern({k: 1}, p, 0) for p in stored.layers)
        }
        _require(found == used, f"{name} differs from the file", (found, told))
    for path, layer in stored.layers.items():
        rank = _by_pattern(options.get("rank_pattern"), path, method.rank)
        alpha = _by_pattern(options.get("alpha_pattern"), path, method.alpha)
        scaling = alpha / math.sqrt(rank) if options.get("use_rslora") else alpha / rank
        _require(layer.rank == rank, "another rank than the options give", (path, rank))
        dora = bool(options.get("use_dora"))
        _require(
            (layer.magnitude is not None) == dora,
            "magnitudes without use_dora, or use_dora without",
        )
        _require(
            math.isclose(layer.scaling, scaling, rel_tol=1e-12), "another scaling", (path, scaling)
        )
        _require(
            layer.kind != "linear" or layer.transposed == bool(options.get("fan_in_fan_out")),
            "fan_in_fan_out differs from the file",
        )
    _check_round_trip(stored, folder)
    return []


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    return next(
        (v for k, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)), default
    )


def _loralib_files(folder: Path) -> list[Files]:
    numbers = at_rest.numbers
    states = [
        {"a.q.lora_A": numbers(2, 6), "a.q.lora_B": numbers(8, 2), "a.q.bias": numbers(8)},
        {"a.q.lora_A": numbers(2, 6), "a.q.lora_B": numbers(8, 2), "head.weight": numbers(3, 8)},
        {"h.0.attn.c_attn.lora_A": numbers(4, 6), "h.0.attn.c_attn.lora_B": numbers(12, 2)},
        {"a.query_lora_a.weight": numbers(2, 6), "a.query_lora_b.weight": numbers(6, 2)},
    ]
    found = []
    for state in states:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        found.append({"lora.pt": buffer.getvalue()})
    return found


def _check_loralib(folder: Path) -> list[str]:
    """All numbers are finite, and writing what was read gives the same adapter."""
    stored = formats.read(folder / "lora.pt", alpha=4)
    _check_finite(stored)
    _check_round_trip(stored, folder)
    return []


# --- base models ----------------------------------------------------------------------------------


def _gguf_files(folder: Path) -> list[Files]:
    model = tiny_gguf.tiny_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.model.norm.weight.data += 1e-5  # no number of 16 bits
    kinds = (tiny_gguf.F32, tiny_gguf.F16, tiny_gguf.BF16, tiny_gguf.Q4_1)
    return [
        {
            "tiny.gguf": tiny_gguf.write_gguf(
                folder / f"{kind.name}.gguf", model, kind=kind
            ).read_bytes()
        }
        for kind in kinds
    ]


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weight_name(name: str) -> str:
    """Return the name in transformers of a tensor in a GGUF file: blk.0.attn_q.weight, output_norm.weight."""
    *block, short, suffix = name.split(".") if "." in name else (name, "")
    layers = ["model.layers", *block[1:]] if block else []
    return ".".join([*layers, _GGUF_NAMES.get(short, short), suffix])


def _check_gguf(folder: Path) -> list[str]:
    """The converted model has the numbers of each float tensor, and the file's settings."""
    converted = converted_folder(folder / "tiny.gguf")
    file = _strictly(Gguf, (folder / "tiny.gguf").read_bytes())
    _strictly(file.check)
    weights = _strictly(strict_safetensors, (converted / "model.safetensors").read_bytes())
    settings = json.loads((converted / "config.json").read_bytes())
    fields = {name.decode(): value for name, _, value in file.fields}
    for key, name in (
        ("llama.embedding_length", "hidden_size"),
        ("llama.block_count", "num_hidden_layers"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.attention.head_count_kv", "num_key_value_heads"),
        ("llama.feed_forward_length", "intermediate_size"),
        ("llama.attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("llama.context_length", "max_position_embeddings"),
    ):
        found, told = settings.get(name), fields.get(key)
        _require(isinstance(told, int | float), "a setting is missing, and a default is taken", key)
        same = isinstance(found, int | float) and math.isclose(found, told, rel_tol=1e-6)
        _require(same, f"{name} differs from the file", (found, told))
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    names = [_weight_name(name.decode()) for name, *_ in file.tensors]
    _require(weights.keys() <= set(names), "weights that are not in the file")
    for name, array in file.floats().items():
        short = name.split(".")[-2] if "." in name else name
        found = weights.get(_weight_name(name))
        _require(found is not None, "a tensor is left out", name)
        if short in heads:  # llama.cpp interleaves the halves of each head
            halves = array.reshape(heads[short], -1, 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        _require(
            np.array_equal(found, array, equal_nan=True), "other numbers than the file's", name
        )
        _require(np.isfinite(array).all(), "numbers that are not finite", name)
    tokens = [token.decode() for token in fields["tokenizer.ggml.tokens"][1]]
    vocabulary = Tokenizer.from_file(str(converted / "tokenizer.json")).get_vocab()
    wrong = [t for i, t in enumerate(tokens) if vocabulary.get(t) != i]
    _require(not wrong, "tokens differ from the file", wrong[:3])
    return []


TEXT = "A river 12 pub\u00e9 <|im_end|> serves\n\nfood."


def _tokenizer_folders(folder: Path) -> list[Files]:
    found = []
    for number, adds_bos in enumerate((False, True)):
        place = folder / str(number)
        tiny_tokenizer(adds_bos=adds_bos).save_pretrained(place)
        tiny_models.ARCHITECTURES["llama"]().save_pretrained(place)
        found.append(_content(place))
    return found


def _mutate_tokenizer(random: Random, files: Files, other: Files) -> Files:
    name = random.choice(
        ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json")
    )
    return _of_file(name, mutators.json_mutator)(random, files, other)


def _check_tokenizer(folder: Path) -> list[str]:
    """The vocabulary and the ids of a text are those of the `tokenizers` library; loading twice gives the same."""
    try:
        tokenizer = load_tokenizer(folder)
    except BaseModelError as error:
        _require(
            "has no tokenizer" not in str(error),
            "a damaged tokenizer is called missing",
            error.__context__,
        )
        raise
    length = tokenizer.model_max_length
    _require(type(length) is int and length >= 1, "a length that is no whole number", length)
    ids = tokenizer.encode(TEXT)
    _require(ids == load_tokenizer(folder).encode(TEXT), "two loads differ")
    _require(set(ids) <= set(tokenizer.get_vocab().values()), "ids that are not in the vocabulary")
    plain = _strictly(_library_tokenizer, folder / "tokenizer.json")
    added = {token.content for token in plain.get_added_tokens_decoder().values()}
    if {str(token) for token in tokenizer.added_tokens_encoder} == added:  # none from another file
        expected = plain.encode(TEXT).ids
        _require(ids == expected, "other ids than the file's", (ids, expected))
    _require(
        tokenizer.vocab_size == plain.get_vocab_size(with_added_tokens=False), "another vocabulary"
    )
    return []


def _library_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(error) from error


_MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "river\n"},
    {"role": "assistant", "content": "  pub "},
]
_TEMPLATES = (
    CHAT_TEMPLATE,
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] }}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{{ '[' + m['role'] + ']' + m['content'] | trim }}"
    "{% if not loop.last %}\n  {% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
)


def _chat_templates(folder: Path) -> list[Files]:
    return [{"chat_template.jinja": text.encode()} for text in _TEMPLATES]


_TOKENIZER = tiny_tokenizer()


def _check_template(folder: Path) -> list[str]:
    """A conversation is rendered as by jinja2 alone, and rejected where jinja2 fails."""
    source = (folder / "chat_template.jinja").read_bytes().decode(errors="replace")
    _TOKENIZER.chat_template = source
    template = ChatTemplate(_TOKENIZER)
    try:
        text = template.text(_MESSAGES)
        ids, turns = template.assistant_turns(_MESSAGES, None)
    except BadRow as error:
        return [str(error)]
    _require(all(0 <= a <= b <= len(ids) for a, b in turns), "turns outside the text", turns)
    _require(text == template.text(_MESSAGES), "two renderings differ")
    expected = _strictly(_rendered, source)
    _require(text == expected, "another text than jinja2's", (text[:100], expected[:100]))
    return []


def _rendered(source: str) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", source)
    source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
    try:
        return environment.from_string(source).render(
            messages=_MESSAGES,
            add_generation_prompt=False,
            tools=None,
            documents=None,
            **_TOKENIZER.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}") from error


# --- rows -----------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[list[Row | Problem], list[str]]:
    reader = reader_for(path)
    assert reader is not None
    rows = list(reader(path))
    return rows, [str(row) for row in rows if isinstance(row, Problem)]


def _jsonl_files(folder: Path) -> list[Files]:
    rows = [
        {"prompt": "river é", "completion": " pub", "n": 1, "x": 0.5},
        {"messages": [{"role": "user", "content": "a"}], "label": None, "ok": True},
        {"prompt": "line\nbreak\u2028", "completion": ""},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return [
        {"rows.jsonl": text.encode()},
        {"rows.jsonl": b"\xef\xbb\xbf" + text.replace("\n{", "\n\n{").encode()},
    ]


def _check_jsonl(folder: Path) -> list[str]:
    rows, problems = _read(folder / "rows.jsonl")
    expected = strict_jsonl((folder / "rows.jsonl").read_bytes())
    _require(len(rows) == len(expected), "another number of rows", (len(rows), len(expected)))
    for row, told in zip(rows, expected, strict=True):
        if isinstance(row, Row):
            _require(
                told is not None, "accepts a line that is not strict JSON", repr(row.values)[:100]
            )
            _require(_same(row.values, told), "another row than the file's", repr(row.values)[:100])
    return problems


def _csv_files(folder: Path) -> list[Files]:
    texts = (
        'prompt,completion\r\nriver,"a ""pub"", and\r\nmore"\r\n1,\r\n',
        'text,label\nA man,yes\n\ncafé,no\n"",x\n',
    )
    return [{"rows.csv": text.encode()} for text in texts]


def _check_csv(folder: Path) -> list[str]:
    rows, problems = _read(folder / "rows.csv")
    if problems:
        return problems
    records = _strictly(strict_csv, (folder / "rows.csv").read_bytes())
    header = [name.strip() for name in records[0]] if records else []
    _require(
        all(header) and len(set(header)) == len(header),
        "a column without a name of its own",
        header,
    )
    expected = [dict(zip(header, record, strict=False)) for record in records[1:]]
    _require([row.values for row in rows] == expected, "other rows than the file's", expected[:2])
    return problems


def _parquet_files(folder: Path) -> list[Files]:
    tables = [
        pa.table({"prompt": ["river", None, "é"], "n": [1, 2, None], "x": [0.5, 1.0, 2.0]}),
        pa.table(
            {"messages": [[{"role": "user", "content": "a"}], [], None], "ok": [True, False, None]}
        ),
        pa.table(
            {
                "t": pa.array([1, 2, 3], pa.timestamp("ns")),
                "d": pa.array([1, 2, 3], pa.decimal128(9, 2)),
            }
        ),
        pa.table(
            {"text": pa.array(["a", "b", "a"]).dictionary_encode(), "raw": [b"x", b"\xff", b""]}
        ),
    ]
    found = []
    for number, table in enumerate(tables):
        for compression in ("none", "zstd"):
            buffer = io.BytesIO()
            pa.parquet.write_table(
                table, buffer, compression=compression, use_dictionary=number % 2 == 0
            )
            found.append({"rows.parquet": buffer.getvalue()})
    return found


def _check_parquet(folder: Path) -> list[str]:
    """Reading twice gives the same rows, as many as the footer says, and so does reading the whole table."""
    rows, problems = _read(folder / "rows.parquet")
    again, _ = _read(folder / "rows.parquet")
    values = [row.values for row in rows if isinstance(row, Row)]
    _require(_same(values, [r.values for r in again if isinstance(r, Row)]), "two reads differ")
    with pa.parquet.ParquetFile(folder / "rows.parquet") as file:
        count = file.metadata.num_rows
        columns = file.schema_arrow.names
    _require(len(rows) == count, "another number of rows than the footer's", (len(rows), count))
    _require(len(set(columns)) == len(columns), "accepts a column name that occurs twice", columns)
    return problems


# --- all ------------------------------------------------------------------------------------------

TARGETS = (
    Target("safetensors", _lorakit_folders, _mutate_tensors, _check_tensors),
    Target("peft", _peft_folders, _of_file(CONFIG, mutators.json_mutator), _check_peft),
    Target("lorakit_json", _lorakit_folders, _mutate_record, _check_record),
    Target(
        "loralib",
        _loralib_files,
        _of_file("lora.pt", mutators.state_dict_mutator, mutators.zip_mutator),
        _check_loralib,
    ),
    Target("gguf", _gguf_files, _of_file("tiny.gguf", mutators.gguf_mutator), _check_gguf),
    Target("jsonl", _jsonl_files, _of_file("rows.jsonl", mutators.jsonl_mutator), _check_jsonl),
    Target("csv", _csv_files, _of_file("rows.csv", mutators.csv_mutator), _check_csv),
    Target(
        "parquet",
        _parquet_files,
        _of_file("rows.parquet", mutators.parquet_mutator),
        _check_parquet,
    ),
    Target("tokenizer", _tokenizer_folders, _mutate_tokenizer, _check_tokenizer),
    Target(
        "template",
        _chat_templates,
        _of_file("chat_template.jinja", mutators.jinja_mutator),
        _check_template,
    ),
)
BY_NAME = {target.name: target for target in TARGETS}
