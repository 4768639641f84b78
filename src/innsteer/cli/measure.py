"""Verbs that measure: eval, compare, bench, judge, axbench, interference, linearity."""

from pathlib import Path
from typing import Annotated, Any

import typer

from innsteer.cli import completing
from innsteer.cli.options import (
    DATAS,
    FOLDER,
    JSON,
    JSON_FILE,
    MODEL,
    SEED,
    STEERING,
    STRENGTH,
    base_model,
    check_model,
    contender,
    endpoint_of,
    memo_beside,
    mixed,
    model_option,
    numbers_of,
    open_contrast,
    open_model,
    pair_of,
    read_rule,
    source_of,
    strength_of,
)
from innsteer.cli.printing import (
    Bars,
    command_line,
    concepts_table,
    duration,
    escape,
    finish,
    next_command,
    out,
    print_json,
    tasks_table,
    verdicts_table,
    warn,
)
from innsteer.cli.verbs import app
from innsteer.errors import InputError, UnknownName
from innsteer.files import require_absent, write_json


@app.command("eval")
def evaluate(
    steering: Annotated[
        list[Path],
        typer.Argument(help="Folders of tuned steerings.", autocompletion=completing.steerings),
    ],
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="Behaviour or file.", autocompletion=completing.data),
    ],
    folder: FOLDER,
    model: MODEL = "",
    instruction: Annotated[str, typer.Option(help="What the prompt-only arm adds.")] = "",
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA as PEFT saves it: one arm more, as trained.")
    ] = None,
    preview: Annotated[bool, typer.Option(help="Few prompts, short answers.")] = False,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Compare steerings with unsteered, prompt-only and a random direction; write a report."""
    require_absent(folder)
    from innsteer import evaluation
    from innsteer.backends.hf import HF
    from innsteer.backends.lora import LoRA
    from innsteer.steering import Steering
    from innsteer.suites import behaviour as suites

    loaded = {path.resolve().name: Steering.load(path) for path in steering}
    if len(loaded) < len(steering) or (lora and lora.resolve().name in loaded):
        raise InputError("folders of the same name", expected="a name of its own for every arm")
    with Bars(as_json) as progress, memo_beside(folder) as memo:
        suite = suites.load(open_contrast(data), instruction=instruction)
        if not suite.instruction:
            warn("no instruction is known, so no prompt-only arm; give one with --instruction")
        first = next(iter(loaded.values()))
        language_model = base_model(first, model)
        for fitted in loaded.values():
            check_model(fitted, language_model)
        adapters = {lora.resolve().name: LoRA.load(language_model, lora)} if lora else {}
        report = evaluation.compare(
            HF(language_model, memo=memo),
            loaded,
            suite.preview() if preview else suite,
            adapters=adapters,
            sizes=evaluation.PREVIEW if preview else evaluation.Sizes(),
            seed=seed,
            progress=progress,
        )
        report.save(folder)
        for path, (name, fitted) in zip(steering, loaded.items(), strict=True):
            fitted.with_card(evaluation.card(report, name)).save(path, replace=True)
    named = model_option(model or source_of(first))
    if not as_json:
        out.print(escape(report.text()))
    finish(
        as_json,
        {"folder": str(folder)} | report.to_json(),
        f"report in {folder / 'report.html'}",
        command_line("generate", steering[0], "Hello", *mixed(first, suite.behaviour), *named),
    )


@app.command()
def compare(
    data: DATAS,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of cells and tables; made, or continued.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[,input=target][,at=one-layer][,field=value ...], once each; default: all.",
            autocompletion=completing.methods,
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(help="The row that all others are compared with; default: the first.")
    ] = "",
    model: MODEL = "smollm2",
    layers: Annotated[
        str, typer.Option(help="Candidate blocks, from 0: 15,19; default: four.")
    ] = "",
    budget: Annotated[
        float | None, typer.Option(help="Cost budget, nats per token; default: 0.0953.")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Validation evaluations per cell; default: 24.")
    ] = None,
    read: Annotated[
        str,
        typer.Option(help="Answer tokens that become recorded rows: last, mean, span:START:STOP."),
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the fits: 0,1,2.")] = "0",
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="BEHAVIOUR=TEXT: what the prompt-only arm adds, once for each."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the cells.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what is left to do.")] = False,
    as_json: JSON = False,
) -> None:
    """Compare methods on the same work: the same data, budget and evaluations for every one."""
    from innsteer import comparing
    from innsteer.backends.hf import HF
    from innsteer.comparing import standings

    with Bars(as_json) as progress:
        tasks = [open_contrast(one) for one in data]
        chosen = [contender(text) for text in method or []] or comparing.contenders(tasks)
        language_model = open_model(model)
        given = {
            "budget": budget,
            "evaluations": evaluations,
            "layers": numbers_of(layers, "layers"),
            **(read_rule(read) if read else {}),
        }
        protocol = comparing.Protocol.of(
            language_model, **{name: value for name, value in given.items() if value}
        )
        comparison = comparing.Comparison(
            HF(language_model),
            tasks,
            folder,
            contenders=[*comparing.always(), *chosen],
            protocol=protocol,
            seeds=numbers_of(seeds, "seeds"),
            instructions=dict(pair_of(text, "--instruction") for text in instruction or []),
        )
        reference = against or chosen[0].name
        if reference not in [one.name for one in comparison.contenders]:
            known = [one.name for one in comparison.contenders]
            raise UnknownName("row of the table", reference, known)
        words = ["compare", *data, "--out", folder, *model_option(model)]
        several = {"--method": method or [], "--instruction": instruction or []}
        words += [
            word for name, texts in several.items() for text in texts for word in (name, text)
        ]
        once = {"--against": against, "--layers": layers, "--budget": budget, "--read": read}
        once |= {"--evaluations": evaluations, "--seeds": seeds if seeds != "0" else ""}
        once |= {"--jobs": jobs if jobs != 1 else ""}
        words += [word for name, value in once.items() if value for word in (name, value)]
        if plan:
            found = comparison.plan()
            took = found["seconds"]
            time = "no cell tells yet how long" if took is None else f"about {duration(took)}"
            text = (
                f"{found['left']} of {found['cells']} cells left, {found['evaluations']} "
                f"evaluations on validation; {time}"
            )
            finish(as_json, found, text, command_line(*words))
            return
        comparison.run(jobs=jobs, progress=progress)
        tables = standings.standings(
            comparison.found(), against=reference, left_out=comparison.left_out()
        )
        paths = standings.save(folder, tables, comparison.found(), comparison.context())
    if not as_json:
        for table in tables:
            out.print(escape(table.text()), soft_wrap=True)
    finish(
        as_json,
        {"folder": str(folder), "tables": [table.to_json() for table in tables]},
        f"tables and page in {paths}",
        command_line(*words, "--plan"),
    )


@app.command()
def bench(
    steering: STEERING,
    task: Annotated[list[str], typer.Argument(help="Tasks, groups or tags of lm-eval.")],
    model: MODEL = "",
    strength: STRENGTH = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of yours as YAML; their code runs.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task; default: all.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples; default: as the task says.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    file: JSON_FILE = None,
    as_json: JSON = False,
) -> None:
    """Run lm-eval's tasks on the plain and on the steered model."""
    if file:
        require_absent(file)
    from innsteer.integrations.lm_eval import run_tasks
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    with Bars(as_json) as progress:
        found = run_tasks(
            base_model(fitted, model),
            fitted,
            task,
            strength=strength_of(strength),
            include_path=include_path,
            limit=limit,
            shots=shots,
            chat=chat,
            progress=progress,
        )
    if file:
        write_json(file, found)
    if not as_json:
        out.print(tasks_table(found["tasks"]))
    at = ", ".join(f"{value:.4g}" for value in found["strengths"].values())
    text = f"strength {at}, {found['steered_tokens']} tokens steered"
    finish(as_json, found, text, command_line("inspect", steering))


@app.command()
def judge(
    report: Annotated[Path, typer.Argument(help="Folder of a saved report.")],
    by: Annotated[str, typer.Option(help="URL#MODEL of an OpenAI-compatible endpoint.")],
    criterion: Annotated[
        str, typer.Option(help='What a good answer does: "The answer is negative."')
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Against the first arm's answers, in both orders.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of replies; default: in innsteer's cache.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    file: JSON_FILE = None,
    as_json: JSON = False,
) -> None:
    """Have a model judge a report's answers by a criterion; the key is $OPENAI_API_KEY."""
    if file:
        require_absent(file)
    from innsteer import judging
    from innsteer.models.smollm2 import cache_folder
    from innsteer.report import Report

    url, name = endpoint_of(by)
    folder = cache or cache_folder() / "judge"
    judge = judging.Judge(url, name, criterion, folder, jobs=jobs)
    loaded = Report.load(report)
    with Bars(as_json) as progress:
        found = judging.judge_report(loaded, judge, pairs=pairs, progress=progress)
    if file:
        write_json(file, found)
    if found["unparsed"]:
        warn(f"{found['unparsed']} of {found['replies']} replies say nothing and count nowhere")
    if not as_json:
        out.print(verdicts_table(found["figures"]))
    text = f"{found['replies']} replies"
    if pairs and found["consistent"] is not None:
        text += (
            f"; {found['consistent']:.0%} of pairs alike in both orders, "
            f"the answer shown first wins {found['first_wins']:.0%}"
        )
    other = [] if pairs else ["--pairs"]
    following = command_line("judge", report, "--by", by, "--criterion", criterion, *other)
    finish(as_json, found, text, following)


@app.command()
def axbench(
    steering: STEERING,
    concepts: Annotated[Path, typer.Argument(help="Concepts: a .txt, one per line, or a table.")],
    by: Annotated[
        str,
        typer.Option(help="URL#MODEL of an OpenAI-compatible judge; stand-in: offline, no score."),
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write; must not exist.")],
    model: MODEL = "",
    factors: Annotated[str, typer.Option(help="Strengths to choose from.")] = "0.5,1,1.5,2",
    prompts: Annotated[
        Path | None, typer.Option(help="Instructions: a table with a column prompt.")
    ] = None,
    each: Annotated[
        int, typer.Option(min=2, help="Prompts per concept: half choose, half are scored.")
    ] = 10,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Leave out concepts that the steering learnt from.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Responses that show the concepts: a table, or a folder of AxBench's."),
    ] = None,
    also: Annotated[
        str, typer.Option(help="Methods fitted on --data for each concept: diffmean,reft_r1.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 1.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of replies; default: in innsteer's cache.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Score steering by concepts as AxBench does: beside the plain and the prompted model."""
    require_absent(file)
    try:
        tried = tuple(float(part) for part in factors.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--factors {factors!r}", expected="numbers: 0.5,1,2") from None
    named = tuple(dict.fromkeys(part.strip() for part in also.split(",") if part.strip()))
    if bool(named) != bool(data):
        raise InputError(
            f"--also {also!r} with --data {data}",
            expected="both: methods for each concept, and responses to fit them on",
        )
    from innsteer.axbench import detecting, protocol
    from innsteer.axbench.distilling import read_concepts
    from innsteer.backends.base import Sampling
    from innsteer.backends.hf import HF
    from innsteer.concepts import Concepts
    from innsteer.judging import Endpoint
    from innsteer.models.smollm2 import cache_folder
    from innsteer.steering import Steering

    endpoint = None
    if by != protocol.STAND_IN:
        endpoint = Endpoint(*endpoint_of(by), cache or cache_folder() / "judge", role="judge")
    fitted = Steering.load(steering)
    learnt = set(fitted.provenance.get("concepts", ()))
    wanted = [one for one in read_concepts(concepts) if not unseen or one not in learnt]
    if not wanted:
        raise InputError(
            f"no concept in {concepts} that {steering} has not learnt from",
            expected="one at least",
            remedy="leave out --unseen, or name other concepts",
        )
    arms = [protocol.unsteered(), protocol.prompting(), protocol.told(fitted, tried)]
    asked = None if prompts is None else protocol.read_prompts(prompts)
    table = None if data is None else Concepts.load(data, unseen=0.0)
    for method in named:
        detecting.rival(method)
    with Bars(as_json) as progress, memo_beside(file) as memo:
        backend = HF(base_model(fitted, model), memo=memo)
        apart: dict[str, dict[str, Steering]] = {}
        if table is not None:
            (site,) = fitted.interventions
            how: dict[str, Any] = {"site": site, "seed": seed, "progress": progress}
            for method in named:
                apart[method] = detecting.fit_each(backend, table, wanted, method, **how)
                arms.append(protocol.fitted(method, apart[method], tried))
        judge: protocol.Judging = protocol.StandIn(backend)
        if endpoint is not None:
            judge = protocol.ByEndpoint(endpoint, jobs)
        found = protocol.run(
            backend,
            arms,
            wanted,
            judge,
            each=each,
            prompts=asked,
            sampling=Sampling(tokens, temperature, seed),
            progress=progress,
        )
        if table is not None:
            read, single = detecting.detection(backend, table, wanted, apart, progress=progress)
            found["figures"] += [vars(one) for one in read]
            found["detection"] = single
        found["learnt"] = [one for one in wanted if one in learnt]
        found["identity"] = fitted.identity
        write_json(file, found)
    if found["unparsed"]:
        warn(f"{found['unparsed']} of {found['replies']} replies say nothing and count nowhere")
    if found["left_out"]:
        warn(f"not judged in all arms, left out: {', '.join(found['left_out'])}")
    if not as_json:
        out.print(concepts_table(found))
    gaps = [one for one in found["figures"] if one["against"]]
    text = "".join(
        "{arm} less {against}: {value:+.3f} ({low:+.3f} to {high:+.3f})\n".format(**one)
        for one in gaps
    )
    if table is not None:
        heard = {one["arm"]: one for one in found["figures"] if one["metric"] == "auroc"}
        text += "".join(
            "{arm} detects with AUROC {value:.3f} ({low:.3f} to {high:.3f})\n".format(
                **heard[arm.name]
            )
            if arm.name in heard
            else f"{arm.name} has no read-out\n"
            for arm in arms[2:]
        )
    text += (
        f"{found['label']}\n{len(wanted) - len(found['left_out'])} concepts, "
        f"{len(found['learnt'])} of {len(wanted)} learnt from -> {file}"
    )
    following = command_line(
        "generate", steering, "Hello", "--concept", wanted[0], *model_option(model)
    )
    finish(as_json, found, text, following)


@app.command()
def interference(
    steering: STEERING,
    data: DATAS,
    model: MODEL = "",
    strength: STRENGTH = "",
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Show what the behaviours of a steering do to each other, alone and all together."""
    from innsteer.interference import interference as measure
    from innsteer.steering import Steering

    fitted = Steering.load(steering)
    chosen = strength_of(strength)
    with Bars(as_json) as progress:
        contrasts = [open_contrast(one) for one in data]
        if not isinstance(chosen, dict):
            chosen = {one.behaviour: chosen for one in contrasts} if chosen else {}
        language_model = base_model(fitted, model)
        found = measure(
            language_model, fitted, contrasts, strengths=chosen, seed=seed, progress=progress
        )
    if as_json:
        print_json(found.to_json())
        return
    out.print(escape(found.text()))
    mix = "+".join(f"{name}@{s:.4g}" for name, s in found.mix.items())
    next_command(
        command_line(
            "generate",
            steering,
            "Hello",
            "--strength",
            mix,
            *model_option(model or source_of(fitted)),
        )
    )


@app.command()
def linearity(
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")],
    model: MODEL = "",
    prompts: Annotated[
        str, typer.Option(help="File with a column prompt, or lines; default: neutral ones.")
    ] = "",
    most: Annotated[int, typer.Option(min=2, help="Prompts to measure at most.")] = 8,
    steering: Annotated[
        str, typer.Option(help="An alqr steering: its tracking error beside its bound.")
    ] = "",
    data: Annotated[str, typer.Option(help="What that steering was fitted on.")] = "",
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Report how linear each block of a model is, and how far feedback is from its plan."""
    from dataclasses import asdict

    from innsteer import linearity as linear
    from innsteer.steering import Steering

    if bool(steering) != bool(data):
        raise InputError(
            "a steering without its data" if steering else "data without a steering",
            expected="--steering and --data together, or neither",
        )
    require_absent(to)
    fitted = Steering.load(steering) if steering else None
    asked = linear.prompts(prompts or None, most)
    contrast = open_contrast(data) if data else None
    if fitted and contrast:
        linear.require_loop(fitted, contrast)
    with Bars(as_json) as progress:
        chosen = base_model(fitted, model) if fitted else open_model(model or "smollm2")
        found = linear.linearity(chosen, asked, seed=seed, progress=progress)
        tracked = None
        if fitted and contrast:
            tracked = linear.tracking(chosen, fitted, contrast, progress=progress)
    linear.save(to, found, tracked, prompts=prompts or "the package's neutral ones")
    facts = {"linearity": asdict(found)} | ({"tracking": asdict(tracked)} if tracked else {})
    if as_json:
        print_json(facts | {"report": str(to)})
        return
    out.print(escape(linear.text(found, tracked)))
    out.print(f"\nreport: {escape(str(to / 'linearity.html'))}")
    next_command(
        command_line(
            "fit", "critical", "--method", "alqr", "--out", "my-steering", *model_option(model)
        )
    )
