"""Steering over HTTP, around vLLM's own server: an ASGI middleware, and no route of its own.

A request names its steering as part of the model (``model: "NAME+cheerful@0.8"``) or as
``vllm_xargs={"steering": "cheerful@0.8"}``; its receipt comes back beside ``usage``.
"""

import json
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from uuid import uuid4

from innsteer.backends.menu import Menu
from innsteer.backends.vllm_plugin import canary, monitoring, settings
from innsteer.errors import InnsteerError, InputError, NothingSteeredError

log = logging.getLogger("vllm.innsteer")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ANSWERS = ("/v1/chat/completions", "/v1/completions")
HEADER = b"x-innsteer-receipt"
DONE = b"data: [DONE]"
FAILED: list[str] = []
"""Why the canary failed, for the process that started the server."""


class Steered:
    """The middleware; vLLM adds it by ``--middleware``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind, path = scope["type"], scope.get("path", "")
        if kind == "lifespan":
            await self.app(scope, receive, _after_startup(scope, send))
        elif kind == "http" and scope["method"] == "GET" and path == "/v1/models":
            await self.app(scope, receive, _Whole(send, lambda body: _models(_menu(scope), body)))
        elif kind == "http" and scope["method"] == "POST" and path in ANSWERS:
            await self._answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        """A request that may be steered."""
        body = await _read(receive)
        served = scope["app"].state.args
        names = served.served_model_name or [served.model]
        try:
            data = json.loads(body)
            text = take(data, names) if isinstance(data, dict) else None
        except json.JSONDecodeError:
            text = None  # vLLM says so better
        except InnsteerError as error:
            monitoring.REFUSED.inc()
            await _refuse(send, 400, "BadRequestError", str(error))
            return
        if text is None:
            await self.app(scope, _once(body, receive), send)
            return
        name = uuid4().hex
        data["vllm_xargs"]["steering_receipt"] = name
        body = json.dumps(data).encode()
        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))

        async def receipt() -> dict[str, Any]:
            found = await scope["app"].state.engine_client.collective_rpc(
                "innsteer_receipt", args=(name,)
            )
            applied = _menu(scope).told(text, dict(found[0] or ()))
            monitoring.count(applied)
            return {"asked": text, "applied": applied}

        answer = _Answer(send, receipt)
        try:
            await self.app({**scope, "headers": headers}, _once(body, receive), answer)
        finally:
            await answer.close()


def take(data: dict[str, Any], names: list[str]) -> str | None:
    """The steering that a request's body asks for, which is left as vLLM takes it; None: none.

    Args:
        data: the body. names: those under which the model is served.

    Raises:
        InputError: it is asked for in two ways, or in one that vLLM would leave unread.

    >>> body = {"model": "smol+cheerful@0.8"}
    >>> take(body, ["smol"]), body
    ('cheerful@0.8', {'model': 'smol', 'vllm_xargs': {'steering': 'cheerful@0.8'}})
    """
    if "steering" in data:
        raise InputError(
            "a field 'steering'", expected='vllm_xargs={"steering": ...}, or a model "NAME+..."'
        )
    extra = data.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        return None  # vLLM says so
    model = data.get("model")
    own = next((name for name in names if str(model).startswith(f"{name}+")), None)
    if model in names or own is None:
        text = extra.get("steering")
    elif "steering" in extra:
        raise InputError(f"the model {model!r} beside vllm_xargs['steering']", expected="one")
    else:
        text = str(model)[len(own) + 1 :]
        data["model"] = own
    if not isinstance(text, str):
        return None  # none, or one that admission refuses
    data["vllm_xargs"] = {**extra, "steering": text}
    return text


# --- bodies --------------------------------------------------------------------------------------


class _Whole:
    """Passes on a JSON body after a change; any other answer as it is."""

    def __init__(self, send: Send, change: Callable[[dict[str, Any]], None]) -> None:
        self._send, self._change = send, change
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """One message of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        if self._start["status"] == 200:
            data = json.loads(self._body)
            self._change(data)
            self._body = json.dumps(data).encode()
        await _whole(self._send, self._start, self._body)


class _Answer:
    """An answer with its receipt: in body and header, or as the last chunk of a stream."""

    def __init__(self, send: Send, receipt: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._send, self._receipt = send, receipt
        self._start: Message = {}
        self._body, self._last = b"", b""
        self._streams = self._taken = False

    async def __call__(self, message: Message) -> None:
        """One message of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
        elif self._streams:
            await self._chunk(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._end()

    async def close(self) -> None:
        """Take the receipt of an answer that nobody waited for, so that its place is free."""
        if not self._taken:
            # It was refused, or broken off before its first token.
            with suppress(InnsteerError):
                await self._take()

    async def _take(self) -> dict[str, Any]:
        self._taken = True
        return await self._receipt()

    async def _end(self) -> None:
        """A whole answer: with its receipt, or not at all."""
        if self._start["status"] != 200:
            await _whole(self._send, self._start, self._body)
            return
        try:
            receipt = await self._take()
        except NothingSteeredError as error:
            monitoring.UNSTEERED.inc()
            await _refuse(self._send, 500, "InternalServerError", str(error))
            return
        data = json.loads(self._body) | {"steering": receipt}
        told = json.dumps(receipt, separators=(",", ":")).encode()
        start = {**self._start, "headers": [*self._start["headers"], (HEADER, told)]}
        await _whole(self._send, start, json.dumps(data).encode())

    async def _chunk(self, message: Message) -> None:
        """A part of a stream: whole events; before the one that ends it comes the receipt."""
        events = message.get("body", b"").split(b"\n\n")
        self._last = next((one for one in reversed(events) if one[:7] == b"data: {"), self._last)
        if DONE not in events:
            await self._send(message)
            return
        try:
            told = {"steering": await self._take()}
        except NothingSteeredError as error:
            monitoring.UNSTEERED.inc()
            told = {"error": _error(500, "InternalServerError", str(error))}
        last = json.loads(self._last.removeprefix(b"data: ") or b"{}")
        kept = {key: last[key] for key in ("id", "object", "created", "model") if key in last}
        receipt = b"data: " + json.dumps(kept | {"choices": []} | told).encode()
        events.insert(events.index(DONE), receipt)
        await self._send({**message, "body": b"\n\n".join(events)})


async def _read(receive: Receive) -> bytes:
    """A request's body; of a client that left, what came."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
    return body


def _once(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read again; then whatever comes: the client may leave."""
    given = [body]

    async def again() -> Message:
        if given:
            return {"type": "http.request", "body": given.pop(), "more_body": False}
        return await receive()

    return again


async def _whole(send: Send, start: Message, body: bytes) -> None:
    """An answer whose length changed."""
    headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    """An error in vLLM's words."""
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json")],
    }
    await _whole(send, start, json.dumps({"error": _error(status, kind, message)}).encode())


def _error(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": "steering", "code": status}


# --- menu and canary -----------------------------------------------------------------------------


def _menu(scope: Message) -> Menu:
    config = settings.of(scope["app"].state.vllm_config)
    assert config is not None, "the middleware is added by innsteer serve"
    return settings.menu(config)


def _models(menu: Menu, data: dict[str, Any]) -> None:
    """One more model per steering, at its calibrated strength."""
    for model in list(data["data"]):
        for name in menu.names:
            data["data"].append(
                {
                    "id": f"{model['id']}+{name}",
                    "object": "model",
                    "created": model["created"],
                    "owned_by": "innsteer",
                    "root": model["root"],
                    "parent": model["id"],
                    "max_model_len": model.get("max_model_len"),
                }
            )


def _after_startup(scope: Message, send: Send) -> Send:
    """Run the canary before the server says that it is up."""

    async def sending(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            try:
                for line in await _canary(scope):
                    log.info("canary: %s", line)
            except InnsteerError as error:
                FAILED.append(str(error))
                print(f"innsteer: {error}", file=sys.stderr, flush=True)
                message = {"type": "lifespan.startup.failed", "message": str(error)}
        await send(message)

    return sending


async def _canary(scope: Message) -> list[str]:
    """Every steering once, beside the plain model."""
    from vllm import SamplingParams

    client, menu = scope["app"].state.engine_client, _menu(scope)

    async def first(prompt: list[int], extra: dict[str, Any] | None) -> dict[int, float]:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=1, extra_args=extra)
        found: dict[int, float] = {}
        async for output in client.generate({"prompt_token_ids": prompt}, params, uuid4().hex):
            step = output.outputs[0].logprobs[0]
            found = {token: entry.logprob for token, entry in step.items()}
        return found

    lines = []
    tokens = client.get_tokenizer() if hasattr(client, "get_tokenizer") else client.tokenizer
    ids = tokens.encode("The hotel was quiet, and the staff were kind to us.")
    for dish, (_, prompt, extra) in zip(menu.dishes, canary.requests(menu, ids), strict=True):
        plain, steered = await first(prompt, None), await first(prompt, extra)
        found = await client.collective_rpc("innsteer_receipt", args=(extra["steering_receipt"],))
        tally = dict(found[0] or ()).get(menu.dishes.index(dish))
        lines.append(canary.judge(dish, tally, plain, steered))
    return lines
