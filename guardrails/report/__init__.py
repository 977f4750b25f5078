"""The report: what a run's ledger holds, as one self-contained page, as a picture, and as data.

Example:
    >>> from guardrails.report import collect, page
    >>> html = page([collect("runs/x")])  # doctest: +SKIP
"""

from guardrails.report.collect import collect
from guardrails.report.html import page
from guardrails.report.view import RunView

__all__ = ["RunView", "collect", "page"]
