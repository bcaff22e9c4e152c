"""The paper's metrics: one function for each family of data sets, on the scale of its official scorer.

    lorakit.metrics.e2e(outputs, references)       # BLEU, NIST, METEOR, ROUGE_L, CIDEr
    lorakit.metrics.webnlg(outputs, references)    # BLEU, METEOR, TER; for DART too
    lorakit.metrics.rouge(outputs, references)     # ROUGE_1, ROUGE_2, ROUGE_L; SAMSum
    lorakit.metrics.wikisql(outputs, examples)     # logical_form, execution
    lorakit.metrics.glue("cola", predictions, labels)

`outputs` is a list of texts; `references` is a list with one list of texts for each output. The packages that compute
the scores are imported at the first call.
"""

from lorakit.metrics.data_to_text import WITHOUT_JAVA, e2e, webnlg
from lorakit.metrics.labels import GLUE, classification, glue, regression
from lorakit.metrics.overlap import bleu, rouge
from lorakit.metrics.text_to_sql import wikisql

__all__ = [
    "GLUE",
    "WITHOUT_JAVA",
    "bleu",
    "classification",
    "e2e",
    "glue",
    "regression",
    "rouge",
    "webnlg",
    "wikisql",
]
