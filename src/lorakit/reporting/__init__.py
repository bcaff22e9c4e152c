"""Reports: charts and self-contained HTML pages of runs, evaluations and whatever stands above.

`page` holds the blocks a page is made of, `charts` the charts, `drawing` draws them. `run_report`,
`comparison` and `evaluation_report` fill pages from folders and plain data.
"""

from lorakit.reporting.charts import Chart, Figure
from lorakit.reporting.page import Page, Section
from lorakit.reporting.run_record import RunRecord, read_run
from lorakit.reporting.run_report import run_page

__all__ = ["Chart", "Figure", "Page", "RunRecord", "Section", "read_run", "run_page"]
