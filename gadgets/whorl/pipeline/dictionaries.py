"""From settings and a train to the dictionary of a scan, which is built once.

The latest ones are remembered by this process, others are kept on disk (`whorl.physics.store`).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.physics.dictionary import Dictionary, DictionaryParameters, build_dictionary
from whorl.physics.epg import SignalModel, diffusion_rate
from whorl.physics.sliceprofile import flip_profile, hann_sinc, read_rf_shape
from whorl.physics.store import Store, find_or_build
from whorl.scan.failure import ScanError
from whorl.scan.train import Train

#: Dictionaries that a process remembers.
_REMEMBERED = 4
_FEWEST = 2
#: Some GB of memory while it is built.
_MOST_ATOMS, _MOST_VALUES = 2_000_000, 1_500_000_000
#: The B1 axis for a map ends at multiples of this, so that the maps of many patients share a dictionary.
_B1_ROUND = 0.1

_recent: OrderedDict[tuple[str, torch.device], Future[Dictionary]] = OrderedDict()
_recent_lock = threading.Lock()


def pulse_shape(settings: Settings) -> NDArray[np.complex128] | None:
    """Samples `(M,)` of the excitation pulse, ``None`` if the slice profile does not come from one.

    Raises
    ------
    ScanError
        If its file cannot be read.
    """
    try:
        if settings.rf_shape:
            return read_rf_shape(settings.rf_shape)
    except ValueError as error:
        raise ScanError(str(error)) from error
    return hann_sinc(settings.time_bandwidth) if settings.slice_profile.strip().lower() == "sinc" else None


def dictionary_parameters(
    train: Train, settings: Settings, b1_span: tuple[float, float] | None = None
) -> DictionaryParameters:
    """What the dictionary of a scan depends on.

    Parameters
    ----------
    b1_span
        Smallest and largest value of a known transmit field, ``None`` if there is none.

    Raises
    ------
    ScanError
        If the train or a setting does not allow a dictionary.
    """
    try:
        shape = pulse_shape(settings)
        if shape is not None:
            profile = flip_profile(shape, settings.time_bandwidth, train.flip_deg)  # (P, T)
        else:
            profile = np.array(settings.flip_factors() or (1.0,))[:, None]  # (P, 1)
        parameters = DictionaryParameters(
            train,
            SignalModel(
                inversion_efficiency=settings.inversion_efficiency,
                profile=profile,
                diffusion_per_ms=diffusion_rate(
                    settings.diffusion_um2_per_ms, settings.spoiler_cycles_per_mm
                ),
            ),
            t1_range_ms=(settings.t1_min_ms, settings.t1_max_ms),
            t2_range_ms=(settings.t2_min_ms, settings.t2_max_ms),
            step=settings.dictionary_step,
            b1_range=_b1_range(settings, b1_span),
            b1_step=settings.b1_step,
            energy=settings.energy,
            n_coefficients=settings.n_coefficients,
        )
        n_atoms = len(parameters.grid())
    except ValueError as error:
        raise ScanError(f"no dictionary can be made: {error}") from error
    if min(n_atoms, train.n_timepoints) < _FEWEST:
        raise ScanError(
            f"the dictionary would have {n_atoms} atoms of {train.n_timepoints} timepoints: expected at "
            f"least {_FEWEST} of both, else all voxels match"
        )
    if n_atoms > _MOST_ATOMS or n_atoms * train.n_timepoints > _MOST_VALUES:
        raise ScanError(
            f"the dictionary would have {n_atoms} atoms of {train.n_timepoints} timepoints: expected at most "
            f"{min(_MOST_ATOMS, _MOST_VALUES // train.n_timepoints)} atoms. Set properties dictionary_step, "
            f"b1_step, or narrower ranges"
        )
    return parameters


def _b1_range(settings: Settings, span: tuple[float, float] | None) -> tuple[float, float]:
    limits = settings.b1_min, settings.b1_max
    if settings.b1 == "match":
        return limits
    if span is None:
        return 1.0, 1.0
    # 1 belongs to it: slices that the map lacks are matched with the flip angles as planned.
    low = min(1.0, round(math.floor(span[0] / _B1_ROUND + 1e-6) * _B1_ROUND, 6))
    high = max(1.0, round(math.ceil(span[1] / _B1_ROUND - 1e-6) * _B1_ROUND, 6))
    if low == high:
        return low, high
    low, high = max(low, limits[0]), min(high, limits[1])
    return (low, high) if low < high else limits


def store_of(settings: Settings) -> Store | None:
    """Where dictionaries are kept, ``None`` if nowhere."""
    if not settings.cache_mb:
        return None
    import platformdirs

    folder = Path(settings.cache_dir) if settings.cache_dir else platformdirs.user_cache_path("whorl")
    return Store(folder, settings.cache_mb << 20)


def get_dictionary(
    parameters: DictionaryParameters,
    settings: Settings,
    warn: Callable[[str], None],
    device: torch.device | None = None,
) -> Dictionary:
    """The dictionary of some parameters: remembered, from disk, or built. Several callers wait for one build.

    Parameters
    ----------
    warn
        Takes a sentence if the cache on disk cannot be used; the dictionary comes all the same.
    """
    device = device or torch.device("cpu")
    key = (parameters.digest(), device)
    with _recent_lock:
        waiting = _recent.get(key)
        ours = waiting is None
        if waiting is None:
            waiting = _recent[key] = Future()
        _recent.move_to_end(key)
        while len(_recent) > _REMEMBERED:
            _recent.popitem(last=False)
    if ours:
        try:
            found = find_or_build(
                parameters, store_of(settings), lambda wanted: build_dictionary(wanted, device), warn
            )
            waiting.set_result(found.to(device))
        except BaseException as error:
            with _recent_lock:
                if _recent.get(key) is waiting:
                    del _recent[key]
            waiting.set_exception(error)
    return waiting.result()
