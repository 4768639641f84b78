"""What was steered since the start: counters that stand at ``/metrics`` beside vLLM's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter

from innsteer.backends.menu import MARK

REFUSED = Counter(
    f"{MARK}_refused_requests", "Requests refused because of what they are steered by."
)
UNSTEERED = Counter(
    f"{MARK}_unsteered_responses", "Responses withheld: they were to be steered, and were not."
)
RESPONSES = Counter(f"{MARK}_responses", "Responses that a steering touched.", ["steering"])
TOKENS = {
    what: Counter(f"{MARK}_{what}_tokens", told, ["steering"])
    for what, told in (
        ("touched", "Tokens that reached a steering with a strength that is not 0."),
        ("cached", "Touched tokens whose keys and values came from the cache."),
        ("edited", "Tokens that a steering changed."),
        ("nonfinite", "Tokens left alone because they were infinite or not a number."),
    )
}


def count(applied: Sequence[Mapping[str, Any]]) -> None:
    """Add what a receipt says."""
    for one in applied:
        name = one["name"]
        RESPONSES.labels(name).inc()
        for what, counter in TOKENS.items():
            counter.labels(name).inc(one[what])
