"""Reports: charts and self-contained HTML pages.

`page` defines the blocks of a page, `charts` builds charts and `drawing` renders them. `run_report`,
`comparison` and `evaluation_report` build the pages of runs and evaluations.
"""

from lorakit.reporting.charts import Chart, Figure
from lorakit.reporting.page import Page, Section
from lorakit.reporting.run_record import RunRecord, read_run
from lorakit.reporting.run_report import run_page

__all__ = ["Chart", "Figure", "Page", "RunRecord", "Section", "read_run", "run_page"]
