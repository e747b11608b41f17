"""Every backend's values and gradients against float64, over drawn shapes: within 1e-6 of the norm in float32 and 1e-2
in bfloat16, and within 1.5 times what the reference rounds in the same dtype. Fresh memory is NaN.

``triton_cases.py`` holds Triton's to the same; so does ``gatewright check-gpu`` on a GPU.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from kernels_fixtures import accuracy_cases, poisoned  # noqa: F401

from gatewright.kernels.cpu import native
from gatewright.tools.expert_case import too_far


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestAccuracy:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(case=accuracy_cases())
    def test_cpu(self, case, dtype):
        assert not too_far(case.errors(dtype, "cpu"), dtype), case

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(case=accuracy_cases())
    def test_cpu_without_native_code(self, case, dtype):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "why_not", lambda *_: "left out")
            assert not too_far(case.errors(dtype, "cpu"), dtype), case

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(case=accuracy_cases(aligned=True))
    def test_torch(self, case, dtype):
        # grouped_mm takes no bias: added to a rounded product, it can round h across relu's kink
        if case.activation == "relu":
            case = dataclasses.replace(case, bias=False)
        assert not too_far(case.errors(dtype, "torch"), dtype), case
