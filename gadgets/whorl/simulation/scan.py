"""A scan that could have been measured: an MRD file with the truth beside the data.

The object is given on its own fine grid and transformed to the samples of the spiral at once, tissue by
tissue; each timepoint is then a sum of the tissues' k-space with their signals as weights. Where the
transmit field or the relaxation varies from place to place, components of the signals take the place of
the tissues. Nothing here is shared with the reconstruction.

Letters: T timepoints, C coils.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from whorl.simulation import mrd
from whorl.simulation.acquisition import measure
from whorl.simulation.encoding import Encoding, encode
from whorl.simulation.noise import Noise, add_noise
from whorl.simulation.parameters import Parameters
from whorl.simulation.scene import Scene, make_scene
from whorl.simulation.truth import write_truth


def simulate(
    path: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None, **parameters: Any
) -> None:
    """Simulate a spiral MRF scan and write it as an MRD file with its truth.

    Left out, and so not tested by it: decay during the readout, flow, diffusion. The file is written beside
    its place and moved there when it is complete.

    Where the transmit field or the relaxation varies from place to place, each fine sample has the signal
    of its own field, T1 and T2, but for an error of at most 2e-5 of the largest signal (see
    `whorl.simulation.signals.expand_signals`).

    Off-resonance turns the signal from the pulse on, by ``exp(i 2π df (TE + t))`` at time t of the
    readout. It leaves the echoes as they are: with the same TR throughout, all pathways that are in phase
    at a pulse have seen as much phase in one direction as in the other. Over the readout the field is
    interpolated in time, with an error of at most 1e-4 of the signal (see
    `whorl.simulation.acquisition.segments_of_time`).

    Parameters
    ----------
    path
        HDF5 file to be written, with the groups `dataset` (MRD) and `truth`
        (`whorl.simulation.truth.read_truth`).
    progress
        Receives one line for each step.
    parameters
        See `whorl.simulation.parameters.Parameters`; `phantom` is needed.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    FileNotFoundError
        If the folder of `path` does not exist.
    ImportError
        If the brain is asked for and nilearn is not installed.
    """
    say = progress if progress is not None else _silent
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    p, encoding = encode(Parameters(**parameters))
    say(f"spiral: {p.interleaves} interleaves of {p.readout_ms:g} ms")
    scene = make_scene(p, encoding.train, say)
    kspace = measure(scene, encoding, p, say)  # (Z, T, C, S)
    noise = add_noise(kspace, encoding, p)
    rows = mrd.rows(noise.prescan, kspace, encoding, p)
    say(f"writing {target}")
    _write(target, mrd.header(p, encoding), rows, scene, _told(p, encoding, noise))


def _silent(_: str) -> None:
    pass


def _told(p: Parameters, encoding: Encoding, noise: Noise) -> dict[str, Any]:
    """All parameters by name, as the truth keeps them."""
    train = encoding.train
    given = {field.name: getattr(p, field.name) for field in fields(p)}
    for name in ("train", "layout", "noise_dwell_us"):
        del given[name]
    return {
        **given,
        "plate": p.plate if p.phantom == "nist" else "",
        "sequence": str(p.sequence or ""),
        "girf": str(p.girf or ""),
        **{
            name: np.asarray(given[name], dtype=np.float64)
            for name in ("slice_profile", "turned_deg", "centre_mm")
        },
        "n_prescans": encoding.n_prescans,
        "noise_sd": noise.sd,
        "noise_covariance": noise.covariance,
        "spiral_inner_radius": encoding.inner_radius,
        "spiral_slew_t_per_m_s": encoding.slew_t_per_m_s,
        "flip_deg": train.flip_deg,
        "phase_deg": train.phase_deg,
        "tr_ms": train.tr_ms,
        "te_ms": train.te_ms,
        "ti_ms": train.ti_ms,
    }


def _write(target: Path, header: bytes, rows: Any, scene: Scene, parameters: dict[str, Any]) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with h5py.File(temporary, "x") as file:
            group = file.create_group("dataset")
            group.create_dataset("xml", data=[header], dtype=h5py.special_dtype(vlen=bytes))
            # Chunked as the C++ client makes it, so that readouts can be appended.
            group.create_dataset("data", data=rows, maxshape=(None,), chunks=(1024,))
            write_truth(file.create_group("truth"), scene, parameters)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
