"""What every test relies on: that pytest's root is this folder, and several processes for those that need them."""

from pathlib import Path

import pytest

pytest_plugins = ("distributed",)


def pytest_configure(config: pytest.Config) -> None:
    if config.rootpath != Path(__file__).parent:
        raise pytest.UsageError(
            f"pytest's root is {config.rootpath}, where its settings are not: run `pytest tests`, "
            "or name a file or folder in tests that is there"
        )
