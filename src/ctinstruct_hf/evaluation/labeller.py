"""The labeller of reports under its public path: see `data.labeller`."""

from ..data.labeller import FINDINGS, Mention, ReportLabels, find_mentions, label_report

__all__ = ["FINDINGS", "Mention", "ReportLabels", "find_mentions", "label_report"]
