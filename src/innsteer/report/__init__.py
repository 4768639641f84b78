"""The report of an evaluation: its figures, and how they are shown."""

from innsteer.report.figures import Cloud, DosePoint, Figure, TokenTrail
from innsteer.report.results import Report

__all__ = ["Cloud", "DosePoint", "Figure", "Report", "TokenTrail"]
