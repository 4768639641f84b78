"""The site that `make docs` builds from these pages; the notebooks run while it is built."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import innsteer
from innsteer import metrics, shelf, steerer

project = "innsteer"
version = release = innsteer.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "innsteer"
html_copy_source = html_show_sourcelink = html_show_copyright = False
smartquotes = False

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 600
nb_merge_streams = True
# Pictures carry plotly's script in their page, so that they show without a network.
os.environ["PLOTLY_RENDERER"] = "notebook"
# Of tqdm, which misses a widget that a page has no use for.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {f"{ROOT}/README": "index", f"{ROOT}/LOG": "log", f"{ROOT}/CHANGELOG": "changelog"}
"""Pages that lie beside docs/, and the page of the site that shows each."""
CODE = re.compile(r"(``[^`]+``|^ *>>> .*\n|::\n\n(?: {4}.*\n|\n)+)", re.MULTILINE)
"""What a docstring marks as code."""


class FromSource(SphinxDirective):
    """`public`, `methods`, `metrics` or `commands`: a reference that no list has to be kept for."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of the reference that is named."""
        text = {
            "public": _public,
            "methods": lambda: _classes(shelf.names(), steerer.get),
            "metrics": lambda: _classes(metrics.names(), metrics.get),
            "commands": _commands,
        }[self.arguments[0]]()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _public() -> str:
    return _autodoc("module:: innsteer", "members:", "imported-members:")


def _classes(names: list[str], get: Callable[[str], object]) -> str:
    """A section for each thing on a shelf."""
    kinds = {name: type(get(name)) for name in names}
    parts = [
        f"## {name}\n\n" + _autodoc(f"class:: {kind.__module__}.{kind.__qualname__}")
        for name, kind in kinds.items()
    ]
    return "\n\n".join(parts)


def _autodoc(what: str, *options: str) -> str:
    """One of autodoc's directives, whose docstrings are reStructuredText."""
    lines = [f".. auto{what}", *(f"   :{option}" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _commands() -> str:
    """The verbs as typer itself describes them, without its list of them."""
    command = [sys.executable, "-m", "typer", "innsteer.cli", "utils", "docs", "--name", "innsteer"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "## " + told.partition("\n## ")[2]


def _beside(app: Sphinx, path: Path, page: str, text: list[str]) -> None:
    """Links of a page beside docs/ start there, and it is included from here."""
    text[0] = re.sub(r"\]\((?!https?:|#)", "](../", text[0])


def _settle(app: Sphinx, document: nodes.document) -> None:
    """Let links to pages beside docs/ lead to the pages that show them."""
    for link in document.findall(pending_xref):
        link["reftarget"] = OUTSIDE.get(link["reftarget"], link["reftarget"])


def _plain(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read as they stand: outside of code |x| is a norm."""
    parts = CODE.split("\n".join(lines) + "\n")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("from-source", FromSource)
    app.connect("include-read", _beside)
    app.connect("doctree-read", _settle)
    app.connect("autodoc-process-docstring", _plain)
