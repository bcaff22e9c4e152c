"""Saving computed adapters with their provenance, and scoring them next to their inputs."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import storage
from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.loading import default_name
from lorakit.analysis.deltas import alphas, read, require_list
from lorakit.analysis.derived import Derived
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.base import read_text_tokenizer
from lorakit.data import DataConfig
from lorakit.errors import BaseModelError
from lorakit.evaluation.evaluate import check_evaluation, evaluate_adapter
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.evaluation.scoring_config import ScoringConfig
from lorakit.file_names import LORAKIT_JSON, PEFT_CONFIG, WEIGHTS
from lorakit.models.base_config import BaseConfig
from lorakit.models.sources import is_gguf
from lorakit.training.checkpoint_adapter import is_checkpoint, saved_adapter
from lorakit.training.environment import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

RESULT = "result"
"""Key of the scores of a computed adapter, beside the paths of its inputs."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A computed adapter after saving."""

    folder: Path
    scores: dict[str, dict[str, float]]
    """Scores of the inputs by path, and of the `RESULT`; empty without data."""
    notices: list[str]
    """Sentences to show to the user."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An adapter or model from which an adapter is computed, as it is when it is read.

    A training may replace it before the result is saved: the record of the result is that of the tensors that were
    used.
    """

    path: Path
    name: str
    """A name that a reader of the record recognises."""
    sha256: str | None
    """Digest of the file of the tensors, or of a GGUF file; None for another model."""
    folder: Path | None
    """Folder of an adapter's tokenizer and configuration; None for a model."""
    stored: StoredAdapter | None = None
    """The adapter, if it has been read."""

    @classmethod
    def of(cls, path: str | Path) -> Input:
        """Describe an adapter or a model."""
        path = Path(path)
        file = formats.tensor_file(path) or path / WEIGHTS
        return cls(
            path=path,
            name=_name(path),
            sha256=storage.sha256(file) if file.is_file() else None,
            folder=_folder(path),
        )

    @classmethod
    def read(cls, path: str | Path, *, alpha: float | None = None) -> Input:
        """Read an adapter.

        Raises:
            AdapterFileError: As for `lorakit.adapters.formats.read`.
        """
        return dataclasses.replace(cls.of(path), stored=read(path, alpha=alpha))


def save(
    made: Derived,
    output: str | Path,
    *,
    inputs: Sequence[str | Path | Input],
    settings: dict[str, Any],
    alpha: float | None = None,
    scoring: ScoringConfig | None = None,
    base: BaseConfig | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> Saved:
    """Write a computed adapter atomically as a folder, and score it and its inputs.

    lorakit.json and the card record the settings, the inputs with the digests of their tensors, and the scores. A new
    folder is written before the scores are computed, and again with them; an existing one is replaced only at the end.

    Args:
        made: The computed adapter.
        output: Output folder; must not exist unless `overwrite` is set.
        inputs: The adapters or models from which it was computed; those that may have been replaced meanwhile, as
            `Input.read` or `Input.of` from before the computation.
        settings: Settings to record, as JSON values.
        alpha: alpha of loralib files among the inputs.
        scoring: Data to score on; None, or a configuration without data, scores nothing.
        base: The base to score on; None uses the base that the adapter records.
        allow_other_base: Accept a base other than the recorded one for scoring.
        overwrite: Replace an existing adapter folder.

    Raises:
        ConfigurationError: `inputs` is one path, not a list.
        RunFolderError: The folder exists, is not an adapter folder, or cannot be written.
        LorakitError: The data or the base cannot be read, or do not match the adapter.
    """
    require_list("inputs", inputs)
    check_output(output, overwrite=overwrite)
    made.adapter.require_no_base_copies()  # `write` may run only after the scores
    described = [x if isinstance(x, Input) else Input.of(x) for x in inputs]
    adapters = {source.path: source for source in described if source.folder is not None}
    folders = [source.folder for source in adapters.values() if source.folder is not None]
    tokenizer = made.tokenizer or next(iter(folders), None)
    provenance = {
        **made.adapter.provenance,
        "made_by": settings,
        "made_from": [{"name": source.name, "sha256": source.sha256} for source in described],
        "error": made.error,
        "versions": versions(),
    }
    # An adapter read from a file does not tell what PEFT cannot express on the base; the inputs' folders do.
    for_peft = made.adapter.layout is not None or not any(map(_is_lorakit_only, folders))

    def write(scores: dict[str, dict[str, float]], *, overwrite: bool) -> Saved:
        recorded = {**provenance, "scores": scores[RESULT]} if scores else provenance
        stored = dataclasses.replace(made.adapter, provenance=recorded)
        with storage.atomic_folder(output, overwrite=overwrite) as temporary:
            notices = _write_tokenizer(tokenizer, temporary)
            notices += formats.write(stored, temporary, for_peft=for_peft)
        return Saved(folder=Path(output), scores=scores, notices=notices)

    if scoring is None or scoring.data == DataConfig():
        return write({}, overwrite=overwrite)
    # Scoring loads the base and may fail after a long computation.
    written = not Path(output).exists()
    if written:
        write({}, overwrite=False)
    scores: dict[str, dict[str, float]] = {}
    config = _evaluation(scoring, base=base, allow_other_base=allow_other_base)
    try:
        for path, its_alpha in zip(adapters, alphas([*adapters], alpha), strict=True):
            # An input of this name keeps a column of its own.
            name = str(path.absolute() if str(path) == RESULT else path)
            scores[name] = _score(_adapter_file(adapters[path], its_alpha), config)
        # The tokenizer is read from a folder, as from the output: saving may change it.
        with tempfile.TemporaryDirectory() as folder:
            _write_tokenizer(tokenizer, Path(folder))
            result = AdapterFile(str(output), made.adapter, tokenizer_folder=folder)
            scores[RESULT] = _score(result, config)
    except BaseException:
        if written:
            _LOG.warning("the computed adapter is in %s, without scores", output)
        raise
    check_output(output, overwrite=overwrite or written)  # the user may have added files
    return write(scores, overwrite=overwrite or written)


def check_output(output: str | Path, *, overwrite: bool = False) -> None:
    """Validate the output folder of `save` before a long computation.

    Raises:
        RunFolderError: The folder exists, is not an adapter folder, or cannot be written.
    """
    storage.require_free_folder(output, overwrite=overwrite)
    formats.check_replaceable(output)


def check_scoring(scoring: ScoringConfig, base: BaseConfig | None, source: Input) -> None:
    """Read the data to score on before a long computation. A configuration without data scores nothing.

    Args:
        scoring: The data.
        base: The base to score on; None uses the base that the adapter records.
        source: The first input, which may record the task of the data and their format.

    Raises:
        LorakitError: There is no data for the split to score, it cannot be read, or a package of the scores is missing.
    """
    if scoring.data == DataConfig():
        return
    adapter = None
    if source.folder is not None:
        adapter = _adapter_file(source)
    elif base is not None:  # the result has the tokenizer of this model, if there is one
        model = dataclasses.replace(base, name=str(source.path), revision=None)
        with suppress(BaseModelError):
            read_text_tokenizer(model)
            base = model
    check_evaluation(_evaluation(scoring, base=base), adapter)


def _adapter_file(source: Input, alpha: float | None = None) -> AdapterFile:
    """Return an input with its folder's tokenizer; read the adapter if it has not been read."""
    return AdapterFile(str(source.folder), source.stored or read(source.path, alpha=alpha))


def _score(file: AdapterFile, config: EvaluateConfig) -> dict[str, float]:
    return evaluate_adapter(config, file).scores


def _evaluation(scoring: ScoringConfig, **settings: Any) -> EvaluateConfig:
    shared = {f.name: getattr(scoring, f.name) for f in dataclasses.fields(ScoringConfig)}
    return EvaluateConfig(**shared, compare=False, **settings)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase | Path | None, folder: Path) -> list[str]:
    """Write a tokenizer, or a copy of the one in another folder; return a notice if it was left out."""
    if isinstance(tokenizer, Path):
        formats.copy_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        return formats.save_tokenizer(tokenizer, folder)
    return []


def _folder(path: Path) -> Path | None:
    """Return the folder of an adapter's tokenizer and configuration, or the loralib file; None for a model."""
    if is_checkpoint(path):
        return saved_adapter(path)
    if path.is_file():
        return None if is_gguf(path) else path
    return path if formats.is_adapter(path) else None


def _is_lorakit_only(path: Path) -> bool:
    """Return whether a lorakit folder lacks PEFT's files, for example because PEFT does not support a base layer."""
    return (path / LORAKIT_JSON).exists() and not (path / PEFT_CONFIG).exists()


def _name(path: Path) -> str:
    """Return the name by which a reader recognises an input: RUN, RUN/step-NNNNNN, or the whole hub id."""
    if not path.exists():
        return path.as_posix()
    if is_checkpoint(path):
        path = path.resolve()
        return f"{path.parent.parent.name}/{path.name}"
    return default_name(path)
