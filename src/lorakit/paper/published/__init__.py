"""The paper's tables as data: every number as printed, with notes on known errors.

Numbers and table numbers follow version 2 of arXiv 2106.09685 (Hu et al. 2021).
"""

from lorakit.errors import require_choice
from lorakit.paper.published.generation import TABLE3, TABLE13, TABLE14, TABLE18
from lorakit.paper.published.glue import TABLE2
from lorakit.paper.published.gpt3 import TABLE4, TABLE5, TABLE6, TABLE7, TABLE8, TABLE15, TABLE16
from lorakit.paper.published.latency import TABLE1
from lorakit.paper.published.table import Cell, PublishedRow, PublishedTable

PUBLISHED: dict[str, PublishedTable] = {
    table.name: table
    for table in (
        *(TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, TABLE7, TABLE8),
        *(TABLE13, TABLE14, TABLE15, TABLE16, TABLE18),
    )
}
"""Every table, by name."""


def published(name: str) -> PublishedTable:
    """Return a table by its name, such as ``table2``.

    Raises:
        ConfigurationError: No table has this name.
    """
    require_choice("table", name, PUBLISHED)
    return PUBLISHED[name]


__all__ = ["PUBLISHED", "Cell", "PublishedRow", "PublishedTable", "published"]
