"""The command line: each verb parses, calls one function and prints.

``--help`` imports no torch: heavy imports wait inside the verbs. Exit codes: 0 done, 1 failed, 2
bad input, 3 refused for safety, 130 interrupted.
"""

# In the order of --help.
from innsteer.cli import fit, use, measure, share, look  # isort: skip
from innsteer.cli.entry import main
from innsteer.cli.verbs import app

__all__ = ["app", "fit", "look", "main", "measure", "share", "use"]
