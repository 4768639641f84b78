"""Proof, before anything is served, that every steering reaches the model and moves it."""

from collections.abc import Mapping, Sequence
from typing import Any

from innsteer.backends.menu import Dish, Menu
from innsteer.errors import NothingSteeredError

Asked = dict[str, Any]


def requests(menu: Menu, tokens: Sequence[int]) -> list[tuple[str, list[int], Asked]]:
    """What to ask: per steering its name, a prompt, and ``vllm_xargs``; each answered plain too.

    Args:
        tokens: ids of some text, at least three; repeated where a scope begins late.
    """
    found = []
    for dish in menu.dishes:
        prompt = list(tokens)
        while len(prompt) <= dish.where.start:
            prompt += tokens
        text = "+".join(f"{name}@1" for name in dish.asked_as)
        extra: Asked = {"steering": text, "steering_receipt": f"canary-{dish.name}"}
        if dish.where.scope == "assistant":
            extra["steering_turns"] = [len(prompt) - 1, -1]
        found.append((dish.name, prompt, extra))
    return found


def judge(
    dish: Dish,
    tally: Mapping[str, Any] | None,
    plain: Mapping[int, float],
    steered: Mapping[int, float],
) -> str:
    """What is to be said of a steering that works.

    Args:
        tally: its receipt. plain, steered: log-probabilities of some first tokens.

    Raises:
        NothingSteeredError: it touched no token, or edited some and moved nothing.
    """
    if tally is None or not tally["touched"]:
        raise NothingSteeredError(
            f"the canary of steering {dish.name!r} touched no token",
            expected="its tokens to pass through the map",
            remedy="do not serve this model with this version of vLLM",
        )
    if not tally["edited"]:
        return f"{dish.name}: touched {tally['touched']} tokens, its gate is shut on the canary"
    moved = max(abs(plain[t] - steered[t]) if t in steered else 1.0 for t in plain)
    if not moved > 0:
        raise NothingSteeredError(
            f"the canary of steering {dish.name!r} edited {tally['edited']} tokens and moved no "
            "log-probability",
            expected="what is edited to reach the model's output",
        )
    return f"{dish.name}: touched {tally['touched']} tokens, moved a log-probability by {moved:.3g}"
