"""Every command runs in an empty folder, and leaves nothing behind for the next test."""

import os

# Lightning's log handler keeps the standard error it finds when it is imported, which must not be
# one that a test captures and closes.
import lightning.pytorch  # noqa: F401
import pytest


@pytest.fixture(autouse=True)
def _empty_folder_and_environment_as_before(tmp_path, monkeypatch):
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)
