"""Steering inside vLLM, without a fork: a general plugin that vLLM loads into all its processes.

The only room that imports vllm. ``gate`` says which vLLM it is for and what it touches there;
``admission`` turns a request's string into an order, and keeps cached blocks apart; ``worker``
attaches the maps to the model's layers before they are compiled, and fills their buffers before
each pass; ``op`` is the one operation that a compiled graph sees; ``http`` and ``server`` are the
way in over HTTP, with counters in ``monitoring``; ``offline`` is the one from Python.
"""


def register() -> None:
    """The entry point: patch this process, once, however often vLLM loads the plugin.

    A vLLM that it is not for runs as it does without innsteer; ``innsteer serve`` refuses it.
    """
    import logging

    from innsteer.backends.vllm_plugin import gate
    from innsteer.errors import RefusedError

    try:
        gate.check_names()
    except RefusedError as error:
        logging.getLogger("vllm.innsteer").warning("innsteer steers nothing here: %s", error)
        return
    from innsteer.backends.vllm_plugin import admission, worker

    admission.install()
    worker.install()
