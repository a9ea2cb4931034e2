"""The whole reconstruction on a GPU gives the maps of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scan_edit import Scan
from whorl.config import Settings
from whorl.kspace.nufft import gpu_backend

PROPERTIES: list[dict[str, Any]] = [
    {"method": "lowrank"},
    {"method": "llr"},
    {"method": "inr"},
    {"method": "inr", "iterations": 20},
    {"method": "inr", "guide": "off", "iterations": 40},
    {"method": "inr", "preset": "seed", "iterations": 40},
]


@pytest.mark.parametrize("properties", PROPERTIES, ids=str)
def test_these_properties_exist(properties: dict[str, Any]) -> None:
    """Here too, where there is no GPU: what is compared on one would be old names before anybody noticed."""
    settings = Settings.from_properties({"device": "cuda", **properties})
    assert settings.method == properties["method"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("properties", PROPERTIES, ids=str)
def test_the_gpu_gives_the_maps_of_the_cpu(scan: Scan, properties: dict[str, Any]) -> None:
    try:
        gpu_backend("auto")
    except ImportError as error:
        pytest.skip(str(error))
    here = scan.copy().run(device="cpu", **properties)
    there = scan.run(device="cuda", **properties)
    for role in ("T1", "T2"):
        a, b = here.physical(role), there.physical(role)
        both = (a > 0) & (b > 0)
        assert both.sum() > 0.98 * max((a > 0).sum(), (b > 0).sum())
        # Sums in another order end in other minima of the fit: most pixels are alike.
        assert np.median(np.abs(b[both] / a[both] - 1)) < 0.03
