"""From a slice's readouts to the subspace k-space that it is reconstructed from, and what to say of them.

Letters: T timepoints, K coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from whorl.kspace.slicebuffer import SliceBuffer, SubspaceKspace
from whorl.maps.geometry import orientation
from whorl.physics.dictionary import Dictionary
from whorl.pipeline.encoding import Encoder, Encoding
from whorl.pipeline.parts import Part
from whorl.pipeline.protocol import Protocol
from whorl.recon.calibration import few_readouts

#: Timepoints below which an undersampled train hardly tells tissues apart.
_SHORT_TRAIN = 50


def fold(
    buffer: SliceBuffer, basis: Tensor, receiver: Tensor | None, encoder: Encoder, units: str
) -> tuple[SubspaceKspace, Encoding]:
    """Bring a slice's readouts into the subspace, turned as their encoding demands.

    Parameters
    ----------
    buffer
        The readouts; empty afterwards.
    basis
        `(T, K)`.
    receiver
        `(T,)` factors of the receiver's phase; ``None``: it follows the RF phase.
    encoder
        Of the scan.
    units
        Of the trajectory, if its source says it; else ``auto``.

    Raises
    ------
    ScanError
        If the trajectory cannot be used.
    """
    kspace = buffer.finish(basis, receiver)
    trajectory = buffer.interleaves.stack(kspace.interleaves)
    encoding = encoder(trajectory, buffer.head, units)
    if encoding.phase is not None:
        kspace = kspace.turned(encoding.phase)
    return kspace, encoding


def shortcomings(
    part: Part,
    head: np.void,
    encoding: Encoding,
    protocol: Protocol,
    kspace: SubspaceKspace,
    dictionary: Dictionary,
) -> Iterator[str]:
    """What degrades a slice's maps, whatever the method: its encoding, readouts that it lacks, its place."""
    T, n_seen, lost = protocol.n_measured, len(part.seen), part.lost
    if encoding.note:
        yield encoding.note
    if T < _SHORT_TRAIN:
        yield f"{T} timepoints are few: expected {_SHORT_TRAIN} or more for maps to trust"
    points = encoding.points.reshape(*encoding.dcf.shape, 2)
    n_coils, energies = kspace.bins.shape[2], dictionary.energies
    if few := few_readouts(kspace.gram, points, max(encoding.shape), n_seen, energies, n_coils):
        yield few
    if n_seen < T:
        yield f"{T - n_seen} of {T} readouts are missing{f': {lost}' if lost else ''}"
    elif lost:
        yield f"of the readouts, {lost}"
    if assumed := orientation(head)[2]:
        yield assumed
