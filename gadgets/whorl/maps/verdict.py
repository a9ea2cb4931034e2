"""Whether maps look like a measurement: what does not is never called complete.

Letters: Y X pixels.
"""

from __future__ import annotations

import numpy as np

from whorl.maps.images import SliceMaps

#: Quality of the best tenth of the voxels below which the signals are not those of the dictionary: in
#: low-rank images noise and aliasing lower that of the others. Of 48 clean simulated scans the worst had
#: 0.933 (uneven order of the interleaves), a small one with lost readouts 0.89; with an inversion that nobody
#: told 0.48 to 0.85, with the flip angles in reverse 0.82 to 0.89.
_QUALITY = 0.87
#: Quality of the median voxel of corrected images, from which aliasing, bias and most of the noise are gone.
#: Of the same scans the worst had 0.998 by the LLR and 0.9996 by the INR; a transmit field, an inversion or
#: off-resonance that nobody told leave 0.999, fat 0.983. Trains that were not played leave 0.45 to 0.975,
#: constant flip angles once 0.984. A wrong inversion time, flip angles or TR by a factor leave 0.994 and
#: more: another tissue explains them.
_CORRECTED = 0.98
#: Share of the voxels at the ends of the dictionary. Clean scans: up to 0.45 (low-rank, plate, noise 1e-2);
#: small plates in much water, with a transmit field or a profile that nobody told: up to 0.8; TR in other
#: units, no inversion: 0.9 and more.
_ENDS = 0.85
#: What lies so near an end, relative to it, is at it.
_AT = 0.005
#: Pixels apart, m0 relative to the median, and quality of places whose phases are compared; and the share of
#: the object that may lie so near a jump by half a turn. Clean scans: 0 (but 0.011 of a small plate between
#: two coils); a jump along one border in the object: 0.042 to 0.11.
_APART, _STRONG, _MATCHED, _TURNED = 3, 0.3, 0.99, 0.01


def remarks(
    maps: SliceMaps,
    t1_range_ms: tuple[float, float],
    t2_range_ms: tuple[float, float],
    *,
    corrected: bool = False,
) -> list[tuple[str, str]]:
    """Pairs of status and why, for maps that do not look like a measurement.

    Parameters
    ----------
    maps
        Of a slice; 0 outside the object.
    t1_range_ms, t2_range_ms
        Ends of the dictionary.
    corrected
        Whether what undersampling did to the images has been taken out before they were matched.
    """
    inside = maps.t1_ms > 0
    if not inside.any():
        return []
    found = []
    quality = maps.quality[inside]
    best, median = (float(np.quantile(quality, share)) for share in (0.9, 0.5))
    what = ""
    if not best >= _QUALITY:
        what = f"the best tenth of the voxels has a quality of {best:.2f}, expected {_QUALITY} or more"
    elif corrected and not median >= _CORRECTED:
        what = f"the median voxel has a quality of {median:.3f}, expected {_CORRECTED} or more"
    if what:
        found.append(
            f"the signals do not match the dictionary: {what}. The train (flip angles and their order, TR), "
            f"its inversion or the numbers of the timepoints are not those that were played (set properties "
            f"sequence and inversion_time_ms), T1 and T2 lie beyond the dictionary, or readouts are "
            f"disturbed or mostly noise"
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
    # What a biased image is matched to may have the other sign.
    turned = half_turns(maps) if corrected else 0.0
    if turned > _TURNED:
        found.append(
            f"the phase jumps by half a turn beside {turned:.1%} of the object, expected {_TURNED:.0%} at "
            f"most: both sides of the border cancel, and T1 and T2 along it are wrong. An air cavity, an "
            f"implant, or fat and water in opposed phase"
        )
    return [("degraded", text) for text in found]


def half_turns(maps: SliceMaps) -> float:
    """Share of the object's pixels from which a few pixels on the phase of m0 is another by more than 120°.

    Jumps by half a turn leave the coefficients real on both sides; smaller ones do not. That the first
    coefficient changes its sign from tissue to tissue does not count: the atom's does so too.
    """
    if maps.turn is None:
        return 0.0
    inside = maps.t1_ms > 0
    strong = inside & (maps.m0 > _STRONG * np.median(maps.m0[inside])) & (maps.quality > _MATCHED)
    beside = np.zeros_like(inside)
    for phase, there, found in (
        (maps.turn, strong, beside),
        (maps.turn.T, strong.T, beside.T),  # views: what is found along the columns is in `beside` too
    ):
        one, other = slice(None, -_APART), slice(_APART, None)
        jumps = ((phase[one].conj() * phase[other]).real < -0.5) & there[one] & there[other]
        found[one] |= jumps
        found[other] |= jumps
    return float(beside.sum() / inside.sum())
