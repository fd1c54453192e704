# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Poisoned allocations for the kernel tests, and the device that they run on."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # so that `kernels` is the package
from kernels._common import HAS_TRITON  # after tests/conftest.py has set TRITON_INTERPRET

collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]         # a system without a triton wheel
GUARD, SENTINEL = 8192, 77  # elements on either side; a value that is exact in every dtype


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch):
    """torch.empty holds NaN (integers: the largest) between guard bands, untouched until the end."""
    buffers, plain = [], torch.empty

    def empty(*size, dtype=None, device=None, **others):
        if others:  # PyTorch's own calls, torch.utils.checkpoint's among them
            return plain(*size, dtype=dtype, device=device, **others)
        dtype = dtype or torch.get_default_dtype()
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        buffer = torch.full((shape.numel() + 2 * GUARD,), fill, dtype=dtype, device=device)
        buffer[:GUARD] = buffer[GUARD + shape.numel():] = SENTINEL
        buffers.append(buffer)
        return buffer[GUARD:GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield buffers
    for buffer in buffers:
        bands = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        assert (bands == SENTINEL).all(), "a store outside the allocated tensor"


@pytest.fixture
def nan_padded():
    """nan_padded(x): x (R, V) as a view at an odd offset into a matrix of NaN, which no kernel may read."""
    def pad(x):
        buffer = torch.full((x.shape[0] + 2, x.shape[1] + 8), float("nan"), dtype=x.dtype, device=x.device)
        view = buffer[1:-1, 3:-5]
        view.copy_(x)
        return view
    return pad
