"""Measures of adapters, and functions that compress, combine and extract them.

Each measure has a function for plain tensors (`spectrum`, `subspace_similarity`, `amplification`,
`intruders`, ...) and a function for adapters, read from a folder or file (`adapter_spectrum`, ...).
"""

from lorakit.analysis.amplification import (
    AdapterAmplification,
    Amplification,
    adapter_amplification,
    amplification,
    random_projection,
    similarity_to_base,
    table7_row,
)
from lorakit.analysis.base_weights import Weights, open_weights, read_weights
from lorakit.analysis.combine import combine_adapters, dare, ties
from lorakit.analysis.compress import compress, compress_adapter
from lorakit.analysis.derived import Derived, LayerResult
from lorakit.analysis.diff import AdapterDiff, Difference, adapter_diff, difference
from lorakit.analysis.drift import Drift, adapter_drift, divergence
from lorakit.analysis.extract import extract, extract_adapter
from lorakit.analysis.intruders import AdapterIntruders, Intruders, adapter_intruders, intruders
from lorakit.analysis.saving import Saved, save
from lorakit.analysis.similarity import (
    AdapterSimilarity,
    Similarity,
    adapter_similarity,
    random_level,
    subspace_similarity,
)
from lorakit.analysis.spectrum import AdapterSpectrum, Spectrum, adapter_spectrum, spectrum
from lorakit.evaluation.scoring_config import ScoringConfig

__all__ = [
    "AdapterAmplification",
    "AdapterDiff",
    "AdapterIntruders",
    "AdapterSimilarity",
    "AdapterSpectrum",
    "Amplification",
    "Derived",
    "Difference",
    "Drift",
    "Intruders",
    "LayerResult",
    "Saved",
    "ScoringConfig",
    "Similarity",
    "Spectrum",
    "Weights",
    "adapter_amplification",
    "adapter_diff",
    "adapter_drift",
    "adapter_intruders",
    "adapter_similarity",
    "adapter_spectrum",
    "amplification",
    "combine_adapters",
    "compress",
    "compress_adapter",
    "dare",
    "difference",
    "divergence",
    "extract",
    "extract_adapter",
    "intruders",
    "open_weights",
    "random_level",
    "random_projection",
    "read_weights",
    "save",
    "similarity_to_base",
    "spectrum",
    "subspace_similarity",
    "table7_row",
    "ties",
]
