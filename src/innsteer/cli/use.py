"""Verbs that let a steered model speak: generate, chat, serve."""

import sys
from typing import Annotated, Any

import typer

from innsteer.cli.options import (
    CONCEPT,
    JSON,
    MODEL,
    SEED,
    STEERING,
    STRENGTH,
    base_model,
    edit_of,
    pair_of,
)
from innsteer.cli.printing import Bars, command_line, escape, finish, next_command, out, warn
from innsteer.cli.verbs import app
from innsteer.errors import InnsteerError, InputError, UnknownName


@app.command()
def generate(
    steering: STEERING,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; - or none: stdin.")] = None,
    model: MODEL = "",
    strength: STRENGTH = "",
    concept: CONCEPT = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Answer prompts, plain and steered side by side."""
    if not prompt and sys.stdin.isatty():
        raise InputError("no prompt", expected="arguments, or lines on standard input")
    from innsteer.backends.base import Prompt, Sampling
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    edit = edit_of(fitted, strength, concept)
    texts = [text for text in prompt or ["-"] if text != "-"]
    if not prompt or "-" in prompt:
        texts += [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise InputError("no prompt", expected="arguments, or lines on standard input")
    with Bars(as_json) as progress:
        language_model = base_model(fitted, model)
        backend = HF(language_model)
        prompts = [Prompt(str(n), text) for n, text in enumerate(texts)]
        sampling = Sampling(tokens, temperature, seed)
        plain = backend.generate(prompts, (), sampling, progress=progress)
        steered = backend.generate(prompts, [edit], sampling, progress=progress)
    pairs = list(zip(texts, plain, steered, strict=True))
    found = [
        {"prompt": text, "plain": p.text, "steered": s.text, "steered_tokens": s.steered}
        for text, p, s in pairs
    ]
    if not as_json:
        for text, p, s in pairs:
            out.print(f"[bold]{escape(text)}[/bold]")
            out.print(f"  [dim]plain  [/dim] {escape(p.text)}")
            out.print(f"  [dim]steered[/dim] {escape(s.text)}\n")
    strengths = dict(zip(fitted.behaviours, edit.coef.tolist(), strict=True))
    used = {name: value for name, value in strengths.items() if value} or strengths
    told = ", ".join(f"{name} {value:.4g}" for name, value in used.items())
    text = f"strength {told if len(strengths) > 1 else told.rpartition(' ')[2]}"
    text += "".join(f", {key} {value!r}" for one in edit.told for key, value in one.items())
    text += f", identity {fitted.told(**dict(*edit.told)).identity[:12]}"
    finish(
        as_json,
        {
            "strengths": strengths,
            "parameters": dict(*edit.told),
            "identity": fitted.told(**dict(*edit.told)).identity,
            "answers": found,
        },
        text,
        command_line("inspect", steering),
    )


@app.command()
def chat(
    steering: STEERING,
    model: MODEL = "",
    strength: STRENGTH = "",
    concept: CONCEPT = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    seed: SEED = 0,
) -> None:
    """Talk to the plain and the steered model side by side; /strength 0.5 changes it as you go."""
    from innsteer.backends.base import Prompt, Sampling
    from innsteer.backends.hf import HF
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    edit = edit_of(fitted, strength, concept)
    backend = HF(base_model(fitted, model))
    talks = bool(backend.model.tokenizer.chat_template)
    sides: dict[str, list[dict[str, str]]] = {"plain": [], "steered": []}
    shown = list(sides)
    out.print(f"[dim]{escape(CHAT)}[/dim]")
    turn = 0
    while True:
        try:
            line = out.input("[bold]you[/bold]      ").strip()
        except EOFError:
            break
        word, _, value = line.partition(" ")
        try:
            if word == "/quit":
                break
            if word == "/reset":
                sides = {name: [] for name in sides}
            elif word == "/strength":
                edit = edit_of(fitted, value.strip(), concept)
                mix = dict(zip(fitted.behaviours, edit.coef.tolist(), strict=True))
                told = ", ".join(f"{name} {number:.4g}" for name, number in mix.items())
                out.print(f"[dim]{escape(told)}[/dim]")
            elif word == "/plain":
                shown = ["steered"] if "plain" in shown else list(sides)
                # What was said meanwhile, it is told when it comes back.
                sides["plain"] = list(sides["steered"])
            elif word.startswith("/"):
                raise UnknownName("command", word, ("/strength", "/plain", "/reset", "/quit"))
            elif line:
                sampling = Sampling(tokens, temperature, seed + turn)
                turn += 1
                for name in shown:
                    asked = [*sides[name], {"role": "user", "content": line}]
                    # A base model has no turns: each line stands for itself.
                    said: Any = tuple(asked) if talks else line
                    prompt = Prompt(f"{turn}", said)
                    edits = [edit] if name == "steered" and bool((edit.coef != 0).any()) else []
                    (answer,) = backend.generate([prompt], edits, sampling)
                    sides[name] = [*asked, {"role": "assistant", "content": answer.text}]
                    out.print(f"[dim]{name:8}[/dim] {escape(answer.text)}")
        except InnsteerError as error:
            # A slip of the keyboard ends no conversation.
            warn(str(error))
    next_command(command_line("inspect", steering))


CHAT = (
    "/strength 0.5 (a number, budget, 0.05nat or a mix), /plain shows or hides the plain model, "
    "/reset forgets, /quit or Ctrl-D ends"
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder or smollm2.")],
    steering: Annotated[
        list[str],
        typer.Option("--steering", help="NAME=FOLDER, in the order in which they are applied."),
    ],
    untested: Annotated[
        bool,
        typer.Option("--steering-untested", help="Start where no test has run: on a GPU, say."),
    ] = False,
) -> None:
    """Serve a model by vLLM's OpenAI server, steered per request; vLLM's own flags pass through."""
    pairs = [pair_of(one, "--steering") for one in steering]
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError(f"--steering {' '.join(steering)}", expected="each name once")
    from innsteer.backends.vllm_plugin import server

    server.serve(model, dict(pairs), ctx.args, untested=untested)
