"""In which dtypes sums over time are kept and returned: the rules of torch's own sum."""

from __future__ import annotations

import torch

_HALVES = (torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which steps of `dtype` are added up."""
    return torch.float32 if dtype in _HALVES else result_dtype(dtype)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which their sum is returned."""
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which their mean is returned."""
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.get_default_dtype()
