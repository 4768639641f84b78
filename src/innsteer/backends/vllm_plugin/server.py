"""``innsteer serve``: vLLM's own OpenAI server, with the plugin configured and the canary run."""

import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from innsteer.backends.menu import MARK, Menu
from innsteer.backends.vllm_plugin import http
from innsteer.errors import InputError, MissingPackage, NothingSteeredError
from innsteer.models import load_model
from innsteer.models.smollm2 import smollm2_folder
from innsteer.steering import Steering

MODULE = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = f"{http.__name__}.{http.Steered.__name__}"


def configuration(folders: Mapping[str, str | Path], untested: bool = False) -> dict[str, Any]:
    """The plugin's part of vLLM's ``additional_config``.

    Args:
        folders: name -> artifact folder, in the order of application.
        untested: start where no test has been.

    Raises:
        FormatError: a folder is no steering, or damaged. InputError: a name no request could say.
    """
    loaded = {name: Steering.load(folder) for name, folder in folders.items()}
    entries = {
        name: {"folder": str(Path(folders[name]).resolve()), "identity": steering.identity}
        for name, steering in loaded.items()
    }
    Menu.load(entries)
    maps = [steering.interventions for steering in loaded.values()]
    layers = {site.layer for one in maps for site in (*one, *one.read_sites)}
    return {"steerings": entries, "layers": sorted(layers), "untested": untested}


def check_base(model: str, folders: Mapping[str, str | Path]) -> None:
    """Refuse a model that a steering was not fitted on.

    Raises:
        MismatchError: it names what differs. InputError: there is no such model.
    """
    loaded = load_model(model)
    for folder in folders.values():
        Steering.load(folder).check(loaded)


def arguments(model: str, config: Mapping[str, Any], more: Sequence[str]) -> list[str]:
    """The server's command line; vLLM's own flags are passed through as they are.

    Args:
        model: as for ``load_model``; served under that name where no flag says another.

    Raises:
        InputError: ``--additional-config`` is given, which is the plugin's.

    >>> arguments("m", {}, ["--port", "1"])[-6:]
    ['--served-model-name', 'm', '--host', '127.0.0.1', '--port', '1']
    """
    own = {word.split("=")[0] for word in more}
    if "--additional-config" in own:
        raise InputError("--additional-config", expected="other flags: it holds the steerings")
    home = str(smollm2_folder()) if model == "smollm2" else model
    given = ["--model", home, "--middleware", MIDDLEWARE]
    given += ["--additional-config", json.dumps({MARK: config})]
    # vLLM listens on every interface where it is not told otherwise.
    for flag, value in (("--served-model-name", model), ("--host", "127.0.0.1")):
        given += [] if flag in own else [flag, value]
    return [*given, *more]


def serve(
    model: str, folders: Mapping[str, str | Path], more: Sequence[str], *, untested: bool
) -> None:
    """Run the server until it is stopped.

    Raises:
        MissingPackage: vllm is not installed. NothingSteeredError: the canary failed.
        InputError, RefusedError: what is asked for cannot be served.
    """
    try:
        from innsteer.backends.vllm_plugin import gate
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        raise MissingPackage("vllm", "serving a steered model", "vllm") from error
    gate.check_names()
    check_base(model, folders)
    words = arguments(model, configuration(folders, untested), more)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and MARK not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{MARK}".strip(",")
    sys.argv = [MODULE, *words]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    if http.FAILED:
        raise NothingSteeredError(http.FAILED[0])
