"""Degeneration at 1,024 tokens: long answers that fall into a loop."""

from innsteer.metrics.degeneration_256 import Degeneration256


class Degeneration1024(Degeneration256):
    """Share of answers of up to 1,024 tokens whose last 32 words loop, 0 to 1."""

    asked = 1024
