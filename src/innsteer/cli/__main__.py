"""``python -m innsteer.cli``."""

from innsteer.cli import main

main()
