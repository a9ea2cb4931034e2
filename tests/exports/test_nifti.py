"""NIfTI files as nibabel reads them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from exports.results import (
    GAP_MM,
    MARK,
    N_X,
    N_Y,
    N_Z,
    T1_MS,
    T2_MS,
    directions,
    extras,
    make_images,
    marked_lps,
    positions,
    slice_maps,
)
from whorl.exports import nifti
from whorl.maps.volumes import volumes

#: MRD's directions and positions are of single precision: 300 mm × 6e-8, and NIfTI's affine is too.
PLACE_MM = 1e-3


@pytest.mark.parametrize("left_handed", [False, True], ids=["right-handed", "left-handed"])
def test_a_voxel_lies_where_it_was_measured(left_handed: bool, tmp_path: Path) -> None:
    paths, said = nifti.write(volumes(make_images(left_handed)), tmp_path)
    assert [p.name for p in paths] == [f"{n}.nii.gz" for n in ("T1map", "T2map", "M0map", "quality", "B1map")]
    assert said == []
    for name, value in (("T1map", T1_MS), ("T2map", T2_MS)):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        values = image.get_fdata(dtype=np.float32)
        assert values.shape == (N_X, N_Y, N_Z)
        # The one voxel with the value, within half a step of the 16-bit pixels.
        assert np.argwhere(np.abs(values - value) < 0.06).tolist() == [list(MARK)]
        for affine in (image.get_sform(), image.get_qform()):
            ras = nib.affines.apply_affine(affine, MARK)
            np.testing.assert_allclose(ras * [-1, -1, 1], marked_lps(left_handed), atol=PLACE_MM)
        assert np.sign(np.linalg.det(image.affine)) == (-1 if left_handed else 1)
        np.testing.assert_allclose(image.header.get_zooms(), (15, 18, GAP_MM), rtol=1e-5)
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.get_data_dtype() == np.float32


def test_values_are_physical(tmp_path: Path) -> None:
    nifti.write(volumes(make_images(dtype="float32")), tmp_path)
    expected = slice_maps(False)
    for name, values in (("T1map", expected.t1_ms), ("T2map", expected.t2_ms), ("quality", expected.quality)):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32)[..., 0].T, values)


def test_slices_of_unequal_distances_are_files_of_their_own(tmp_path: Path) -> None:
    gaps = (5.5, 9.0)
    images = [i for i in make_images(gaps=gaps) if i.meta["GADGETRON_DataRole"] == "T1"]
    paths, said = nifti.write(volumes(images), tmp_path)
    assert [p.name for p in paths] == [f"T1map_slice-{n:02d}.nii.gz" for n in (1, 2, 3)]
    assert len(said) == 1
    assert "equal distances" in said[0]
    for path, position in zip(paths, positions(False, gaps), strict=True):
        image = nib.load(path)
        assert image.shape == (N_X, N_Y, 1)
        ras = nib.affines.apply_affine(image.affine, (N_X // 2, N_Y // 2, 0))
        np.testing.assert_allclose(ras * [-1, -1, 1], position, atol=PLACE_MM)


def test_previews_deviations_colours_and_coefficients(tmp_path: Path) -> None:
    paths, _ = nifti.write(volumes(extras(make_images())), tmp_path)
    names = ["T1map_sd", "T2map_lowrank", "T1map_rgb", "subspace"]
    assert [p.name for p in paths] == [f"{name}.nii.gz" for name in names]
    assert nib.load(paths[0]).get_fdata()[7, 5, 1] == 507
    rgb = np.asanyarray(nib.load(paths[2]).dataobj)
    assert rgb.shape == (N_X, N_Y, N_Z)
    assert tuple(rgb[7, 5, 1]) == (7, 10, 200)
    subspace = np.asanyarray(nib.load(paths[3]).dataobj)
    assert subspace.dtype == np.complex64
    assert subspace.shape == (N_X, N_Y, N_Z, 2)
    assert subspace[7, 5, 1].tolist() == [7 + 5j, 14 + 10j]


def test_repetitions_and_stacks_have_names_of_their_own(tmp_path: Path) -> None:
    images = [i for i in make_images(repetitions=2) if i.meta["GADGETRON_DataRole"] == "T1"]
    paths, _ = nifti.write(volumes(images), tmp_path / "runs")
    assert [p.name for p in paths] == ["T1map_run-1.nii.gz", "T1map_run-2.nii.gz"]
    # A second stack that is not parallel to the first.
    turned = [i for i in make_images(left_handed=True) if i.meta["GADGETRON_DataRole"] == "T1"]
    paths, _ = nifti.write(volumes(images[:3] + turned), tmp_path / "stacks")
    assert [p.name for p in paths] == ["T1map_1.nii.gz", "T1map_2.nii.gz"]


def test_the_directions_of_the_tests_are_oblique() -> None:
    read, phase, normal = directions(False)
    assert np.abs(np.stack([read, phase, normal])).max() < 0.95
    np.testing.assert_allclose(np.cross(read, phase), normal, atol=1e-15)
