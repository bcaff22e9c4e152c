"""The page "From PEFT, TRL ...": its names, defaults and examples are those of the libraries and of lorakit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorakit
from lorakit.adapters.formats.peft import adapter_config
from lorakit.cli import COMMANDS, main
from lorakit.cli.options import options_of, sections_of
from lorakit.cli.parsing import parse
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.other_names import OTHER_NAMES
from lorakit.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/guides/from-peft.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M"

PEFT, TRAINER, GENERATION, AXOLOTL, LLAMA_FACTORY = (
    "PEFT's LoraConfig",
    "transformers' TrainingArguments, TRL's SFTConfig",
    "Generation",
    "axolotl",
    "LLaMA-Factory",
)
OLDER = {
    *("warmup_ratio", "overwrite_output_dir", "max_seq_length", "torch_dtype"),
    *("load_in_4bit", "load_in_8bit"),
}
"""Settings of earlier versions of transformers and TRL."""
OF_SCRIPTS = {"model_name_or_path", "dataset_name", "train_file", "validation_file"}
"""Settings of the example scripts of transformers and TRL."""
ALIASES = {"model", "model_name", "lr"}
"""Names in OTHER_NAMES that no library's table has: short forms."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its heading and the code in its first two cells."""

    heading: str
    theirs: list[str]
    ours: list[str]
    cells: list[str]


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _rows() -> list[Row]:
    rows = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if line.startswith("| ") and len(cells) >= 2 and "---" not in line:
                rows.append(Row(heading, _code(cells[0]), _code(cells[1]), cells))
    return rows


ROWS = _rows()


def _rows_of(*headings: str) -> list[Row]:
    return [row for row in ROWS if row.heading in headings and row.theirs]


def _option(code: str) -> str:
    """Return the option of `lora.scaling: rslora`."""
    return code.partition(":")[0]


def _config_with(option: str) -> type:
    return TrainConfig if option in options_of(TrainConfig) else EvaluateConfig


def _every_option() -> set[str]:
    configs = [c for name in COMMANDS for c in import_module(f"lorakit.cli.{name}").CONFIGS]
    return {name for config in configs for name in options_of(config)}


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OTHER_NAMES.keys() - ALIASES))
def test_every_other_name_is_on_the_page_beside_its_option(name: str) -> None:
    beside = [
        row for row in ROWS if name in row.theirs and OTHER_NAMES[name] in map(_option, row.ours)
    ]
    assert beside, f"no row has {name} beside {OTHER_NAMES[name]}"


def _renamed() -> Iterable[tuple[str, str]]:
    """Yield each name of the page whose row names a lorakit option, and that option."""
    for row in _rows_of(PEFT, TRAINER, GENERATION, AXOLOTL, LLAMA_FACTORY):
        if not row.cells[1].startswith("`"):
            continue
        options = [_option(code) for code in row.ours]
        for i, name in enumerate(row.theirs):
            option = options[i] if len(options) == len(row.theirs) else options[0]
            if re.fullmatch(r"[a-z]\w*", name) and name != option:
                yield name, option


def test_the_command_line_answers_each_name_of_the_page_with_its_option() -> None:
    answered = 0
    for name, option in _renamed():
        with pytest.raises(ConfigurationError) as raised:
            parse(_config_with(option), "train", "", [f"--{name}", "1"])
        assert re.search(rf"--{option}\b", str(raised.value)), name
        answered += 1
    assert answered > 80


@pytest.mark.parametrize("inside", [False, True], ids=["top level", "section"])
def test_a_yaml_file_answers_each_name(inside: bool, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for name, option in OTHER_NAMES.items():
        section, _, last = option.rpartition(".")
        if inside and (not section or name == last):
            continue
        file.write_text(yaml.safe_dump({section: {name: 1}} if inside else {name: 1}))
        with pytest.raises(ConfigurationError) as raised:
            parse(_config_with(option), "train", "", ["--config", str(file)])
        assert f"Its name in lorakit is {option}." in str(raised.value), name


def test_python_answers_each_name() -> None:
    for name, option in OTHER_NAMES.items():
        config: Any = _config_with(option)
        with pytest.raises(ConfigurationError) as raised:
            config(base="b", data={"train": "t.jsonl"}, output="o", **{name: 1})
        ours = option if "." in option else f"'{option}'"
        assert f"Its name in lorakit is {ours}" in str(raised.value), name


def test_dashes_may_replace_underscores_in_another_name(capsys) -> None:
    assert main(["train", "--warmup-ratio", "0.1"]) == 1
    assert "Its name in lorakit is --optimizer.warmup." in capsys.readouterr().err


def test_the_message_on_the_page(capsys) -> None:
    assert main(["train", "--lora_r", "8", "--num_train_epochs", "3"]) == 1
    assert capsys.readouterr().err in PAGE


def test_everything_of_lorakit_that_the_page_names_exists() -> None:
    options = _every_option()
    for row in ROWS:
        for code in row.ours:
            if "." not in code and " " not in code and code not in options:
                known = set(sections_of(TrainConfig)) | {
                    "attach",
                    "DPOTrainer",
                    "KTOTrainer",
                    "alpha=",
                }
                assert code in known, code
            elif re.fullmatch(r"[a-z_.]+", _option(code)) and not re.match(
                r"(lorakit|adapters)\.|examples/", code
            ):
                assert _option(code) in options, code
    for word in re.findall(r"`lorakit ([a-z]+)", PAGE):
        assert word in COMMANDS, word
    for name in re.findall(r"\badapters\.([a-z_]+)", PAGE):
        assert hasattr(lorakit.Adapters, name) or name in ("model", "md"), name
    for path in re.findall(r"\blorakit\.((?!json|rank)[A-Za-z_.]+)", PAGE):
        found: Any = lorakit
        for name in path.strip(".").split("."):
            found = getattr(found, name) if hasattr(found, name) else _submodule(found, name)
    for script in re.findall(r"`(examples/\w+\.py)", PAGE):
        assert (ROOT / script).is_file(), script


def _submodule(module: Any, name: str) -> Any:
    return import_module(f"{module.__name__}.{name}")


@pytest.mark.parametrize(
    "code",
    sorted({code for row in ROWS for code in row.ours if re.fullmatch(r"[a-z_.]+: \S+", code)}),
)
def test_every_value_on_the_page_is_valid(code: str) -> None:
    name, _, value = code.partition(": ")
    run = ["--base.name", "b", "--data.train", "t.jsonl", "--output", "o"]
    config: Any = parse(TrainConfig, "train", "", [*run, f"--{name}", value])
    for part in name.split("."):
        config = getattr(config, part)
    shown = ", ".join(config) if isinstance(config, tuple) else str(config)
    assert shown.lower() == value


# --- the libraries ---------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """Return a default as the page shows it."""
    value = getattr(value, "value", value)
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else value


def _defaults_on_the_page(cell: str) -> dict[str, str]:
    return dict(re.findall(r"`([\w.]+)` \(([^)]*)\)", cell))


def _defaults(config_class: Any) -> dict[str, Any]:
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in fields(config_class)
        if field.default is not MISSING or field.default_factory is not MISSING
    }


def test_the_defaults_of_lorakit() -> None:
    seen = 0
    for row in ROWS:
        for name, default in _defaults_on_the_page(row.cells[1]).items():
            expected = options_of(_config_with(name))[name].default
            assert default == _shown(expected), name
            seen += 1
    assert seen > 70


@pytest.mark.slow  # imports PEFT
def test_every_field_of_lora_config_has_one_row_with_its_default() -> None:
    from peft import LoraConfig

    rows = _rows_of(PEFT)
    named = [name for row in rows for name in row.theirs]
    assert sorted(named) == sorted(field.name for field in fields(LoraConfig))
    shown = {n: d for row in rows for n, d in _defaults_on_the_page(row.cells[0]).items()}
    expected = _defaults(LoraConfig)
    assert set(expected) - set(shown) == {"runtime_config"}  # an object
    assert shown == {name: _shown(expected[name]) for name in shown}


@pytest.mark.parametrize("kind", ["error", "not needed"])
def test_options_of_peft_that_are_errors_or_have_no_effect(kind: str) -> None:
    names = [name for row in _rows_of(PEFT) if row.cells[1] == kind for name in row.theirs]
    assert len(names) > 9
    for name in set(names) - {"peft_type"}:
        value = True if name in ("fan_in_fan_out", "inference_mode") else "set"
        folder = {"peft_type": "LORA", name: value}
        if kind == "error":
            with pytest.raises(AdapterFileError, match=rf"option {name} is set"):
                adapter_config.parse(folder)
        else:
            assert adapter_config.parse(folder).r == 8


@pytest.mark.slow  # imports PEFT
def test_names_of_peft_and_loralib() -> None:
    import loralib
    import peft
    from peft import optimizers
    from peft.utils import hotswap

    on_model = {*dir(peft.PeftModel), *dir(peft.LoraModel), "peft_config"}
    checked = 0
    for code in (code for row in _rows_of("PEFT's calls") for code in row.theirs):
        if names := re.findall(r"\bmodel\.(\w+)", code):
            assert set(names) <= on_model, code
        elif name := re.match(r"(?!model)(\w+)(?=[(.]|$)", code):
            found = any(
                hasattr(place, name[1]) for place in (peft, hotswap, optimizers, peft.PeftModel)
            )
            assert found, code
        checked += 1
    assert checked > 30
    for code in (code for row in _rows_of("loralib") for code in row.theirs):
        name = re.match(r"\w+", code)
        assert name
        assert name[0] in ("model", "merge_weights") or hasattr(loralib, name[0]), code


@pytest.mark.slow  # imports TRL
def test_names_and_defaults_of_transformers_and_trl() -> None:
    from transformers import EarlyStoppingCallback, TrainingArguments
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    expected = {**_defaults(SFTConfig), **_defaults(TrainingArguments)}
    known = {*expected, *inspect.signature(SFTTrainer.__init__).parameters, *OLDER, *OF_SCRIPTS}
    known.add(EarlyStoppingCallback.__name__)
    seen = 0
    for row in _rows_of(TRAINER):
        assert set(row.theirs) <= known, row.theirs
        for name, default in _defaults_on_the_page(row.cells[0]).items():
            assert default == _shown(expected[name]), name
            seen += 1
    assert seen > 40
    assert not OLDER & set(expected)  # otherwise the page can show their defaults
    assert SFTConfig.learning_rate == 2e-5
    assert SFTConfig.gradient_checkpointing


# --- examples --------------------------------------------------------------------------------------


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_yaml_files_mean_the_same(tmp_path: Path) -> None:
    theirs, ours = _blocks("yaml")
    (tmp_path / "axolotl.yaml").write_text(theirs)
    (tmp_path / "run.yaml").write_text(ours)
    config = parse(TrainConfig, "train", "", ["--config", str(tmp_path / "run.yaml")])
    keys = yaml.safe_load(theirs)
    assert set(keys) <= {name for row in _rows_of(AXOLOTL) for name in row.theirs} | {
        "gradient_checkpointing"  # the same name
    }
    special = {  # lorakit has another form of the value
        "load_in_4bit": "nf4",
        "bf16": "nf4",
        "lora_target_linear": ("all-linear",),
        "datasets": "train.jsonl",
    }
    compared = 0
    for key, value in keys.items():
        if key in OTHER_NAMES and key != "sample_packing":
            found: Any = config
            for part in OTHER_NAMES[key].split("."):
                found = getattr(found, part)
            assert found == special.get(key, value), key
            compared += 1
    assert compared >= 17
    assert config.packing
    with pytest.raises(ConfigurationError) as raised:
        parse(TrainConfig, "train", "", ["--config", str(tmp_path / "axolotl.yaml")])
    for key in keys.keys() & OTHER_NAMES.keys():
        assert f"'{key}'. Its name in lorakit is {OTHER_NAMES[key]}." in str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_the_scripts_give_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_models

    monkeypatch.chdir(tmp_path)
    tiny_models.build("llama").save_pretrained("base")
    results = []
    for script in _blocks("python")[:2]:  # the page begins with the two scripts
        training = (
            "for p in model.parameters():\n"
            "    if p.requires_grad: torch.nn.init.normal_(p, std=0.3)\n"
        )
        script = re.sub(r"^\.\.\.  # train.*\n", training, script, flags=re.MULTILINE)
        names: dict[str, Any] = {"torch": torch}
        exec(script.replace(MODEL, "base"), names)
        results.append(names)
    theirs, ours = results
    ids = torch.arange(12)[None]
    with torch.no_grad():
        merged, base = theirs["merged"](ids).logits, tiny_models.build("llama")(ids).logits
        torch.testing.assert_close(ours["base"](ids).logits, merged)
    assert (merged - base).abs().max() > 1e-2
    assert list(ours["base"].state_dict()) == list(tiny_models.build("llama").state_dict())
    assert theirs["config"].r == ours["config"].rank
    assert theirs["config"].lora_alpha == ours["config"].alpha
    assert theirs["config"].lora_dropout == ours["config"].dropout
    assert theirs["config"].target_modules == set(ours["config"].targets)
