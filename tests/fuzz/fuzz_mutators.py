"""Mutators: each returns a changed copy of a file's bytes, most often still well-formed in all other places."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from fuzz_parsers import ARRAY, STRING, Gguf

Mutator = Callable[[Random, bytes, bytes], bytes]
"""Takes the random state, a file, and another file of the same format to splice from."""

INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    255,
    65_535,
    2**24,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "",
    " ",
    "a",
    "A",
    "\0",
    "\x1b[31m",
    "\n",
    "..",
    "../x",
    "é",
    "\u202e",
    "x" * 5000,
    "(a+)+$",
    "nan",
    "1e5",
)


def bytes_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    """Flip, set, insert, delete, repeat or splice bytes, at any place."""
    start = random.randrange(len(data) + 1)
    stop = min(len(data), start + random.choice((1, 2, 4, 8, 16, 100, 1000)))
    piece = random.randrange(len(other) + 1)
    width = random.choice((1, 2, 4, 8))
    number = (random.choice(INTEGERS) % 256**width).to_bytes(
        width, random.choice(("little", "big"))
    )
    flipped = bytes([data[start] ^ 1 << random.randrange(8)]) if start < len(data) else b"\0"
    insert = random.choice(
        (b"\0", b"\n", b'"', b"\xff", b"\xed\xa0\x80", b"{", b"[" * 5000, number)
    )
    return random.choice(
        (
            data[:start] + flipped + data[start + 1 :],
            data[:start] + number + data[start + width :],
            data[:start] + insert + data[start:],
            data[:start] + data[stop:],
            data[:stop] + data[start:],
            data[:start],
            data[:start] + other[piece:],
        )
    )


# --- JSON -----------------------------------------------------------------------------------------


class Object(list):
    """A JSON object as a list of [key, value], so that keys can occur twice."""


class Raw(str):
    """JSON text that is written as it is."""


RAW = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "2",
        "0.5",
        "-0.0",
        "1e-9",
        "1e400",
        "-1e400",
        "NaN",
        "-Infinity",
    ),
    *(
        "9" * 400,
        "9" * 5000,
        "9007199254740993",
        "18446744073709551616",
        "1.0",
        '"8"',
        '"\\ud800"',
        "[]",
        "{}",
    ),
    *(
        "[" * 500 + "]" * 500,
        "[" * 100_000,
        '{"a":' * 500 + "1" + "}" * 500,
        "[1, 2]",
        '[""]',
        '{"": 1}',
        "01",
        "",
    ),
)


def json_tree(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=lambda pairs: Object(map(list, pairs)))


def json_text(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json_text(k)}: {json_text(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _slots(value: Any, found: list[tuple[list, int]]) -> list[tuple[list, int]]:
    """Return the place of every key and value: a list and an index."""
    if isinstance(value, list) and not isinstance(value, str):
        for index, item in enumerate(value):
            if not isinstance(value, Object):
                found.append((value, index))
            _slots(item, found)
    return found


def mutate_tree(random: Random, tree: Any) -> Any:
    """Change a tree of `json_tree` in one place."""
    box = [tree]
    slots = _slots(box, [])
    place, index = random.choice(slots)
    old = place[index]
    copied = copy.deepcopy(old)  # without a copy, a tree could contain itself
    objects = [v for v in (box[0], *(p[i] for p, i in slots)) if isinstance(v, Object) and v]
    action = random.randrange(8)
    if action == 0 and objects:
        chosen = random.choice(objects)
        del chosen[random.randrange(len(chosen))]
    elif action == 1 and objects:  # the same key twice, with the same value or another
        chosen = random.choice(objects)
        key, value = random.choice(chosen)
        chosen.insert(random.randrange(len(chosen) + 1), [key, random.choice((value, copied))])
    elif action == 2 and objects:
        entry = random.choice(random.choice(objects))
        names = [key for o in objects for key, _ in o] + list(TEXTS)
        entry[0] = random.choice((random.choice(names), f"{entry[0]}x", str(entry[0]).upper()))
    elif action == 3 and objects:
        random.choice(objects).append([random.choice(TEXTS), random.choice((copied, Raw("1")))])
    elif action == 4:  # another type, nearly the same text
        place[index] = str(old) if not isinstance(old, str) else Raw(old or "0")
    elif action == 5:
        other, at = random.choice(slots)
        place[index] = json_tree(json_text(other[at]).encode()) if other is not box else old
    elif action == 6 and isinstance(old, int | float):
        number = random.choice(INTEGERS)
        place[index] = random.choice((old + 1, old - 1, -old, old * 2, number, -number, old + 0.5))
    elif action == 6 and isinstance(old, str):
        place[index] = random.choice(
            (random.choice(TEXTS), old + random.choice(TEXTS), old.upper())
        )
    else:
        place[index] = Raw(random.choice(RAW))
    return box[0]


def json_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    try:
        tree = json_tree(data)
    except (ValueError, RecursionError):
        return bytes_mutator(random, data, other)
    return json_text(mutate_tree(random, tree)).encode(errors="surrogatepass")


# --- rows -----------------------------------------------------------------------------------------


def jsonl_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    action = random.randrange(8)
    if action == 0:
        lines.insert(
            at, random.choice((b"", b" ", b"[]", b"1", b"\xef\xbb\xbf", *other.split(b"\n")))
        )
    elif action == 1:
        lines[at : at + 2] = [
            random.choice((b"\r", b"\x0b", b"\xe2\x80\xa8", b" ")).join(lines[at : at + 2])
        ]
    elif lines[at].strip():
        lines[at] = json_mutator(random, lines[at], other)
    return b"\n".join(lines)


def csv_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    parts = re.findall(rb'"|,|\r|\n|[^",\r\n]+', data)
    at = random.randrange(len(parts) + 1)
    odd = (
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b" ",
        b"\x0c",
        b"\xc2\x85",
    )
    new = random.choice((*odd, *(text.encode() for text in TEXTS), *other.split(b",")))
    stop = random.choice((at, at + 1, at + 1, at + 3))
    return b"".join((*parts[:at], random.choice((new, b"", new)), *parts[stop:]))


# --- templates -----------------------------------------------------------------------------------

_JINJA = (
    *(
        "{{ messages }}",
        "{{ messages | tojson }}",
        "{{ raise_exception('no\x1b') }}",
        "{{ ''.__class__.__mro__ }}",
    ),
    *(
        "{% for i in range(99999) %}",
        "{% for i in range(10**12) %}",
        "{% endfor %}",
        "{% if true %}",
        "{% endif %}",
    ),
    *(
        "{{ 'x' * 10**7 }}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**10**7 }}",
        "{{ 1 / 0 }}",
        "{{ undefined.x }}",
        "{% break %}",
    ),
    *(
        "{% set x = messages | length %}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{# x #}",
        "{%",
        "}}",
        "\0",
    ),
    *(
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ bos_token }}",
        "{{ tools }}",
        "\ud800",
        "{{ '%s' % 1 }}",
    ),
    *(
        "{% if true %}" * 300 + "{% endif %}" * 300,
        "{{ " + "(" * 1000,
        "{% generation %}",
        "{% endgeneration %}",
    ),
    *(
        "{{ messages[9].content }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% raw %}",
    ),
    *(
        "{{ '{:>9999999}'.format(1) }}",
        "{{ 'a' | center(9999999) }}",
        "{{ message['content'] | e }}",
        "{% else %}",
    ),
)


def jinja_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    pattern = r"\{%.*?%\}|\{\{.*?\}\}|[^{]+|\{"
    parts, others = (re.findall(pattern, d.decode(errors="replace"), re.S) for d in (data, other))
    at = random.randrange(len(parts) + 1)
    new = random.choice(
        (random.choice(_JINJA), random.choice(_JINJA), *others[:1], *parts[at : at + 1])
    )
    if random.random() < 0.3 and at < len(parts):
        words = re.findall(r"\w+|\W", parts[at])
        words[random.randrange(len(words))] = random.choice(
            ("not", "1", "'a'", "|", "is", "content", "-", "system", "")
        )
        new = "".join(words)
    stop = at + random.choice((0, 1, 1, 2))
    text = "".join((*parts[:at], random.choice((new, new, "")), *parts[stop:]))
    return text.encode(errors="surrogatepass")


# --- tensors --------------------------------------------------------------------------------------


def safetensors_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    """Change the header in one place, the numbers, or the length of the header."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        tree, body = json_tree(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, struct.error, RecursionError):
        return bytes_mutator(random, data, other)
    action = random.randrange(11)
    entries = [
        entry for name, entry in tree if name != "__metadata__" and isinstance(entry, Object)
    ]
    if action == 0:
        length = random.choice((*INTEGERS, len(data), len(data) - 8, len(data) - 7))
        return struct.pack("<Q", length) + data[8:]
    if action == 1 and body:
        numbers = (0x7FC00000, 0x7F800000, 0xFF800000, 1, 0x80000000, 0x7F7FFFFF, 0)
        at = random.randrange(0, len(body), 4)
        body = body[:at] + struct.pack("<I", random.choice(numbers)) + body[at + 4 :]
    elif action == 2:
        body = random.choice((body + b"\0" * 4, body[:-4], b"", body + body))
    elif action == 3:  # a new tensor
        place = json_tree(f"[{len(body)}, {len(body) + 4}]".encode())
        entry = Object([["dtype", "F32"], ["shape", [1]], ["data_offsets", place]])
        tree.append([f"{random.choice(tree)[0]}x", entry])
        body += b"\0" * 4
    elif action < 8 and entries:
        _mutate_entry(random, random.choice(entries), random.choice(entries))
    elif action == 8 and len(entries) > 1:  # two tensors exchange names
        named = [pair for pair in tree if pair[0] != "__metadata__"]
        one, two = random.sample(named, 2)
        one[0], two[0] = two[0], one[0]
    else:
        tree = mutate_tree(random, tree)
    text = json_text(tree).encode(errors="surrogatepass")
    text += b" " * random.choice((0, 0, 1, 8))
    return struct.pack("<Q", len(text)) + text + body


def _mutate_entry(random: Random, entry: Object, other: Object) -> None:
    for pair in entry:
        name, value = pair
        if random.random() > 0.5:
            continue
        if name == "dtype":
            pair[1] = random.choice(
                ("F32", "F16", "BF16", "F64", "I32", "I64", "BOOL", "U8", "F8_E4M3", "C64", "f32")
            )
        elif name == "shape" and isinstance(value, list) and value:
            changed = [*value[:-1], random.choice((*INTEGERS, -1))]
            pair[1] = random.choice(
                (value[::-1], [*value, 1], [1, *value], changed, value[1:], [], [0, *value])
            )
        elif name == "data_offsets" and isinstance(value, list) and len(value) == 2:
            start, stop = value
            elsewhere = next((v for k, v in other if k == "data_offsets"), value)
            pair[1] = random.choice(
                (
                    elsewhere,
                    [start + 4, stop],
                    [start, stop + 4],
                    [stop, start],
                    [start, 2**63],
                    [0, 0],
                )
            )


def zip_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    """Change one member of a zip file, or the list of members; checksums stay valid."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    except Exception:
        return bytes_mutator(random, data, other)
    member = random.choice(members)
    action = random.randrange(8)
    if action == 0:
        members.remove(member)
    elif action == 1:
        members.insert(random.randrange(len(members) + 1), [member[0], random.choice(members)[1]])
    elif action == 2:
        member[0] = random.choice(
            (*TEXTS, "/x", random.choice(members)[0], member[0] + "x")
        ).replace("\0", "0")
    elif action == 4:  # damage that only the checksum shows
        at = data.find(member[1]) + random.randrange(max(1, len(member[1])))
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    elif action == 3:
        one, two = random.sample(members, 2)
        one[1], two[1] = two[1], one[1]
    else:
        pickled = [m for m in members if m[0].endswith(".pkl")] or members
        member = random.choice((*pickled, member))
        member[1] = bytes_mutator(random, member[1], random.choice(members)[1])
    buffer = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that occurs twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
    return buffer.getvalue()


def state_dict_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    """Change one name or tensor in a file of torch.save."""
    try:
        state = {
            str(key): value
            for key, value in torch.load(io.BytesIO(data), weights_only=True).items()
        }
    except Exception:
        return zip_mutator(random, data, other)
    if not state:
        return data
    name = random.choice(list(state))
    old = state[name]
    tensor = old if isinstance(old, torch.Tensor) and old.numel() else torch.ones(2)
    new_name = random.choice(
        (
            f"{name}x",
            name.upper(),
            random.choice(TEXTS),
            f"module.{name}",
            random.choice(list(state)),
            3,
        )
    )
    values: list[Callable[[], Any]] = [
        lambda: tensor.double(),
        lambda: tensor.half(),
        lambda: tensor.bfloat16(),
        lambda: tensor.long(),
        lambda: tensor.flatten()[::2],
        lambda: tensor.T.contiguous().T if tensor.ndim == 2 else tensor,
        lambda: tensor.flatten()[:1].clone().expand(random.choice((1, 100, 10**6, 10**10))),
        lambda: tensor.flatten()[:1].clone().expand(2, 10**9),
        lambda: tensor.flatten()[:1].clone().expand(tensor.shape),
        lambda: tensor * random.choice((float("nan"), float("inf"), 0.0, 1e38)),
        lambda: tensor.to_sparse(),
        lambda: tensor[:0],
        lambda: torch.empty(0, 2**40),
        lambda: tensor.reshape(1, *tensor.shape),
        lambda: tensor.flatten(),
        lambda: torch.nn.Parameter(tensor),
        lambda: torch.complex(tensor.float(), tensor.float()),
        lambda: random.choice((None, 1, "x", [1], {"a": 1}, {name: 1}, b"x")),
    ]
    action = random.randrange(5)
    if action == 0:
        del state[name]
    elif action == 1:
        state = {new_name if key == name else key: value for key, value in state.items()}
    elif action == 2:
        state[new_name] = old
    else:
        state[name] = random.choice(values)()
    buffer = io.BytesIO()
    torch.save({"model_state_dict": state} if random.random() < 0.05 else state, buffer)
    return buffer.getvalue()


def gguf_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    try:
        file = Gguf(data)
    except (ValueError, ZeroDivisionError):
        return bytes_mutator(random, data, other)
    field, tensor = random.choice(file.fields), random.choice(file.tensors)
    number = random.choice(INTEGERS)
    action = random.randrange(14)
    if action == 0:
        file.version = random.choice((0, 1, 2, 4, 2**31))
    elif action == 1:
        file.counts = (random.choice((0, 1, -1, number)), random.choice((0, 1, -1, number)))
    elif action == 2:
        file.fields.remove(field)
    elif action == 3:
        file.tensors.remove(tensor)
    elif action == 4:
        file.fields.append([field[0], *random.choice(file.fields)[1:]])
    elif action == 5:
        file.tensors.append([tensor[0], *random.choice(file.tensors)[1:]])
    elif action == 6:
        chosen = random.choice((field, tensor))
        chosen[0] = random.choice(
            (
                chosen[0] + b"x",
                random.choice(TEXTS).encode(),
                b"\xff",
                random.choice(file.tensors)[0],
            )
        )
    elif action == 7:
        tensor[1] = random.choice(
            (
                tensor[1][::-1],
                [*tensor[1], 1],
                tensor[1][1:],
                [],
                [number, *tensor[1][1:]],
                [2**32, 2**32],
                [1] * 9,
            )
        )
    elif action == 8:
        tensor[2] = random.choice((0, 1, 2, 3, 8, 24, 30, 99, number % 2**32))
    elif action == 9:
        tensor[3] = random.choice(
            (
                tensor[3] + 32,
                tensor[3] + 4,
                max(0, tensor[3] - 32),
                random.choice(file.tensors)[3],
                number,
            )
        )
    elif action == 10:
        file.data = random.choice(
            (file.data[:-32], file.data + b"\0" * 32, b"", bytes_mutator(random, file.data, other))
        )
    else:
        _mutate_field(random, field, number)
    return file.dump()


def _mutate_field(random: Random, field: list, number: int) -> None:
    _, kind, value = field
    if random.random() < 0.2:
        field[1] = random.choice((0, 4, 5, 6, 7, 8, 9, 10, 12, 13, 2**31))
    elif kind == STRING:
        field[2] = random.choice(
            (random.choice(TEXTS).encode(), value + b"\xff", value.upper(), b"llama", b"bert")
        )
    elif kind == ARRAY and value[1]:
        of, items = value
        at = random.randrange(len(items))
        change = random.choice(TEXTS).encode() if of == STRING else number
        field[2] = random.choice(
            (
                [of, items[:at]],
                [of, [*items, items[at]]],
                [of, [*items[:at], change, *items[at + 1 :]]],
                [random.choice((0, 4, 6, 8, 9, 77)), items],
                [of, items[::-1]],
            )
        )
    elif kind == 6:
        field[2] = random.choice((0.0, -1.0, float("nan"), float("inf"), 1e-38, 1e38))
    elif not isinstance(value, list | bytes):
        field[2] = random.choice((number, value + 1, max(0, value - 1), value * 2))


def parquet_mutator(random: Random, data: bytes, other: bytes) -> bytes:
    """Change bytes in the footer (the schema, offsets and counts), its length, or a page."""
    (length,) = struct.unpack("<I", data[-8:-4].rjust(4, b"\0"))
    cut = max(0, len(data) - 8 - length)
    body, footer = data[:cut], data[cut:-8]
    action = random.randrange(7)
    if action == 0:
        return data[:-8] + struct.pack("<I", random.choice(INTEGERS) % 2**32) + b"PAR1"
    letters = [match.start() for match in re.finditer(rb"[a-z]", body)]
    if action == 1 and letters:  # a text that is not UTF-8
        at = random.choice(letters)
        body = body[:at] + b"\xff" + body[at + 1 :]
    elif action < 5:
        at = random.randrange(len(footer) + 1)
        value = random.choice((0, 1, 2, 0x0C, 0x15, 0x7F, 0x80, 0xFE, 0xFF, random.randrange(256)))
        footer = random.choice(
            (
                footer[:at] + bytes([value]) + footer[at + 1 :],
                footer[:at] + bytes([value]) + footer[at + 1 :],
                bytes_mutator(random, footer, other),
            )
        )
    else:
        body = bytes_mutator(random, body, other)
    return body + footer + struct.pack("<I", len(footer) % 2**32) + b"PAR1"
