"""The package as others meet it: what importing costs, what a wheel holds, whom it lives beside, where imports point.

`.ci/run` repeats the outside view with a wheel in a clean environment and from a clone of another name.
"""

import ast
import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import gatewright

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kernels", "routers", "moe", "tools", "recipes")  # each may import those before it
GENERIC = (*PARTS, "tests", "setup")
LIBRARIES = {"torch", "numpy", "safetensors"}  # what the core needs
# Imported by the core only where they are used.
OPTIONAL = {"kernels": {"triton", "torch_scatter"}, "moe/hosts": {"deepspeed", "megatron", "transformers"}}


def python(code: str, *, cwd: Path, executable: str | Path = sys.executable, **environment: str) -> str:
    """What `code` prints in a process of its own, started in `cwd`."""
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- importing


def test_import_is_lazy(tmp_path):
    heavy = python(
        "import sys, gatewright, gatewright.tools.cli; dir(gatewright); gatewright.__version__;"
        "print([name for name in ('torch', 'numpy', 'transformers', 'deepspeed') if name in sys.modules])",
        cwd=tmp_path,
    )
    assert heavy.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in gatewright.__all__ if name != "__version__"])
def test_public_name(name):
    value = getattr(gatewright, name)
    assert value.__module__.startswith("gatewright.")
    assert name in dir(gatewright)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'gatewright' has no attribute 'Ruoter'"):
        gatewright.Ruoter  # noqa: B018


def test_version_is_said_once():
    assert importlib.metadata.version("gatewright") == gatewright.__version__
    assert f"## {gatewright.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_registry():
    """Started in the root, in a clone of any name, pytest must not import the tree a second time under another name."""
    import gatewright.routers.base as base

    assert Path(base.__file__) == ROOT / "routers/base.py", "another gatewright is installed than the one tested"
    copies = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == base.__file__]
    assert copies == ["gatewright.routers.base"]
    assert not [name for name in (*PARTS[1:], ROOT.name) if name != "gatewright" and name in sys.modules]
    assert gatewright.Router is base.Router


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, which leaves no build folder in the tree itself."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    for name in (*PARTS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for file in ROOT.glob("*"):
        if file.is_file():
            shutil.copy(file, source)
    # Built in the next folder over what an earlier build and somebody's environment may have left.
    (source / "build/lib/gatewright/stale").mkdir(parents=True)
    (source / ".venv").mkdir()
    (source / ".venv/module.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, cwd=out)
    return next(out.glob("gatewright-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, torch, numpy, safetensors, what these need, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for distribution in _with_needs(LIBRARIES):
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (site / name).symlink_to(distribution.locate_file(name))
    target = folder / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", target, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
        cwd=folder,
    )
    return target


def _with_needs(names: set[str]) -> list[importlib.metadata.Distribution]:
    """These distributions, those that they require, and so on."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = set(names)
    while left:
        name = left.pop()
        found[name] = importlib.metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left |= {_canonical(requirement.name)} - found.keys()
    return list(found.values())


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"gatewright-{gatewright.__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"gatewright", info}
        assert archive.read(f"{info}/top_level.txt").split() == [b"gatewright"]
    held = {name.removeprefix("gatewright/") for name in names if name.endswith(".py")}
    written = {str(file.relative_to(ROOT)) for part in PARTS for file in (ROOT / part).rglob("*.py")}
    assert held == {"__init__.py", *written}
    assert "gatewright/kernels/__init__.py" not in names


def test_wheel_imports_under_its_own_name_only(installed, tmp_path):
    found = python(
        f"import importlib.util as u, gatewright, gatewright.kernels, gatewright.routers, gatewright.moe\n"
        f"print([name for name in {GENERIC} if u.find_spec(name)], gatewright.__file__, *gatewright.kernels.__path__)",
        cwd=tmp_path,
        executable=installed,
    )
    generic, init, kernels = found.split()
    assert generic == "[]"
    assert Path(init).is_relative_to(installed.parent.parent) and Path(kernels).is_relative_to(installed.parent.parent)
    command = subprocess.run([installed.parent / "gatewright", "--version"], capture_output=True, text=True)
    assert command.stdout == f"gatewright {gatewright.__version__}\n"


def test_core_runs_without_anything_optional(installed, tmp_path):
    """A layer trains where only torch, numpy, safetensors and what these need are installed."""
    python(
        """
import torch
from gatewright import ExpertSpec, MoELayer, create_router, finish_step, list_routers

assert "topk" in list_routers()
layer = MoELayer(create_router("topk", dim=8, num_experts=4, top_k=2), ExpertSpec(8, 16))
x = torch.randn(2, 6, 8, requires_grad=True)
y, routing = layer(x)
(y.square().mean() + routing.loss).backward()
assert x.grad.abs().sum() > 0
finish_step(layer)
""",
        cwd=tmp_path,
        executable=installed,
    )


def test_metadata_keeps_the_torch_that_is_there(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11,<3.13")
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    core = {requirement.name: requirement.specifier for requirement in requirements if not requirement.marker}
    assert set(core) == LIBRARIES
    for version in ("2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu"):
        assert version in core["torch"]
    assert "2.10.1" not in core["torch"] and "2.14.0" not in core["torch"]
    # These ask for one torch, or have to be built beside it.
    assert not {requirement.name for requirement in requirements} & {"torchvision", "torchaudio", "torch-scatter"}
    extras = {"deepspeed", "hf", "tensorboard", "triton", "megatron", "recipes", "dev", "all"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_pins_agree_with_the_ranges():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {_canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in map(Requirement, lines)}
    assert next(iter(pins)) == "torch"
    unpinned = {"megatron-core"}  # has a host adapter, and no part in the tests that need nothing but these pins
    for requirement in map(Requirement, importlib.metadata.requires("gatewright")):
        if _canonical(requirement.name) not in unpinned:
            assert pins[_canonical(requirement.name)] in requirement.specifier, requirement


# --- beside transformers and Hugging Face's kernels

NEIGHBOURS = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
import gatewright.kernels
try:
    import kernels
    theirs = kernels.__file__
except ModuleNotFoundError:
    theirs = None
print(json.dumps([is_kernels_available(), theirs, list(gatewright.kernels.__path__)]))
"""


ORDERS = {
    "transformers first": ("transformers", "gatewright.routers"),
    "gatewright first": ("gatewright.routers", "transformers"),
}


def neighbours(cwd: Path, order: tuple[str, str]) -> list:
    return json.loads(python(f"import sys; sys.argv[1:] = {order}\n{NEIGHBOURS}", cwd=cwd))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> list:
    """What transformers finds where no folder of ours is on the path."""
    return neighbours(tmp_path_factory.mktemp("elsewhere"), ORDERS["transformers first"])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_transformers_notices_nothing_in_the_root(order, elsewhere):
    assert neighbours(ROOT, order) == elsewhere


def test_transformers_notices_nothing_in_this_process(elsewhere):
    """pytest has put the test folders on the path by now, tests/kernels among them."""
    import transformers.integrations.hub_kernels  # noqa: F401
    from transformers.utils import is_kernels_available

    assert is_kernels_available() == elsewhere[0]
    assert getattr(sys.modules.get("kernels"), "__file__", None) in (None, elsewhere[1])


def test_their_kernels_win_in_the_root(tmp_path):
    """A package of that name that is installed is found, and ours under its full name."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    found = python(
        "from transformers.utils import is_kernels_available\n"
        "import kernels, gatewright.kernels\n"
        "print(is_kernels_available(), kernels.__file__, *gatewright.kernels.__path__, sep='\\n')",
        cwd=ROOT,
        PYTHONPATH=str(tmp_path),
    )
    assert found.split() == ["True", str(tmp_path / "kernels/__init__.py"), str(ROOT / "kernels")]


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


# --- imports point down only


def files_of(part: str) -> Iterator[Path]:
    return (ROOT / part).rglob("*.py")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """Each import of a file: its line and the full name of what it imports."""
    folder = ("gatewright", *file.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(), file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_down(part):
    below = PARTS[: PARTS.index(part) + 1]
    wrong = []
    for file in files_of(part):
        in_hosts = file.parent == ROOT / "moe/hosts"
        for line, name in imports_of(file):
            top, _, rest = name.partition(".")
            if top == "gatewright":
                target = rest.split(".")[0]
                upwards = target in PARTS and target not in below
                layer_knows_host = part == "moe" and not in_hosts and rest.startswith("moe.hosts.")
                if upwards or layer_knows_host:
                    wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_extras_name_what_is_imported():
    """Whatever a file of the project or of its tests imports is in the core's requirements or in an extra."""
    named = {_canonical(Requirement(line).name) for line in importlib.metadata.requires("gatewright")}
    owners = importlib.metadata.packages_distributions()
    own = sys.stdlib_module_names | {"gatewright"} | {file.stem for file in files_of("tests")}
    documented_steps = {"torch_scatter", "ccexam"}  # Makefile
    # what the benchmark compares with where it is there; their pins of torch go with no environment of ours
    compared = {"scattermoe", "sonicmoe", "moe_ops", "liger_kernel", "megablocks"}
    absent = {"megatron": ["megatron-core"]}
    for file in (file for part in (*PARTS, "tests") for file in files_of(part)):
        for line, name in imports_of(file):
            top = name.split(".")[0]
            if file == ROOT / "tools/peers.py" and top in compared:
                continue
            if top not in own | documented_steps:
                distributions = owners.get(top) or absent.get(top, [top])
                assert {_canonical(name) for name in distributions} & named, f"{file}:{line} imports {name}"


@pytest.mark.parametrize("part", PARTS[:3])
def test_core_imports_torch_numpy_and_safetensors_alone(part):
    wrong = []
    for file in files_of(part):
        relative = file.relative_to(ROOT)
        extra = set().union(*(names for where, names in OPTIONAL.items() if relative.is_relative_to(where)))
        allowed = LIBRARIES | extra | sys.stdlib_module_names | {"gatewright"}
        for line, name in imports_of(file):
            if name.split(".")[0] not in allowed:
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong
