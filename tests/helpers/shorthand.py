"""Short forms that tests of the paper's questions share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from traj_ood.errors import TrajOODError


def raises(text: str) -> Any:
    """Expect a ``TrajOODError`` whose message contains ``text``."""
    return pytest.raises(TrajOODError, match=re.escape(text))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal draws, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
