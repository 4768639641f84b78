"""Compare methods: every one fitted, dosed and tested alike, cell by cell, on several tasks."""

from innsteer.comparing.comparison import Comparison
from innsteer.comparing.contenders import Contender, always, contenders, inputs
from innsteer.comparing.search import Protocol

__all__ = ["Comparison", "Contender", "Protocol", "always", "contenders", "inputs"]
