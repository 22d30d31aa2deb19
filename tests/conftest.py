"""Settings of the whole suite."""

from __future__ import annotations

import torch

# The models here are tiny: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)
