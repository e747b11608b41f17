"""What every test relies on: that pytest's root is this folder."""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.rootpath != Path(__file__).parent:
        raise pytest.UsageError("name the folder, `pytest tests`, so that its pytest.ini applies")
