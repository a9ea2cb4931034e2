"""Low-rank adjoint: the subspace images from which everything else starts.

Letters: K coefficients, C coils, I interleaves, S samples, Y X pixels.
"""

from __future__ import annotations

from torch import Tensor

from whorl.kspace.nufft import Nufft


def adjoint_coil_images(kspace: Tensor, dcf: Tensor, nufft: Nufft) -> Tensor:
    """Subspace images of each coil, ``F'W(U'y)``, without the coil combination.

    Parameters
    ----------
    kspace
        Complex `(I, K, C, S)`: readouts folded into the subspace.
    dcf
        `(I, S)`: area that each sample stands for in a full set of I interleaves. A train of T
        readouts visits each interleaf T/I times, and orthonormal columns share one unit of
        energy between all T, so the weights are counted as if each readout filled k-space alone.
    nufft
        Transform for the I·S samples.

    Returns
    -------
    Tensor
        `(K, C, Y, X)`, in the unit of the object.

    References
    ----------
    McGivney et al., IEEE Trans Med Imaging 33:2311 (2014), doi:10.1109/TMI.2014.2337321.
    """
    I, K, C, S = kspace.shape  # noqa: E741 - the field's letter
    weighted = kspace * (I * dcf).reshape(I, 1, 1, S)
    images = nufft.adjoint(weighted.permute(1, 2, 0, 3).reshape(K * C, I * S))
    return images.reshape(K, C, *images.shape[1:])
