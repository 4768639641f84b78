"""Nonlinear steering of language models that you can measure and serve.

The public names and nothing else; each is imported on first use, so that ``import innsteer`` and
the command line's help cost milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from innsteer.activations import Activations as Activations
    from innsteer.backends.hf import HF as HF
    from innsteer.choosing import fit as fit
    from innsteer.contrast import Contrast as Contrast
    from innsteer.errors import InnsteerError as InnsteerError
    from innsteer.evaluation import compare as compare
    from innsteer.evaluation import evaluate as evaluate
    from innsteer.fitting import record as record
    from innsteer.hub import pull as pull
    from innsteer.hub import push as push
    from innsteer.models import LanguageModel as LanguageModel
    from innsteer.models import load_model as load_model
    from innsteer.report import Report as Report
    from innsteer.shelf import names as names
    from innsteer.site import Site as Site
    from innsteer.site import Where as Where
    from innsteer.steerer import Intervention as Intervention
    from innsteer.steerer import Interventions as Interventions
    from innsteer.steerer import Steerer as Steerer
    from innsteer.steerer import get as get
    from innsteer.steering import Steering as Steering
    from innsteer.tuning import tune as tune

_HOME = {
    "Activations": "activations",
    "HF": "backends.hf",
    "Contrast": "contrast",
    "InnsteerError": "errors",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "LanguageModel": "models",
    "load_model": "models",
    "Report": "report",
    "names": "shelf",
    "Site": "site",
    "Where": "site",
    "Intervention": "steerer",
    "Interventions": "steerer",
    "Steerer": "steerer",
    "get": "steerer",
    "Steering": "steering",
    "fit": "choosing",
    "record": "fitting",
    "pull": "hub",
    "push": "hub",
    "tune": "tuning",
}
__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'innsteer' has no attribute {name!r}")
    return getattr(import_module(f"innsteer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
