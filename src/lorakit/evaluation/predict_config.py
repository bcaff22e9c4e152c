"""Settings of a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.compute.adapted_config import AdaptedConfig
from lorakit.configuration import LocalPath, strict
from lorakit.data.data_config import DataConfig
from lorakit.errors import ConfigurationError, require_at_least, require_suffix


@strict
@dataclass(frozen=True, kw_only=True)
class PredictConfig(AdaptedConfig):
    """Settings of `lorakit predict`, which applies a trained classifier or regressor to rows without labels."""

    data: DataConfig
    """The rows, in `data.test`; a column with labels is ignored."""
    adapter: LocalPath
    """Adapter folder. It records the task and its labels."""
    output: LocalPath
    """Write each row with its prediction to this .jsonl file. Classes also have their probabilities."""
    batch_size: int = 16
    """Rows per forward pass."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.test is None:
            raise ConfigurationError(
                "data.test is not set; set it to the rows to predict, for example --data.test new.csv."
            )
        require_at_least("batch_size", self.batch_size, 1)
        require_suffix("output", self.output, ".jsonl")
