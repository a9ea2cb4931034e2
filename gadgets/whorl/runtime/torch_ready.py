"""What PyTorch does at its first use, and is better done while a scan still arrives."""

from __future__ import annotations

import torch


def warm_up() -> None:
    """Make PyTorch ready: its first optimiser imports its compiler, which takes longer than a second."""
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
