"""Whether maps look like a measurement: what does not is never called complete.

Letters: Y X pixels.
"""

from __future__ import annotations

import numpy as np

from whorl.maps.images import SliceMaps

#: Quality of the best tenth of the voxels below which the signals are not those of the dictionary. Of 47
#: clean simulated scans, low-rank, the worst had 0.926 (plate, noise 1e-2), a small one with lost readouts
#: 0.89; with an inversion that nobody told 0.48 to 0.86, with the flip angles in reverse 0.82 to 0.89. A
#: wrong inversion time, or flip angles that are wrong by one factor, leave it above 0.96: another tissue
#: explains them.
_QUALITY = 0.87
#: Share of the voxels at the ends of the dictionary. Clean scans: up to 0.45 (low-rank, plate, noise 1e-2);
#: small plates in much water, with a transmit field or a profile that nobody told: up to 0.8; TR in other
#: units, no inversion: 0.9 and more.
_ENDS = 0.85
#: What lies so near an end, relative to it, is at it.
_AT = 0.005


def remarks(
    maps: SliceMaps, t1_range_ms: tuple[float, float], t2_range_ms: tuple[float, float]
) -> list[tuple[str, str]]:
    """Pairs of status and why, for maps that do not look like a measurement.

    Parameters
    ----------
    maps
        Of a slice; 0 outside the object.
    t1_range_ms, t2_range_ms
        Ends of the dictionary.
    """
    inside = maps.t1_ms > 0
    if not inside.any():
        return []
    found = []
    best = float(np.quantile(maps.quality[inside], 0.9))
    if not best >= _QUALITY:
        found.append(
            f"the signals do not match the dictionary: the best tenth of the voxels has a quality of "
            f"{best:.2f}, expected {_QUALITY} or more. The train or its inversion is not the one that was "
            f"played: set properties sequence and inversion_time_ms"
        )
    ends = np.zeros_like(inside)
    for values, (low, high) in ((maps.t1_ms, t1_range_ms), (maps.t2_ms, t2_range_ms)):
        ends |= (values <= low * (1 + _AT)) | (values >= high * (1 - _AT))
    share = float(ends[inside].mean())
    if share > _ENDS:
        found.append(
            f"{share:.0%} of the voxels lie at the ends of the dictionary, expected {_ENDS:.0%} at most. The "
            f"train, its inversion or its units (TR and TE in ms, flip angles in degrees) are not those that "
            f"were played, or noise is all there is"
        )
    return [("degraded", text) for text in found]
