"""What the engine was started with: the part of vLLM's configuration that is this plugin's.

``additional_config["innsteer"]`` reaches every process of the engine, and is part of the key of
compiled graphs; so it holds what decides which layers carry an operation, and no tensors.
"""

import json
from functools import cache
from typing import Any

from innsteer.backends.menu import MARK, Menu

Config = dict[str, Any]


def of(vllm_config: Any) -> Config | None:
    """The plugin's part of a VllmConfig; None: the engine steers nothing.

    ``steerings``: name -> folder and identity, in the order of application. ``layers``: those that
    carry the operation. ``untested``: run where no test has been.
    """
    given = vllm_config.additional_config
    found: Config | None = given.get(MARK) if isinstance(given, dict) else None
    return found


def menu(config: Config) -> Menu:
    """The menu of a configuration, loaded once per process."""
    return _menu(json.dumps(config["steerings"]))


@cache
def _menu(steerings: str) -> Menu:
    return Menu.load(json.loads(steerings))
