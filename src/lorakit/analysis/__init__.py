"""Looking into adapters and calculating with them.

Each measure is a function of plain tensors (`spectrum`, `subspace_similarity`, `amplification`,
`intruders`, ...) and one of adapters, read from a folder or file (`adapter_spectrum`, ...).
"""

from lorakit.analysis.amplification import (
    AdapterAmplification,
    Amplification,
    adapter_amplification,
    amplification,
    random_projection,
    similarity_to_base,
)
from lorakit.analysis.base_weights import Weights, open_weights, read_weights
from lorakit.analysis.intruders import AdapterIntruders, Intruders, adapter_intruders, intruders
from lorakit.analysis.similarity import (
    AdapterSimilarity,
    Similarity,
    adapter_similarity,
    random_level,
    subspace_similarity,
)
from lorakit.analysis.spectrum import AdapterSpectrum, Spectrum, adapter_spectrum, spectrum

__all__ = [
    "AdapterAmplification",
    "AdapterIntruders",
    "AdapterSimilarity",
    "AdapterSpectrum",
    "Amplification",
    "Intruders",
    "Similarity",
    "Spectrum",
    "Weights",
    "adapter_amplification",
    "adapter_intruders",
    "adapter_similarity",
    "adapter_spectrum",
    "amplification",
    "intruders",
    "open_weights",
    "random_level",
    "random_projection",
    "read_weights",
    "similarity_to_base",
    "spectrum",
    "subspace_similarity",
]
