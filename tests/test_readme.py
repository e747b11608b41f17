"""What the README shows is true: its first example runs, and its tables name every router and every size."""

import re
from pathlib import Path

import pytest

from gatewright.tools.routers import markdown_table

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


def test_the_table_of_routers_is_the_one_that_the_classes_make(readme):
    """What `gatewright routers --markdown` prints stands between the two markers."""
    table = re.search(r"<!-- gatewright routers --markdown -->\n(.*?)\n<!-- end -->", readme, re.DOTALL).group(1)
    assert table == markdown_table(), "paste the output of `gatewright routers --markdown` into README.md"


def test_every_file_that_it_names_is_there(readme):
    named = set(re.findall(r"\b(?:recipes|routers|moe|kernels|tools|tests)/[\w/]+\.(?:py|png|ini)\b", readme))
    assert named, "the README names no file"
    missing = [name for name in named if not (README.parent / name).exists()]
    assert not missing
