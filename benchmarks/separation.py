"""How INNSteer's separation weight trades latent separation for control, on validation prompts.

    python benchmarks/separation.py

Behaviour ``critical``, block two thirds up, an answer's mean per row, strength searched at 0.0953
nats on 300 neutral tokens, 40 validation prompts of 48 tokens at temperature 0.7. Writes
``results/separation.json``. No test prompt is touched: a default was chosen here.
"""

from pathlib import Path

import torch
import transformers

from innsteer import demo, fitting, load_model, tuning
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast, prompts
from innsteer.files import write_json
from innsteer.metrics import get as metric
from innsteer.steerer import get

RESULTS = Path(__file__).resolve().parent / "results" / "separation.json"
ARMS = {
    "DiffMean": get("diffmean"),
    "INNSteer, separation 1.0": get("innsteer", separation=1.0),
    "INNSteer, separation 0.1": get("innsteer", separation=0.1),
}


def main() -> None:
    model, contrast = load_model("smollm2"), Contrast.load(demo.BEHAVIOUR)
    backend = HF(model)
    acts = fitting.record_parts(model, contrast)
    asked = [Prompt(str(n), text) for n, text in enumerate(prompts(demo.BEHAVIOUR, "validation"))]
    score, figures = metric("negative_sentiment"), []
    for name, steerer in {"unsteered": None, **ARMS}.items():
        edits = []
        if steerer is not None:
            fitted = fitting.fit_rows(model, steerer, acts)
            tuned = tuning.tune(
                backend, fitted, contrast, control_items=4, fractions=(1.0,), preview=True
            )
            edits = [tuned.edit()]
        found = score.score(backend.generate(asked, edits, Sampling(48, 0.7)))
        assert found is not None
        bounds = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
        figures.append(
            {"figure": f"{name}: share negative", **bounds, "asked": "", "unit": "share"}
        )
        print(f"{name}: {found.value:.3f} ({found.low:.3f} to {found.high:.3f})", flush=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        head = {"command": "python benchmarks/separation.py", "versions": versions}
        write_json(RESULTS, head | {"figures": figures})


if __name__ == "__main__":
    main()
