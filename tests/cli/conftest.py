"""Shared by the tests of the command line."""

from pathlib import Path

import pytest

from magi.model_files.repeating import repeating_files


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The folder that holds the repeating model and the prompts that were encoded; shared with the other test files."""
    folder = tmp_path_factory.getbasetemp() / "repeating"
    repeating_files(folder)
    return folder
