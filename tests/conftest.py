"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data made by other software; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("MODELLINK_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference data folder {folder} is missing (set MODELLINK_SHARED)")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
