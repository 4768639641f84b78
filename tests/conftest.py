"""Fixtures that several rooms of the test house share."""

import os
from pathlib import Path

import pytest

# Test processes side by side whose OpenMP threads wait busily take the cores from one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REASON = "needs the shared reference data: set INNSTEER_SHARED or place it at ../shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public reference data, or a skip with the reason."""
    here = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("INNSTEER_SHARED", here.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(REASON)
    return folder
