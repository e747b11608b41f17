"""What the README shows is true: its first example runs, and its tables name every router and every size."""

import re
from pathlib import Path

import pytest

from gatewright.routers import list_routers

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


def test_the_first_example_runs(readme):
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape
    assert names["router"].prototypes.grad.abs().sum() > 0
    assert set(names["routing"].losses) == {"routing_contrastive"}


def test_the_table_of_routers_is_complete(readme):
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", readme, re.MULTILINE))
    assert rows == list_routers()


def test_every_file_that_it_names_is_there(readme):
    named = set(re.findall(r"\b(?:recipes|routers|moe|kernels|tools|tests)/[\w/]+\.(?:py|png|ini)\b", readme))
    assert named, "the README names no file"
    missing = [name for name in named if not (README.parent / name).exists()]
    assert not missing
