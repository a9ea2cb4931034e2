"""A BIDS derivatives dataset of maps."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from whorl import __version__
from whorl.exports.facts import LOWRANK, Facts, kept, single_slices
from whorl.exports.nifti import sidecar, write_nifti
from whorl.maps.volumes import Volume
from whorl.scan.failure import ScanError

_BIDS_VERSION = "1.10.0"
#: Data type, `desc` and suffix of each map.
_FILES = {
    "T1": ("anat", "", "T1map"),
    "T2": ("anat", "", "T2map"),
    "M0": ("anat", "", "M0map"),
    "QUALITY": ("anat", "", "quality"),
    "B1": ("fmap", "", "TB1map"),
    "T1_SD": ("anat", "sd", "T1map"),
    "T2_SD": ("anat", "sd", "T2map"),
}
#: What BIDS has no suffix for.
_IGNORED = "**/*_quality.nii.gz\n**/*_quality.json\n"
_README = """# T1 and T2 maps from MR Fingerprinting

Made by whorl {version}. T1 and T2 are in seconds; voxels outside the object are 0. `desc-sd` are standard
deviations, `desc-lowrank` are maps without the joint neural representation. `*_quality` is the correlation of
a voxel with the dictionary; BIDS has no suffix for it.

Research use only. Not a medical device.
"""


def label(text: str) -> str:
    """A BIDS label: letters and digits only."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def export_bids(
    volumes: Sequence[Volume],
    facts: Facts,
    folder: Path,
    *,
    subject: str = "",
    session: str = "",
    lowrank: bool,
) -> list[Path]:
    """Maps of one scan, T1 and T2 in seconds, in ``derivatives/whorl`` of a folder; the paths.

    Subjects and sessions are added to a dataset that is there already.

    Parameters
    ----------
    subject, session
        Labels; the subject is that of the patient, else ``01``; no session if there is none.

    Raises
    ------
    ScanError
        If there is nothing to export, the maps of this subject and session are there already, or a label has
        other characters than letters and digits.
    """
    for name, given in (("subject", subject), ("session", session)):
        if given != label(given):
            raise ScanError(f'{name} is "{given}": expected letters and digits only')
    maps = [part for volume in kept(volumes, lowrank=lowrank) for part in single_slices(volume)]
    subject = subject or label(facts.patient_id) or "01"
    entities = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    root = folder / "derivatives" / "whorl"
    place = root / f"sub-{subject}" / (f"ses-{session}" if session else ".")
    if any(place.rglob(f"{entities}_*map.nii.gz")):
        raise ScanError(f"{place} has maps of this subject already: expected another subject or session")
    counts = Counter(volume.role for volume in maps)
    runs: Counter[str] = Counter()
    written = []
    for volume in maps:
        kind, description, suffix = _FILES[volume.role.removesuffix(LOWRANK)]
        description = description or ("lowrank" if volume.role.endswith(LOWRANK) else "")
        runs[volume.role] += 1
        name = entities
        name += f"_run-{runs[volume.role]}" if counts[volume.role] > 1 else ""
        name += f"_desc-{description}" if description else ""
        path = place / kind / f"{name}_{suffix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        in_seconds = volume.units == "ms"
        write_nifti(volume, path, factor=1e-3 if in_seconds else 1.0)
        units = "s" if in_seconds else {"1": "arbitrary", "a.u.": "arbitrary"}.get(volume.units, volume.units)
        told = {
            "Description": str(volume.images[0].meta.get("ImageComments") or volume.role),
            **sidecar(volume, facts, units),
            "SkullStripped": False,  # 0 is what is outside the object
        }
        text = json.dumps(told, indent=2)
        path.with_name(path.name.removesuffix(".nii.gz") + ".json").write_text(text + "\n")
        written.append(path)
    _describe(root)
    return written


def _describe(root: Path) -> None:
    """The files that every dataset has; those that are there stay."""
    description = {
        "Name": "whorl: T1 and T2 maps from MR Fingerprinting",
        "BIDSVersion": _BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "whorl",
                "Version": __version__,
                "Description": "Spiral MR Fingerprinting by a joint implicit neural representation",
            }
        ],
    }
    for name, text in (
        ("dataset_description.json", json.dumps(description, indent=2) + "\n"),
        ("README.md", _README.format(version=__version__)),
        (".bidsignore", _IGNORED),
    ):
        if not (root / name).exists():
            (root / name).write_text(text)
