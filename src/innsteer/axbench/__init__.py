"""Steering by concepts in words: data for it, judged as AxBench does, and beside rivals."""

from innsteer.axbench.protocol import (
    ByEndpoint,
    Contender,
    StandIn,
    fitted,
    prompting,
    read_prompts,
    run,
    told,
    unsteered,
)

__all__ = [
    "ByEndpoint",
    "Contender",
    "StandIn",
    "fitted",
    "prompting",
    "read_prompts",
    "run",
    "told",
    "unsteered",
]
