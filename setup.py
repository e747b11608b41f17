"""Builds the package `gatewright` from this folder, which is the package itself.

The packages are listed from the folders below, never discovered from the root: tests, virtual environments and build
leftovers lie beside them. `kernels` has no `__init__.py` and is listed all the same (README, "Architecture").
"""

import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
PARTS = ("kernels", "routers", "moe", "tools", "recipes")


def find_packages() -> list[str]:
    """The root and every folder with Python files below the five parts, as dotted names."""
    folders = {file.parent for part in PARTS for file in (ROOT / part).rglob("*.py")}
    return ["gatewright", *sorted(".".join(("gatewright", *folder.relative_to(ROOT).parts)) for folder in folders)]


def read_version() -> str:
    # Read, not imported: at build time the package is not there under its name yet.
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(), re.MULTILINE).group(1)


def native_kernels() -> list[Extension]:
    """The CPU kernels as compiled code: optional, so that an installation without a compiler goes through.

    Loaded by ctypes (kernels/native.py), which asks the processor before it calls anything compiled with these options.
    No OpenMP library is linked: its symbols are to be those that torch has loaded.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    instructions = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
    return [
        Extension(
            "gatewright.kernels._native",
            sources=["kernels/csrc/expert_mlp.cpp"],
            depends=["kernels/csrc/activation.h", "kernels/csrc/tile.h"],
            extra_compile_args=[
                "-std=c++17", "-O2", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing",
                *(f"-m{name}" for name in instructions),
                # GCC's own headers leave operands undefined that no instruction reads
                "-Wno-uninitialized", "-Wno-maybe-uninitialized",
            ],
            language="c++",
            optional=True,
        )
    ]  # fmt: skip


EXTRAS = {
    # The adapter in moe/hosts/deepspeed.py relies on what these versions do.
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "hf": ["tqdm", "transformers>=5.0,<6"],
    "tensorboard": ["tensorboard"],
    "triton": ["triton; platform_system == 'Linux'"],
    "megatron": ["megatron-core>=0.16,<0.20"],
    "recipes": [
        "deepspeed>=0.19.8,<0.20",
        "diffusers",
        "mlxtend",
        "pillow",
        "scikit-learn",
        "tensorboard",
        "tqdm",
    ],
    "dev": [
        "accelerate",
        "build",
        "hypothesis",
        "packaging",
        "pytest",
        "ruff",
        "scipy",
        "setuptools",
        "tokenizers",
        "wheel",
    ],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    script_name="setup.py",  # its own name, so that it is not taken for a module of the package
    name="gatewright",
    version=read_version(),
    description="Train Mixture-of-Experts models whose routing is the thing under study",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    # pip keeps a torch that is already there and in this range; nothing in EXTRAS may pin torch (torchvision does).
    install_requires=["torch>=2.11,<2.14", "numpy", "safetensors"],
    extras_require=EXTRAS,
    packages=find_packages(),
    package_dir={"gatewright": "."},
    ext_modules=native_kernels(),
    package_data={
        "": ["*.json", "*.html", "*.css", "*.js", "*.safetensors"],
        # folders of data, which are no packages
        "gatewright.tools.dashboard": ["page/*", "demo/README.md", "demo/routing/*"],
    },
    entry_points={
        "console_scripts": ["gatewright = gatewright.tools.cli:main"],
        "tensorboard_plugins": ["gatewright_routing = gatewright.tools.dashboard.plugin:RoutingPlugin"],
    },
)
