"""PEFT folders: lorakit reads PEFT's files exactly, and PEFT loads lorakit's without warnings."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from at_rest import adapter, linear, numbers, same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedModel

import lorakit
from lorakit.adapters import formats
from lorakit.adapters.formats.peft import peft_form, read_peft, write_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.errors import AdapterFileError

PEFT_SPEAKS = (
    "Setting `save_embedding_layers`",
    "Model has `tie_word_embeddings=True`",
    "fan_in_fan_out is set",
    "`is_gradient_checkpointing` is deprecated",
)


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(10, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.body = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.head = nn.Linear(8, 4)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.conv(x.mT).mT
        x = self.attn(x, x, x)[0] + x
        for layer in self.body:
            x = layer(x).tanh()
        return self.head(x)


IDS = torch.tensor([[1, 2, 3], [9, 0, 4]])


@contextmanager
def speaking_peft() -> Iterator[None]:
    """Ignore the warnings that PEFT emits on correct use, and no others."""
    with warnings.catch_warnings():
        for beginning in PEFT_SPEAKS:
            warnings.filterwarnings("ignore", message=beginning)
        yield


def by_peft(model: nn.Module, folder: Path, **options) -> tuple[peft.PeftModel, dict[str, Tensor]]:
    """Save a PEFT adapter with random numbers; return it and the file's tensors."""
    with speaking_peft():
        config = peft.LoraConfig(r=2, lora_alpha=3, **options)
        adapted = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
    return adapted, load_file(folder / "adapter_model.safetensors")


def loaded_by_peft(model: nn.Module, folder: Path) -> peft.PeftModel:
    with speaking_peft():
        return peft.PeftModel.from_pretrained(model, folder).eval()


EVERYTHING = {"target_modules": ["table", "conv", "attn", "body.0", "body.2"]}


def test_every_tensor_is_read_to_the_bit(tmp_path):
    _, tensors = by_peft(Net(), tmp_path, **EVERYTHING, bias="all", modules_to_save=["head"])
    stored = read_peft(tmp_path)
    assert {path: layer.kind for path, layer in stored.layers.items()} == {
        "table": "embedding",
        "conv": "conv",
        "attn": "attention",
        "attn.out_proj": "linear",
        "body.0": "linear",
        "body.2": "linear",
    }
    keys = {
        "table": ("table.lora_embedding_A", "table.lora_embedding_B"),
        "attn.out_proj": (
            "attn.base_layer.out_proj.lora_A.weight",
            "attn.base_layer.out_proj.lora_B.weight",
        ),
    }
    for path, layer in stored.layers.items():
        key_A, key_B = keys.get(path, (f"{path}.lora_A.weight", f"{path}.lora_B.weight"))
        same_bits(layer.A, tensors[f"base_model.model.{key_A}"], path)
        same_bits(layer.B, tensors[f"base_model.model.{key_B}"], path)
        doubled = 2 if path == "attn.out_proj" else 1  # as PEFT computes
        assert (layer.rank, layer.alpha, layer.scaling) == (2, doubled * 3.0, doubled * 1.5)
    biases = {"conv.bias", "attn.out_proj.bias", "body.0.bias", "body.1.bias", "body.2.bias"}
    assert stored.trained.keys() == biases | {"head.weight", "head.bias"}
    method = stored.method
    assert isinstance(method, lorakit.LoRA)
    assert (method.rank, method.alpha, method.bias, method.train_modules) == (
        2,
        3.0,
        "all",
        ("head",),
    )
    assert method.targets == tuple(sorted(EVERYTHING["target_modules"]))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "none"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["head", "body.1"], "bias": "all"},
        {"use_rslora": True, "rank_pattern": {"body.2": 4}, "alpha_pattern": {"conv": 7}},
    ],
    ids=str,
)
def test_there_and_back_through_both(tmp_path, options):
    """PEFT writes, lorakit reads and writes, PEFT reads: the same tensors and the same logits."""
    adapted, tensors = by_peft(Net(), tmp_path / "theirs", **EVERYTHING, **options)
    stored = read_peft(tmp_path / "theirs")
    model = Net()
    formats.check_targets(stored, model)
    (tmp_path / "ours").mkdir()
    write_peft(stored, tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() <= tensors.keys()
    surplus = tensors.keys() - again.keys()
    assert all(
        "modules_to_save" in k or "original_module" in k or k.endswith("base_layer.weight")
        for k in surplus
    )
    for key, tensor in again.items():
        same_bits(tensor, tensors[key], key)
    with torch.no_grad():
        expected = adapted(IDS)
        assert (expected - Net()(IDS)).abs().max() > 1e-2
        assert torch.equal(loaded_by_peft(Net(), tmp_path / "ours")(IDS), expected)


def test_dora_of_every_kind_that_peft_has(tmp_path):
    targets = {"target_modules": ["table", "conv", "body.1"], "use_dora": True}
    _, tensors = by_peft(Net(), tmp_path, **targets)
    stored = read_peft(tmp_path)
    for path, rows in {"table": 8, "conv": 8, "body.1": 8}.items():
        magnitude = stored.layers[path].magnitude
        assert magnitude is not None
        assert magnitude.shape == (rows,)
        key = f"base_model.model.{path}.lora_magnitude_vector"
        assert torch.equal(magnitude, tensors[key].flatten())
    form = peft_form(stored)
    for key in (k for k in tensors if "lora_" in k):
        same_bits(form.tensors[key], tensors[key], key)


def test_listed_names_that_the_model_lacks_are_no_targets(tmp_path):
    """Lists for several models have them. A new adapter, as `lorakit plan` attaches one, rejects them."""
    model = tiny_models.build("llama")
    used = {"rank_pattern": {"up_proj": 1}, "alpha_pattern": {r"layers\.\d+\.mlp\.\w+_proj": 5}}
    targets = ["q_proj", "qkv_proj", "layers.1.mlp.up_proj"]
    by_peft(model, tmp_path, target_modules=targets, **used)
    config = tmp_path / "adapter_config.json"
    options = json.loads(config.read_text())
    for pattern in used:
        options[pattern] |= {"qkv_proj": 8, r"fc\d+": 4}
    config.write_text(json.dumps(options))
    stored = read_peft(tmp_path)
    assert stored.method.targets == ("layers.1.mlp.up_proj", "q_proj")
    assert {name: getattr(stored.method, name) for name in used} == used
    again = lorakit.attach(tiny_models.build("llama"), stored.method)
    assert again.stored().layers.keys() == stored.layers.keys()


def test_gpt2s_transposed_layers_are_marked(tmp_path):
    by_peft(tiny_models.build("gpt2"), tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    stored = read_peft(tmp_path)
    assert all(layer.transposed for layer in stored.layers.values())
    assert peft_form(stored).config["fan_in_fan_out"]


def test_a_pickle_of_tensors_is_read(tmp_path):
    _, tensors = by_peft(Net(), tmp_path, **EVERYTHING)
    expected = read_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    found = read_peft(tmp_path)
    for path, layer in expected.layers.items():
        same_bits(found.layers[path].A, layer.A)


def test_keys_without_pefts_prefix(tmp_path):
    _, tensors = by_peft(Net(), tmp_path, **EVERYTHING)
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    assert list(read_peft(tmp_path).layers)
    both = {**tensors, "conv.lora_A.weight": bare["conv.lora_A.weight"].clone()}
    save_file(both, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="with and without the prefix 'base_model"):
        read_peft(tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_keys_of_a_live_peft_model(tmp_path, dora):
    """PEFT reads its own state dict too, in which the keys have the adapter's name."""
    targets = ["table", "conv", "body.0"] if dora else EVERYTHING["target_modules"]
    options = {"target_modules": targets, "use_dora": dora}
    adapted, tensors = by_peft(Net().double(), tmp_path, **options)
    named = {key: t for key, t in adapted.state_dict().items() if "lora_" in key}
    assert all(".default" in key for key in named)
    save_file(named, tmp_path / "adapter_model.safetensors")
    expected = adapted(IDS)
    torch.testing.assert_close(
        loaded_by_peft(Net().double(), tmp_path)(IDS), expected, rtol=0, atol=1e-12
    )
    model = Net().double()
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-12)
    save_file({**named, **tensors}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"twice, .* the adapter's name"):
        read_peft(tmp_path)


def test_another_name_of_the_base_is_told(tmp_path, caplog):
    """PEFT records nothing else of its base. A local copy has the last part of the hub's name."""
    by_peft(tiny_models.build("llama"), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "owner/Llama-A"}
    path.write_text(json.dumps(config))
    for name, told in (("", False), ("copies/llama-a", False), ("owner/llama-b", True)):
        model = tiny_models.build("llama")
        model.config._name_or_path = name
        caplog.clear()
        lorakit.load(model, tmp_path)
        message = "It was trained on 'owner/Llama-A', and this model is 'owner/llama-b'."
        assert (message in caplog.text) == told


# --- base weights in the file --------------------------------------------------------------------


def test_the_table_that_peft_saves_along_is_held_against_the_models(tmp_path):
    by_peft(tiny_models.build("llama"), tmp_path, target_modules=["embed_tokens", "q_proj"])
    name = "model.embed_tokens.weight"

    stored = read_peft(tmp_path)
    assert stored.base_copies.keys() == {name}
    assert name not in stored.trained
    formats.check_targets(stored, tiny_models.build("llama"))
    assert not stored.base_copies
    assert not stored.trained

    stored = read_peft(tmp_path)
    other = tiny_models.build("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    formats.check_targets(stored, other)
    assert torch.equal(stored.trained[name], tiny_models.build("llama").model.embed_tokens.weight)
    assert "'model.embed_tokens.weight'; they count as trained" in stored.notices[-1]

    with pytest.raises(AdapterFileError, match=r"model\.resize_token_embeddings\(99\)"):
        lorakit.load(tiny_models.build("llama", vocab_size=50), tmp_path)


def modernbert() -> PreTrainedModel:
    settings = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config = ModernBertConfig(vocab_size=99, **settings, pad_token_id=0, attention_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModernBertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    "build", [modernbert, lambda: tiny_models.build("phi")], ids=["modernbert", "phi"]
)
def test_a_resized_embedding_loads_under_every_name(build, tmp_path):
    """ModernBERT has `tok_embeddings`; Phi's head has a bias, which grows too."""
    ids = torch.arange(3, 17).view(2, 7)
    theirs, ours = build(), build()
    for model in (theirs, ours):
        model.resize_token_embeddings(104, mean_resizing=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight += 0.1
        if (head := theirs.get_output_embeddings()) is not None:
            head.bias += 0.1
    targets = ["Wqkv"] if build is modernbert else ["q_proj"]
    with speaking_peft():
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=targets))
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    lorakit.load(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, wrapped(ids).logits)


def test_a_base_weight_that_the_options_do_not_train(tmp_path, sound, caplog):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors, name = load_file(file), f"{PREFIX}body.2.weight"
    for weight, count in ((Net().body[2].weight.detach(), 0), (numbers(8, 8), 1)):
        save_file({**tensors, name: weight}, file)
        handle = lorakit.load(model := Net(), folder)
        assert torch.equal(model.body[2].weight, weight)
        assert caplog.text.count("'body.2.weight'; they count as trained") == count
        handle.detach()
        assert torch.equal(model.body[2].weight, Net().body[2].weight)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("body.7", r"1 layers that the model does not have, the first is 'body\.7'"),
        ("conv", r"holds linear factors for 'conv', which is a Conv1d"),
    ],
)
def test_factors_without_a_place(tmp_path, sound, key, message):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    factors = {"lora_A": numbers(2, 8), "lora_B": numbers(8, 2)}
    more = {f"{PREFIX}{key}.{name}.weight": tensor for name, tensor in factors.items()}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(AdapterFileError, match=message):
        lorakit.load(Net(), folder)


@pytest.mark.parametrize("version", [None, "0.18.0"])
def test_an_old_adapter_on_gemma_3s_embedding_is_said_to_act_too_strongly(
    version, tmp_path, caplog
):
    """PEFT before 0.18 did not multiply the adapter by sqrt(hidden_size), as this embedding does with its vectors."""
    base = tiny_models.build("gemma3")
    theirs, _ = by_peft(base, tmp_path, target_modules=["embed_tokens", "q_proj"])
    config = tmp_path / "adapter_config.json"
    options = {**json.loads(config.read_text()), "peft_version": version}
    config.write_text(json.dumps(options))
    model = tiny_models.build("gemma3")
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    scale = math.sqrt(32)
    said = f"lorakit does: 'model.embed_tokens' by {scale:g}. If such"
    assert (said in caplog.text) == (version is None)
    stored = formats.read(tmp_path)
    stored.base_copies.clear()
    formats.write(stored, tmp_path / "converted")
    lorakit.load(tiny_models.build("gemma3"), tmp_path / "converted")
    assert caplog.text.count(said) == (2 if version is None else 0)
    lorakit.load(tiny_models.build("gemma3").to("meta"), tmp_path / "converted")

    # the repair that the message names
    theirs.base_model.model.model.embed_tokens.scaling["default"] /= scale
    repaired = {"alpha_pattern": {"embed_tokens": options["lora_alpha"] / scale}}
    config.write_text(json.dumps({**options, **repaired, "peft_version": "0.18.0"}))
    caplog.clear()
    lorakit.load(model := tiny_models.build("gemma3"), tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    assert "0.18" not in caplog.text


def test_a_layer_that_the_model_uses_at_two_paths(tmp_path):
    """PEFT adapts one of the two uses, lorakit both."""

    def build() -> Net:
        net = Net()
        net.body[2] = net.body[0]
        return net

    by_peft(build(), tmp_path, target_modules=["body.0"])
    with pytest.raises(
        AdapterFileError, match=r"'body\.0', but the model uses it at several paths"
    ):
        lorakit.load(build(), tmp_path)


# --- damaged and hostile folders ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    by_peft(Net(), folder, target_modules=["body.0", "body.1", "attn"], modules_to_save=["head"])
    return folder


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.0.lora_A.weight": None}, r"'body\.0': it has lora_B; .* lora_A, lora_B were"),
        ({"body.0.lora_B.weight": None}, r"'body\.0': it has lora_A; .* lora_A, lora_B were"),
        ({"body.2.lora_B.weight": numbers(8, 2)}, r"'body\.2': it has lora_B"),
        ({"body.0.lora_A.weight": numbers(3, 8)}, r"'body\.0': lora_A has shape \(3, 8\), but .* rank"),
        ({"body.0.lora_B.weight": numbers(8, 3)}, r"'body\.0': A has shape \(2, 8\) and B has"),
        ({"body.0.lora_A.weight": numbers(2, 8) * float("nan")}, r"'body\.0': A holds 16 values"),
        ({"body.0.lora_B.weight": torch.ones(8, 2).bool()}, r"'body\.0': B holds bool numbers"),
        ({"body.0.lora_A.other.weight": numbers(2, 8)},
         r"'body\.0\.lora_A\.other\.weight' is no name of PEFT.*without an adapter name other than default"),
        ({"body.0.lora_B.bias": numbers(8)}, "it has lora_A, lora_B, lora_B.bias; .* lora_bias false"),
        ({"body.0.lora_magnitude_vector": numbers(8)}, "lora_magnitude_vector; with use_dora false"),
        ({"body.0.base_layer.bias": numbers(8), "body.0.bias": numbers(8, seed=1)},
         r"holds 'body\.0\.bias' twice"),
        ({"head.weight": None, "head.bias": None}, "the trained head is missing"),
        ({"head.weight": numbers(4, 8) * float("inf")}, r"'head\.weight' holds 32 values"),
        ({"attn.lora_A.weight": None, "attn.lora_B.weight": None},
         r"'attn\.base_layer\.out_proj' has factors, but its parent 'attn' has none"),
        ({"body.0.lora_embedding_A": numbers(2, 8)}, r"'body\.0': it has lora_A, lora_B, lora_embedding_A"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, sound, change, message):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in change.items():
        tensors.pop(PREFIX + key, None)
        if tensor is not None:
            tensors[PREFIX + key] = tensor
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_peft(folder)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "does not hold a JSON object"),
        ("{", "is not JSON: .*line 1"),
        ("", "is not JSON"),
        ('{"peft_type": "LORA", "r": 0}', "r is 0"),
        ('{"peft_type": "LORA", "lora_alpha": 0}', "lora_alpha is 0"),
        ('{"peft_type": "ADALORA"}', "of type 'ADALORA'"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa"}', "init_lora_weights is 'pissa'"),
        ('{"peft_type": "LORA", "r": NaN}', "NaN is not a JSON number"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, sound, text, message):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_peft(folder)
    assert "adapter_config.json" in str(caught.value)


# --- what PEFT's format cannot represent ----------------------------------------------------------------


def from_live(model: nn.Module, **settings) -> StoredAdapter:
    handle = lorakit.attach(model, lorakit.LoRA(**settings), seed=0)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return handle.stored()


def test_written_options_are_what_peft_needs():
    model = tiny_models.build("llama")
    model.config._name_or_path = "owner/tiny"
    stored = from_live(
        model,
        rank=2,
        alpha=3,
        targets=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 4, r"layers\.1\.self_attn\.q_proj": 3},
        alpha_pattern={"down_proj": 5.5},
        dropout=0.25,
    )
    config = peft_form(stored).config
    assert config == {
        "alpha_pattern": {r"^model\.layers\.\d+\.mlp\.down_proj": 5.5},
        "base_model_name_or_path": "owner/tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 3,
        "lora_dropout": 0.25,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {
            r"^model\.layers\.1\.self_attn\.q_proj": 3,
            r"^model\.layers\.\d+\.mlp\.down_proj": 4,
        },
        "revision": None,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    json.dumps(config)


@pytest.mark.parametrize(
    ("rank", "alpha", "others", "written"),
    [
        (4, 16, {}, (32, False)),
        (8, 16, {}, (16 / math.sqrt(8) * 8, False)),
        (5, 16, {}, (16, True)),  # no alpha / 5 is the same number
        (4, 16, {"v_proj": 2}, (16, True)),  # alpha / r would need alpha_pattern
    ],
    ids=str,
)
def test_rslora_is_written_for_readers_that_know_only_alpha_over_rank(
    rank: int, alpha: int, others: dict[str, int], written: tuple[float, bool], tmp_path: Path
) -> None:
    """llama.cpp and SGLang ignore use_rslora."""
    method = lorakit.LoRA(rank=rank, alpha=alpha, scaling="rslora", rank_pattern=others)
    handle = lorakit.attach(tiny_models.build("llama"), method)
    folder = handle.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == written
    assert config["alpha_pattern"] == {}
    expected = {path: layer.scaling for path, layer in handle.stored().layers.items()}
    for found in (formats.read(folder), read_peft(folder)):
        assert {path: layer.scaling for path, layer in found.layers.items()} == expected
    assert formats.read(folder).method == method
    theirs = loaded_by_peft(tiny_models.build("llama"), folder)
    for path, scaling in expected.items():
        assert theirs.base_model.model.get_submodule(path).scaling["default"] == scaling


@pytest.mark.parametrize(
    ("arch", "head", "settings", "expected"),
    [
        ("gpt2", None, {}, "CAUSAL_LM"),
        ("t5", None, {}, "SEQ_2_SEQ_LM"),
        ("roberta", None, {"train_modules": ["classifier"]}, "SEQ_CLS"),
        ("distilbert", None, {"train_modules": ["classifier"]}, "SEQ_CLS"),
        ("roberta", None, {}, None),  # PEFT would look for a head in the file
        ("llama", "sequence-classification", {"train_modules": ["score"]}, "SEQ_CLS"),
        ("bert", "masked-lm", {}, None),
        ("vit", None, {"train_modules": ["classifier"]}, None),
    ],
)
def test_task_type(arch, head, settings, expected):
    stored = from_live(tiny_models.build(arch, head), rank=2, targets="attention.q", **settings)
    assert peft_form(stored).config["task_type"] == expected


def test_a_tied_head_becomes_two_layers(tmp_path):
    model = tiny_models.build("gpt2")
    stored = from_live(model, rank=2, targets="embedding", tie_head=True)
    form = peft_form(stored)
    table = stored.layers["transformer.wte"]
    assert table.tied_head == "lm_head"
    assert torch.equal(form.tensors[f"{PREFIX}lm_head.lora_A.weight"], table.B.T)
    assert torch.equal(form.tensors[f"{PREFIX}lm_head.lora_B.weight"], table.A.T)
    formats.write(stored, tmp_path)
    batch = tiny_models.example_batch("gpt2", model)
    with torch.no_grad():
        expected = model(**batch).logits
        fresh = tiny_models.build("gpt2")
        assert (expected - fresh(**batch).logits).abs().max() > 1e-2
        found = loaded_by_peft(fresh, tmp_path)(**batch).logits
    rounding = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    assert formats.read(tmp_path).layers["transformer.wte"].tied_head == "lm_head"


@pytest.mark.parametrize("modules", [["wte", "lm_head"], ["lm_head"], ["wte"]], ids="-".join)
def test_a_tied_weight_trained_at_one_place_or_at_both(tmp_path, modules):
    model = tiny_models.build("gpt2")
    settings = lorakit.LoRA(rank=2, targets="attention.q", train_modules=modules)
    handle = lorakit.attach(model, settings, seed=0)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
        handle.save(tmp_path / "adapter")
        batch = tiny_models.example_batch("gpt2", model)
        expected = model(**batch).logits
        theirs = loaded_by_peft(tiny_models.build("gpt2"), tmp_path / "adapter")
        torch.testing.assert_close(theirs(**batch).logits, expected, rtol=0, atol=1e-5)
        again = tiny_models.build("gpt2")
        lorakit.load(again, tmp_path / "adapter")
        assert torch.equal(again(**batch).logits, expected)


def test_a_tied_weight_that_peft_trained_apart(tmp_path):
    modules = {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}
    by_peft(tiny_models.build("gpt2"), tmp_path, **modules, fan_in_fan_out=True)
    stored = read_peft(tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"apart, but they are one tensor .* a copy of the base"
    ):
        formats.check_targets(stored, tiny_models.build("gpt2"))
    untied = tiny_models.build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    formats.check_targets(stored, untied)
    assert stored.trained.keys() == {"transformer.wte.weight", "lm_head.weight"}


def test_one_projection_of_an_attention_module_brings_the_other_as_zeros():
    stored = from_live(Net(), rank=2, targets="attn.out_proj")
    assert list(stored.layers) == ["attn.out_proj"]
    form = peft_form(stored)
    assert form.config["target_modules"] == ["attn"]
    assert (form.config["r"], form.config["lora_alpha"]) == (2, 8)  # PEFT adds it twice
    assert not form.tensors[f"{PREFIX}attn.lora_B.weight"].any()
    assert form.tensors[f"{PREFIX}attn.lora_B.weight"].shape == (24, 2)
    same_bits(
        form.tensors[f"{PREFIX}attn.base_layer.out_proj.lora_B.weight"],
        stored.layers["attn.out_proj"].B,
    )


@pytest.mark.parametrize(
    ("version", "notice"),
    [
        (
            "0.21.2",
            "PEFT 0.21.2 adds the change of an nn.MultiheadAttention's output projection twice",
        ),
        ("0.18.1.dev0@abc", "PEFT 0.18.1.dev0@abc adds the change"),
        (None, "The file does not record its version of PEFT. All up to 0.21.2 add the change"),
    ],
)
def test_an_attention_module_is_computed_as_by_the_peft_that_wrote_it(
    version: str | None, notice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    theirs, _ = by_peft(Net(), tmp_path / "theirs", target_modules=["attn"])
    config_path = tmp_path / "theirs" / "adapter_config.json"
    options = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**options, "peft_version": version}))
    model = Net()
    handle = lorakit.load(model, tmp_path / "theirs")
    assert [record.message for record in caplog.records if notice in record.message]
    expected = theirs(IDS)
    torch.testing.assert_close(model(IDS), expected)
    caplog.clear()
    again = handle.save(tmp_path / "again")
    assert "compute what lorakit computes; a later PEFT may not" in caplog.text
    assert "a later PEFT may not" in (again / "README.md").read_text()
    torch.testing.assert_close(loaded_by_peft(Net(), again)(IDS), expected)
    lorakit.load(second := Net(), again)
    assert torch.equal(second(IDS), model(IDS))
    for name, tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        same_bits(load_file(again / "adapter_model.safetensors")[name], tensor, name)
    handle.merge()
    torch.testing.assert_close(model(IDS), expected)
    handle.detach()
    assert torch.equal(model(IDS), Net()(IDS))


@pytest.mark.parametrize("version", ["0.21.3", "0.22.0.dev0@abc", "1.0.0", "new", "9" * 5000])
def test_an_attention_module_of_a_later_peft_is_refused(version: str, tmp_path: Path):
    by_peft(Net(), tmp_path, target_modules=["attn", "body.0"])
    config_path = tmp_path / "adapter_config.json"
    options = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**options, "peft_version": version}))
    with pytest.raises(AdapterFileError, match="lorakit does not know what this version does"):
        read_peft(tmp_path)


def test_modules_are_saved_whole():
    stored = from_live(Net(), rank=2, targets="body.0", train_modules=["head"])
    del stored.trained["head.bias"]
    assert torch.equal(peft_form(stored).tensors[f"{PREFIX}head.bias"], Net().head.bias)
    loose = adapter({"a": linear()}, trained={"b.weight": numbers(2, 2)}, settings={"bias": "all"})
    assert peft_form(loose).config["modules_to_save"] == ["b"]


def with_saved_modules(path: Path, *, more: int = 0) -> PreTrainedModel:
    """Save an adapter of PEFT with both embeddings trained in full, of a vocabulary with `more` tokens."""
    model = tiny_models.build("llama", tie_word_embeddings=False)
    model.resize_token_embeddings(model.config.vocab_size + more)
    saved = ["lm_head", "embed_tokens"]
    with speaking_peft():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
        peft.get_peft_model(model, config).save_pretrained(path)
    return tiny_models.build("llama", tie_word_embeddings=False)


def test_a_vocabulary_that_grew_is_named(tmp_path: Path) -> None:
    model = with_saved_modules(tmp_path, more=2)
    size = model.config.vocab_size + 2
    with pytest.raises(AdapterFileError, match=rf"model\.resize_token_embeddings\({size}\)"):
        lorakit.load(model, tmp_path)
    model.resize_token_embeddings(size)
    lorakit.load(model, tmp_path)
