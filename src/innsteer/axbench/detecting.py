"""Methods with a steering per concept: fitted on its responses, and judged by what they read out.

What stands beside a field that is told its concept: each concept's own steering, fitted on its
responses against the plain model's own answers to the same prompts; and detection, how well a
method's read-out tells held-out responses with the concept from those of other concepts.

Source: AxBench (Wu et al. 2025), https://arxiv.org/abs/2501.17148
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innsteer.backends.base import Progress, Prompt, Sampling, silent
from innsteer.backends.hf import HF
from innsteer.comparing.statistics import resample
from innsteer.concepts import Concepts, Response
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.fitting import default_site, fit, require_contrasts
from innsteer.gating import auroc
from innsteer.judging import Verdict
from innsteer.metrics.base import Measured
from innsteer.report.figures import Figure
from innsteer.site import Site
from innsteer.steerer import Steerer, get
from innsteer.steering import Steering

AUROC = Verdict("auroc", "probability")
"""That a text with the concept is scored above one without."""
LEAST = 2
"""Training responses that a concept must have."""


def contrast_of(
    backend: HF,
    rows: Sequence[Response],
    concept: str,
    *,
    sampling: Sampling = Sampling(64, 1.0),  # noqa: B008
) -> Contrast:
    """One concept's contrast: its training responses, and the plain model's own answers.

    Args:
        rows: of any concepts; those of this one and of the training part are taken.
        sampling: of the plain model.

    Raises:
        InputError: fewer than two training responses of this concept.
    """
    own = [row for row in rows if row.concept == concept and row.split == "train"]
    if len(own) < LEAST:
        raise InputError(
            f"{len(own)} training responses of {concept!r}",
            expected=f"at least {LEAST} for a steering of its own",
            remedy="add rows of that concept to the table, or leave the concept out",
        )
    asked = [Prompt(str(n), row.prompt) for n, row in enumerate(own)]
    plain = backend.generate(asked, (), sampling)
    items = [
        Item(one.item, row.prompt, said.text, row.response, None, row.prompt)
        for one, row, said in zip(asked, own, plain, strict=True)
        if said.text.strip()
    ]
    return Contrast(concept, "open", tuple(items))


def rival(method: str, **fields: Any) -> Steerer:
    """A method that a concept's responses can be fitted by, before anything runs.

    Raises:
        UnknownName: no such method or field. InputError: one that learns from concepts in words.
    """
    steerer = get(method, **fields)
    require_contrasts(steerer, "a rival", "it is an arm already: the steering that is scored")
    return steerer


def fit_each(
    backend: HF,
    table: Concepts,
    concepts: Sequence[str],
    method: str,
    *,
    site: Site | None = None,
    sampling: Sampling = Sampling(64, 1.0),  # noqa: B008
    seed: int = 0,
    progress: Progress = silent,
    **fields: Any,
) -> dict[str, Steering]:
    """A steering for each concept by a method of the shelf, of scope ``generated``.

    Args:
        table: its training part is fitted. site: default: two thirds up.
        sampling: of the plain model's answers. **fields: of the method.

    Raises:
        InputError: a method that needs something else, or see ``contrast_of``.
    """
    where = site or default_site(backend.model)
    steerer = rival(method, **fields)
    found = {}
    for number, concept in enumerate(concepts):
        progress(method, number, len(concepts))
        contrast = contrast_of(backend, table.rows, concept, sampling=sampling)
        rest: dict[str, Any] = {"unmoved": ()} if steerer.through else {}
        found[concept] = fit(backend, contrast, steerer, sites=[where], seed=seed, **rest)
    progress(method, len(concepts), len(concepts))
    return found


def detection(
    backend: HF,
    table: Concepts,
    concepts: Sequence[str],
    fitted: Mapping[str, Mapping[str, Steering]],
    *,
    most: int = 36,
    progress: Progress = silent,
) -> tuple[list[Figure], dict[str, dict[str, float]]]:
    """How well each method's read-out tells validation responses with a concept from others'.

    A text's score is the largest product of a token's row, at the site, with the direction that the
    method reads by (``Steerer.detectors``), over its response's tokens. AUROC of the concept's
    validation responses against those of the other concepts. AxBench also scores the prompt's
    tokens, and takes texts without any concept as the others.

    Args:
        fitted: method -> concept -> its steering, all at one site.
        most: responses of a concept that are scored.

    Returns:
        A figure per method that reads out (bootstrap of concepts), and its AUROC by concept.
        Nothing where fewer than two concepts have validation responses.
    """
    found: dict[str, dict[str, float]] = {}
    seen: dict[Site, list[Tensor]] = {}
    part = table.part("validation").rows
    held = [row for c in concepts for row in [r for r in part if r.concept == c][:most]]
    owners = [row.concept for row in held]
    if len(set(owners)) < 2:
        return [], {}
    for method, steerings in fitted.items():
        read = {c: one.steerer.detectors(one.interventions) for c, one in steerings.items()}
        if not all(read.values()):
            continue
        sites = {site for by in read.values() for site in by}
        if len(sites) != 1:
            raise InputError(
                f"read-outs of {method!r} at {len(sites)} sites", expected="one site for all"
            )
        (site,) = sites
        if site not in seen:
            seen = {site: _rows(backend, held, site, progress)}
        for concept in dict.fromkeys(owners):
            (direction,) = read[concept][site]
            score = torch.stack([(rows @ direction).max() for rows in seen[site]])
            mine = torch.tensor([owner == concept for owner in owners])
            found.setdefault(method, {})[concept] = auroc(score[mine], score[~mine])
    if not found:
        return [], {}
    draws = resample(
        AUROC,
        {
            method: {concept: {"0": [Measured(value)]} for concept, value in by.items()}
            for method, by in found.items()
        },
    )
    figures = []
    for method in found:
        value, low, high, n, level = draws.score(method)
        told = (AUROC.unit, AUROC.better, level)
        figures.append(Figure(method, AUROC.name, 1.0, value, low, high, n, *told))
    return figures, found


def _rows(backend: HF, held: Sequence[Response], site: Site, progress: Progress) -> list[Tensor]:
    """The rows ``[tokens, d]`` of each held response's tokens."""
    items = tuple(
        Item(str(n), row.prompt, None, row.response, None, str(n)) for n, row in enumerate(held)
    )
    acts = backend.record(Contrast("texts", "open", items), [site], read="all", progress=progress)
    values = acts.values[site].float()
    return [values[torch.from_numpy(acts.rows.item == str(n))] for n in range(len(held))]
