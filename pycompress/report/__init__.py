"""What became of a model, to show to somebody: one record, from which pages are made."""

from pycompress.report.record import Record, report

__all__ = ["Record", "report"]
