"""All settings of a reconstruction: one frozen object, filled once where a scan comes in.

A property has the same name here, in a Gadgetron configuration (`<property name= value=>`), in
the JSON parameters of FIRE and behind `-p` on the command line.
"""

# ruff: noqa: PIE794 (each group of settings binds `_setting` anew; mypy still finds a field that is there twice)
from __future__ import annotations

import difflib
import hashlib
import json
import os
import typing
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import PurePath
from typing import Any, Literal


class SettingsError(ValueError):
    """A property that does not exist, or a value that cannot be used; the text is for the operator."""


def _setting_of(
    group: str,
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    local: bool = False,
    changes_maps: bool = True,
) -> Any:
    metadata = {
        "group": group,
        "low": low,
        "high": high,
        "unit": unit,
        "local": local,
        "changes_maps": changes_maps,
        "text": text,
    }
    return field(default=default, metadata=metadata)


#: What preset=seed stands for.
_SEED = {"start": "adjoint", "guide": "off", "head": "image", "fit": "adam"}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one reconstruction. Zero or empty means "decided from the scan" where it says so."""

    _setting = partial(_setting_of, "What is made")
    method: Literal["inr", "llr", "lowrank"] = _setting("inr", "reconstruction of the subspace images")
    preset: Literal["default", "seed"] = _setting(
        "default",
        "seed: the data flow of the INR as published (start=adjoint, guide=off, head=image, fit=adam)",
    )
    output_dtype: Literal["uint16", "float32"] = _setting(
        "uint16", "pixels: scaled integers, or physical values with slope 1"
    )
    deadline_s: float = _setting(
        0.0,
        "time for one slice after its last readout; then its low-rank maps are sent; 0: none",
        low=0,
        unit="s",
    )
    scan_deadline_s: float = _setting(
        0.0,
        "time for all slices after the end of the scan; then low-rank maps are sent of those that are not "
        "ready; 0: none",
        low=0,
        unit="s",
    )
    fallback: Literal["lowrank", "llr"] = _setting(
        "lowrank",
        "what is sent of a slice whose INR fails: low-rank maps; or those of the LLR, and low-rank ones if "
        "it fails too. Past a deadline always low-rank ones, which are ready",
    )
    preview: bool = _setting(
        False,
        "low-rank maps of each slice at once, as series of their own (11 to 15), before its maps",
        changes_maps=False,
    )
    rgb: bool = _setting(
        False, "T1 and T2 in colour too (lipari, navia), as series 21 and 22", changes_maps=False
    )
    uncertainty: bool = _setting(
        False,
        "standard deviations of T1 and T2 too, as series 6 and 7; made after the maps, takes as long as "
        "fourteen slices",
        changes_maps=False,
    )
    subspace_images: bool = _setting(
        False, "the complex subspace images too, as series 31", changes_maps=False
    )
    fit_frames: int = _setting(
        0,
        "pictures of the fit (subspace images, maps, joint features), as series 41 to 44, for the "
        "animation of a report: so many of each slice, but no more than the fit has iterations, and one "
        "without any, as by default; guide=off has 100. The fit is made once more for them",
        low=0,
        high=60,
        changes_maps=False,
    )
    error_image: bool = _setting(
        False, "a readable status image if nothing else can be sent", changes_maps=False
    )

    _setting = partial(_setting_of, "The stream")
    idle_timeout_s: float = _setting(
        600.0, "longest silence of a sender within a scan", low=0.1, unit="s", local=True, changes_maps=False
    )
    scan_timeout_s: float = _setting(
        14400.0,
        "longest time of a scan from its header to its end",
        low=0.1,
        unit="s",
        local=True,
        changes_maps=False,
    )
    spool: str = _setting(
        "",
        "folder in which the raw stream of each scan is kept while it arrives",
        local=True,
        changes_maps=False,
    )
    spool_scans: int = _setting(
        20, "scans kept in the spool, the oldest are removed", low=1, local=True, changes_maps=False
    )
    spool_mb: int = _setting(
        20480, "largest size of the spool", low=1, unit="MiB", local=True, changes_maps=False
    )

    _setting = partial(_setting_of, "What was scanned, where the stream does not say it or says it wrongly")
    sequence: str = _setting(
        "",
        "file with the train: CSV with columns flip_deg,tr_ms,te_ms, or a Pulseq .seq, which has the "
        "trajectory too",
        local=True,
    )
    timepoints: int = _setting(
        0,
        "timepoints at the start of the train that are used, whether more were measured or not; 0: all",
        low=0,
    )
    inversion_time_ms: float = _setting(
        -1.0, "inversion delay; 0: no inversion; -1: from the header", low=-1, unit="ms"
    )
    timepoint: Literal["auto", "user_int", "repetition", "contrast", "set", "arrival"] = _setting(
        "auto", "counter that numbers the timepoints"
    )
    adc_segments: Literal["auto", "join", "off"] = _setting(
        "auto",
        "readouts that differ in idx.segment alone are parts of one ADC: joined; auto: if other counters "
        "number the timepoints",
    )
    trajectory: str = _setting(
        "",
        "file with the trajectory, instead of what is attached: .npz, .h5, MRD or Pulseq .seq",
        local=True,
    )
    trajectory_by: Literal["auto", "arm", "timepoint"] = _setting(
        "auto", "what numbers the interleaves of a trajectory that is not attached"
    )
    trajectory_units: Literal["auto", "cycles/pixel", "±1", "rad/pixel", "cycles/FOV", "1/m", "1/cm"] = (
        _setting("auto", "unit of a trajectory that does not say it")
    )
    rotation_deg: float = _setting(
        0.0,
        "angle from one arm to the next where only one interleaf is known; 0: 360 / number of arms",
        low=-360,
        high=360,
        unit="deg",
    )
    gradient_delay_x_us: float = _setting(
        0.0, "time by which the gradient along kx lags the samples", low=-100, high=100, unit="µs"
    )
    gradient_delay_y_us: float = _setting(
        0.0, "time by which the gradient along ky lags the samples", low=-100, high=100, unit="µs"
    )
    girf: str = _setting(
        "",
        "file with the gradient impulse response (.npy, .npz), by which the trajectory is corrected",
        local=True,
    )
    girf_raster_us: float = _setting(
        10.0, "raster of a response whose file does not say it", low=0.1, high=1000, unit="µs"
    )
    density: Literal["attached", "computed"] = _setting(
        "attached", "density compensation: third trajectory column if there is one, or always computed"
    )
    fov_shift: Literal["none", "nominal", "off"] = _setting(
        "none",
        "none: the data are centred on the position of the slice already; nominal: they are centred on the "
        "isocentre and are shifted to that position; off: they are, and the images are labelled so",
    )
    whiten: Literal["auto", "off"] = _setting("auto", "whiten the coils if noise readouts came")
    noise_bandwidth: float = _setting(
        0.0,
        "bandwidth of the receiver's noise relative to that of its samples; 0: from the header, else 1",
        low=0,
        high=2,
    )
    min_readouts: float = _setting(0.9, "share of the timepoints that a slice must have", low=0.05, high=1)

    _setting = partial(_setting_of, "Signal model")
    t1_min_ms: float = _setting(20.0, "shortest T1 of the dictionary", low=1, unit="ms")
    t1_max_ms: float = _setting(5000.0, "longest T1 of the dictionary", low=2, unit="ms")
    t2_min_ms: float = _setting(4.0, "shortest T2 of the dictionary", low=0.5, unit="ms")
    t2_max_ms: float = _setting(3000.0, "longest T2 of the dictionary", low=1, unit="ms")
    dictionary_step: float = _setting(
        0.05, "relative step of T1 and T2 in the dictionary", low=0.005, high=0.3
    )
    refine: Literal["on", "off"] = _setting(
        "on", "maximum of the match between the atoms, or the best atom itself"
    )
    energy: float = _setting(0.9999, "signal energy that the temporal basis keeps", low=0.5, high=1)
    n_coefficients: int = _setting(0, "size K of the temporal basis; 0: by energy", low=0, high=64)
    inversion_efficiency: float = _setting(
        1.0, "the inversion leaves Mz = -efficiency; 1: ideal", low=0, high=1
    )
    slice_profile: str = _setting(
        "none",
        "flip angles across the slice: none; sinc (Hann-windowed, of time_bandwidth); "
        'or factors at equidistant places, for instance "1 0.97 0.8 0.4 0.1"',
    )
    rf_shape: str = _setting(
        "",
        "text file with the excitation pulse, instead of slice_profile: amplitude and perhaps phase in "
        "degrees in each line",
        local=True,
    )
    time_bandwidth: float = _setting(
        4.0, "duration times bandwidth of the pulse (sinc, rf_shape)", low=0.5, high=100
    )
    diffusion_um2_per_ms: float = _setting(
        0.0,
        "diffusion coefficient; needs spoiler_cycles_per_mm; 0: no diffusion",
        low=0,
        high=100,
        unit="µm²/ms",
    )
    spoiler_cycles_per_mm: float = _setting(
        0.0,
        "dephasing by the spoiler in each TR, for diffusion_um2_per_ms",
        low=0,
        high=1000,
        unit="cycles/mm",
    )
    b1: Literal["nominal", "match"] = _setting(
        "nominal", "transmit field: as planned, or matched together with T1 and T2 and sent as a map"
    )
    b1_map: str = _setting(
        "",
        "file with the relative transmit field (1: as planned) on the field of view: .npy or .npz (b1), "
        "(slices, y, x) or (y, x)",
        local=True,
    )
    b1_min: float = _setting(0.7, "smallest B1 of the dictionary, where it has this axis", low=0.1, high=2.9)
    b1_max: float = _setting(1.3, "largest B1 of the dictionary, where it has this axis", low=0.2, high=3)
    b1_step: float = _setting(
        0.02, "step of B1 in the dictionary; wider ones are wrong at long T2", low=0.005, high=0.5
    )
    cache_dir: str = _setting(
        "",
        "folder in which dictionaries are kept; empty: the user's cache folder",
        local=True,
        changes_maps=False,
    )
    cache_mb: int = _setting(
        512,
        "largest size of the cache; 0: nothing is kept",
        low=0,
        unit="MiB",
        local=True,
        changes_maps=False,
    )

    _setting = partial(_setting_of, "k-space")
    compression: Literal["svd", "rovir", "off"] = _setting(
        "svd",
        "virtual coils: the strongest; those that favour rovir_region over what lies around it; or none",
    )
    virtual_coils: int = _setting(0, "virtual coils after compression; 0: by energy", low=0, high=128)
    coil_energy: float = _setting(
        0.995, "signal energy that the virtual coils keep, where they are chosen by it", low=0.5, high=1
    )
    rovir_region: str = _setting(
        "",
        "x and y limits of the region of interest as shares of the field of view, for instance "
        '"0.1 0.9 0.2 0.8"; empty: the field of view',
    )
    coil_maps: Literal["polynomial", "walsh", "espirit"] = _setting(
        "polynomial",
        "coil maps: polynomials of the place fitted to the images of the coils; or from the centre of "
        "k-space "
        "alone, by adaptive combination or ESPIRiT",
    )
    coil_maps_file: str = _setting(
        "",
        "file with coil maps (csm) or an image of the body coil (body) instead: .npy, .npz or .h5",
        local=True,
    )
    nufft: Literal["auto", "finufft", "sigpy"] = _setting("auto", "NUFFT back end")
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "where the arrays live; auto: a GPU if there is one"
    )

    _setting = partial(_setting_of, "Joint implicit neural representation")
    start: Literal["corrected", "adjoint"] = _setting(
        "corrected", "what is fitted: x0 corrected for the interleaf order, or x0 as published"
    )
    correction_steps: int = _setting(
        -1,
        "conjugate-gradient steps of the corrected start (method=inr alone); -1: 4, and 12 for an uneven "
        "order of interleaves",
        low=-1,
        high=100,
    )
    fit: Literal["varpro", "adam"] = _setting(
        "varpro", "output head solved in each iteration, or all weights by Adam"
    )
    head: Literal["kspace", "image"] = _setting(
        "kspace",
        "kspace: of an uneven order and with start=corrected, the output head is at last fitted to the data; "
        "image: as published, to the images alone",
    )
    guide: Literal["on", "off"] = _setting(
        "on",
        "whether the encoder begins with the images smoothed together where they are alike within their "
        "noise, or with small random values",
    )
    encoder: Literal["grid", "hash", "fourier", "siren"] = _setting(
        "grid",
        "of the coordinates: dense grids; hashed ones, where those do not fit; random Fourier features; "
        "sine layers",
    )
    iterations: int = _setting(
        -1,
        "Adam iterations of the fit; -1: none for guide=on, 100 without, 300 for fit=adam",
        low=-1,
        high=100000,
    )
    levels: int = _setting(
        0, "resolution levels of the grid encoder; 0: 4 for guide=on, else 8", low=0, high=32
    )
    features: int = _setting(4, "features of each level for guide=off", low=1, high=64)
    base_resolution: int = _setting(16, "grid points of the coarsest level along the longer side", low=2)
    finest_resolution: int = _setting(
        0,
        "grid points of the finest level along the longer side; 0: one for each pixel for guide=on, else 96",
        low=0,
    )
    log2_table: int = _setting(15, "entries of a level's table as a power of two (hash)", low=4, high=24)
    frequencies: int = _setting(64, "number of random frequencies (fourier)", low=1, high=4096)
    frequency_sigma: float = _setting(
        5.0, "spread of the random frequencies (fourier)", low=0.1, high=1000, unit="cycles/FOV"
    )
    sine_layers: int = _setting(4, "number of sine layers (siren)", low=1, high=16)
    sine_omega: float = _setting(30.0, "factor of the angles (siren)", low=0.1, high=1000)
    hidden: int = _setting(0, "width of the MLP; 0: 16 for guide=on, else 64", low=0, high=1024)
    learning_rate: float = _setting(
        0.0,
        "learning rate at the start, if there are iterations; it falls to a tenth; 0: 0.003 for guide=on, "
        "else by encoder (grid 0.03)",
        low=0,
    )
    lambda_enc: float = _setting(3e-6, "weight of the encoder's squared norm, if there are iterations", low=0)
    lambda_mlp: float = _setting(1e-6, "weight of the MLP's squared norm, if there are iterations", low=0)
    ridge: float = _setting(1e-4, "ridge of the head, relative to the mean diagonal (varpro)", low=0)
    seed: int = _setting(0, "seed of the initial weights", low=0, high=2**63 - 1)

    _setting = partial(_setting_of, "Locally low-rank")
    llr_lambda: float = _setting(
        0.7,
        "weight of the penalty, relative to the largest singular value that noise has in a block of x0",
        low=0,
        high=1000,
    )
    llr_block: int = _setting(2, "edge of a block", low=2, high=64, unit="pixels")
    llr_iterations: int = _setting(4, "iterations of llr", low=1, high=1000)

    del _setting

    @classmethod
    def from_properties(cls, properties: Mapping[str, object], *, local: bool = True) -> Settings:
        """Make settings of names and values as a configuration gives them (texts or JSON values).

        Parameters
        ----------
        properties
            Values by property name; a value may be a text.
        local
            Whether properties of this machine (files, limits) are allowed; never for what came by network.

        Raises
        ------
        SettingsError
            For an unknown name (with the nearest one), an unreadable value or one out of its range.
        """
        values: dict[str, Any] = {}
        for name, value in properties.items():
            known = property_of(name)
            if known.local and value and not local:
                raise SettingsError(
                    f'property "{name}" concerns the machine that reconstructs and is not taken from the '
                    f"network: set it where the server is started"
                )
            values[name] = _coerce(known, value)
        if values.get("preset") == "seed":
            values = {**_SEED, **values}
        if values.get("encoder", "grid") != "grid":
            values.setdefault("guide", "off")
        settings = cls(**values)
        if settings.guide == "on" and settings.encoder != "grid":
            raise SettingsError(
                f'encoder is "{settings.encoder}" and guide is on: the guide fills grids. Expected guide=off'
            )
        if settings.n_coefficients == 1:
            raise SettingsError(
                "n_coefficients is 1: expected 0 (by energy) or at least 2, else all atoms match"
            )
        for quantity in ("t1", "t2"):
            low, high = getattr(settings, f"{quantity}_min_ms"), getattr(settings, f"{quantity}_max_ms")
            if low >= high:
                raise SettingsError(
                    f"{quantity}_min_ms is {low:g}, {quantity}_max_ms is {high:g}: expected min < max"
                )
            if settings.output_dtype == "uint16" and high > (limit := {"t1": 32767, "t2": 3276.7}[quantity]):
                raise SettingsError(
                    f"{quantity}_max_ms is {high:g}: uint16 pixels hold up to {limit:g} ms. "
                    f"Set property output_dtype to float32"
                )
        if settings.t2_min_ms > settings.t1_max_ms:
            raise SettingsError(
                f"t2_min_ms is {settings.t2_min_ms:g}, t1_max_ms is {settings.t1_max_ms:g}: "
                f"expected a T1 that is at least the shortest T2"
            )
        settings._check_signal_model()
        settings._check_coils()
        if settings.finest_resolution and settings.base_resolution > settings.finest_resolution:
            raise SettingsError(
                f"base_resolution is {settings.base_resolution}, "
                f"finest_resolution is {settings.finest_resolution}: expected base <= finest"
            )
        return settings

    def _check_signal_model(self) -> None:
        self.flip_factors()
        if -1 < self.inversion_time_ms < 0:
            raise SettingsError(
                f"inversion_time_ms is {self.inversion_time_ms:g}: "
                f"expected 0 or more, or -1 (from the header)"
            )
        if self.rf_shape and self.slice_profile.strip().lower() != "none":
            raise SettingsError(
                f'slice_profile is "{self.slice_profile}" and rf_shape is "{self.rf_shape}": '
                f"expected one of them"
            )
        if (self.diffusion_um2_per_ms > 0) != (self.spoiler_cycles_per_mm > 0):
            raise SettingsError(
                f"diffusion_um2_per_ms is {self.diffusion_um2_per_ms:g}, spoiler_cycles_per_mm is "
                f"{self.spoiler_cycles_per_mm:g}: expected both or neither"
            )
        if self.b1_min >= self.b1_max:
            raise SettingsError(f"b1_min is {self.b1_min:g}, b1_max is {self.b1_max:g}: expected min < max")
        if self.b1_map and self.b1 == "match":
            raise SettingsError('b1 is "match" and there is a b1_map: expected one of them')

    def _check_coils(self) -> None:
        self.region_of_interest()
        if self.rovir_region and self.compression != "rovir":
            raise SettingsError(
                f'rovir_region is "{self.rovir_region}", compression is {self.compression}: '
                f"expected compression=rovir, which alone uses a region"
            )
        if self.virtual_coils and self.compression == "off":
            raise SettingsError(
                f"virtual_coils is {self.virtual_coils}, compression is off: expected one of them"
            )
        if self.coil_maps_file and self.coil_maps != "polynomial":
            raise SettingsError(
                f"coil_maps is {self.coil_maps} and there is a coil_maps_file: expected one of them"
            )

    def region_of_interest(self) -> tuple[float, float, float, float]:
        """Limits (x0, x1, y0, y1) of `rovir_region` as shares of the field of view; all of it if empty.

        Raises
        ------
        SettingsError
            If these are no limits within the field of view.
        """
        text = self.rovir_region.replace(",", " ")
        if not text.strip():
            return 0.0, 1.0, 0.0, 1.0
        try:
            x0, x1, y0, y1 = (float(part) for part in text.split())
        except ValueError:
            x0 = x1 = y0 = y1 = 0.0
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise SettingsError(
                f'property "rovir_region" is "{self.rovir_region}": expected x0 x1 y0 y1 as shares of the '
                f'field of view, 0 to 1 and rising, for instance "0.1 0.9 0.2 0.8"'
            )
        return x0, x1, y0, y1

    def flip_factors(self) -> tuple[float, ...]:
        """The factors that `slice_profile` lists; empty if it names a profile.

        Raises
        ------
        SettingsError
            If it does neither.
        """
        text = self.slice_profile.strip().lower()
        if text in ("none", "sinc"):
            return ()
        try:
            factors = tuple(float(part) for part in text.replace(",", " ").split())
        except ValueError:
            factors = ()
        if not (0 < len(factors) <= 256 and any(factors) and all(abs(factor) <= 10 for factor in factors)):
            raise SettingsError(
                f'property "slice_profile" is "{self.slice_profile}": expected none, sinc, or up to 256 '
                f'factors of the flip angle, for instance "1 0.97 0.8 0.4 0.1"'
            )
        return factors

    @property
    def wants_more(self) -> bool:
        """Whether there is something to be made beside the maps."""
        return self.rgb or self.uncertainty or self.subspace_images or self.fit_frames > 0

    @property
    def iterates(self) -> bool:
        """Whether there is an INR that is fitted in iterations of Adam; see `whorl.recon.inr.fit_inr`."""
        by_default = self.guide == "off" or self.fit == "adam"
        return self.method == "inr" and (self.iterations > 0 or (self.iterations < 0 and by_default))

    def changed(self) -> dict[str, Any]:
        """Settings of the result that are not the default, files by their name alone."""
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            of_machine = f.metadata["local"] and not f.metadata["changes_maps"]
            if value != f.default and not of_machine:
                is_file = f.metadata["local"] and isinstance(value, str)
                values[f.name] = PurePath(value).name if is_file else value
        return values

    def digest(self) -> str:
        """Short hash of all settings that can change a map, for the provenance of an image."""
        relevant = {f.name for f in fields(self) if f.metadata["changes_maps"]}
        values = {name: value for name, value in asdict(self).items() if name in relevant}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


#: `WHORL_PROPERTY_METHOD=lowrank` in the environment of a program is its default of `method`.
ENVIRONMENT = "WHORL_PROPERTY_"


@dataclass(frozen=True, slots=True)
class Property:
    """What is known of one setting: what `whorl properties` shows, and what its values are held against.

    Parameters
    ----------
    name, group
        As it is set, and the heading under which it stands.
    type
        choice, boolean, integer, number, text, or path (of a file or a folder).
    choices
        All that can be chosen; empty for other types.
    low, high
        Smallest and largest value, in `unit`; None: no limit.
    unit
        Empty if it has none.
    default
        What is taken if it is not set.
    local
        Whether it concerns the machine that reconstructs and is not taken from the network.
    changes_maps
        Whether the maps depend on it.
    text
        What it does.
    """

    name: str
    group: str
    type: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    unit: str
    default: bool | int | float | str
    local: bool
    changes_maps: bool
    text: str

    @property
    def bounds(self) -> str:
        """The range in words; empty if it has no limit."""
        if self.low is None:
            return "" if self.high is None else f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


def _property(f: Field[Any], hint: Any) -> Property:
    choices = typing.get_args(hint)
    if choices:
        kind = "choice"
    elif hint is str:
        kind = "path" if f.metadata["local"] else "text"
    else:
        kind = {bool: "boolean", int: "integer", float: "number"}[hint]
    default: Any = f.default
    return Property(name=f.name, type=kind, choices=choices, default=default, **f.metadata)


_HINTS = typing.get_type_hints(Settings)
#: All properties by name.
PROPERTIES = {f.name: _property(f, _HINTS[f.name]) for f in fields(Settings)}

#: Properties of the machine that reconstructs: files and limits.
LOCAL = frozenset(name for name, known in PROPERTIES.items() if known.local)
#: Of these, paths of files and folders; and the files alone, on which the maps depend.
PATHS = frozenset(name for name, known in PROPERTIES.items() if known.type == "path")
FILES = frozenset(name for name in PATHS if PROPERTIES[name].changes_maps)


def property_of(name: str) -> Property:
    """What is known of the property of this name.

    Raises
    ------
    SettingsError
        If there is none; with the nearest name.
    """
    if name not in PROPERTIES:
        near = difflib.get_close_matches(name, PROPERTIES, n=1, cutoff=0.4)
        raise SettingsError(
            f'unknown property "{name}"'
            + (f', did you mean "{near[0]}"?' if near else f"; known are {', '.join(PROPERTIES)}")
        )
    return PROPERTIES[name]


#: What is read as true or false, in any case.
_TRUTH = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def _coerce(known: Property, value: object) -> Any:
    """Read one value as the type of its property; `SettingsError` in the operator's words."""
    name, low, high = known.name, known.low, known.high
    if not isinstance(value, str | int | float):
        raise SettingsError(f'property "{name}" is {value!r}: expected a text or a number')
    text = str(value).strip()
    if known.type == "choice":
        match = {c.lower(): c for c in known.choices}.get(text.lower().replace("+-1", "±1"))
        if match is None:
            raise SettingsError(f'property "{name}" is "{text}": expected one of {", ".join(known.choices)}')
        return match
    if known.type in ("text", "path"):
        return text
    if known.type == "boolean":
        truth = _TRUTH.get(text.lower())
        if truth is None:
            raise SettingsError(f'property "{name}" is "{text}": expected true or false')
        return truth
    try:
        number = _whole(text) if known.type == "integer" else float(text)
    except ValueError as error:
        kind = "a whole number" if known.type == "integer" else "a number"
        raise SettingsError(f'property "{name}" is "{text}": expected {kind}') from error
    if not (number == number and abs(number) != float("inf")):
        raise SettingsError(f'property "{name}" is "{text}": expected a finite number')
    if (low is not None and number < low) or (high is not None and number > high):
        raise SettingsError(f'property "{name}" is "{text}": expected {known.bounds}')
    return number


def _whole(text: str) -> int:
    """A whole number; also "60.0", as programs write that know only one kind of number."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def properties_from_xml(text: str | bytes) -> dict[str, str]:
    """The properties in a configuration text: of its external node, or of a bare `<configuration>`.

    Raises
    ------
    SettingsError
        If the text is not XML, declares entities or has a property without name or value.
    """
    raw = text.encode() if isinstance(text, str) else text
    raw = raw.rstrip(b"\0 \r\n\t")
    if not raw:
        return {}
    if b"\0" in raw:  # UTF-16, in which the next line would find nothing
        raise SettingsError("the configuration is not readable XML: expected UTF-8, got NUL bytes")
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise SettingsError("the configuration declares a document type or entities, which are not accepted")
    try:
        root = ET.fromstring(raw)
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter for unknown encodings
        raise SettingsError(f"the configuration is not readable XML: {error}") from error
    holder = root.find(".//external/configuration")
    properties: dict[str, str] = {}
    for element in (root if holder is None else holder).iter("property"):
        # Gadgetron's older form has <name> and <value> as children.
        name = element.get("name", element.findtext("name"))
        value = element.get("value", element.findtext("value"))
        if name is None or value is None:
            raise SettingsError("a property of the configuration lacks its name or its value")
        properties[name] = value
    return properties


def properties_from_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The properties that the environment sets, as containers are configured.

    Parameters
    ----------
    environment
        By default that of this process.
    """
    found = os.environ if environment is None else environment
    return {
        name.removeprefix(ENVIRONMENT).lower(): value
        for name, value in found.items()
        if name.startswith(ENVIRONMENT)
    }


def id_of(name: str) -> str:
    """A property's name in letters and digits alone, as OpenRecon wants it: `scandeadlines`."""
    return name.replace("_", "")


def properties_from_json(text: str | bytes) -> dict[str, object]:
    """The `parameters` object of a FIRE parameter text; names may lack their underscores, see `id_of`.

    Raises
    ------
    SettingsError
        If the text is not a JSON object with an object `parameters`.
    """
    raw = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    try:
        document = json.loads(raw.rstrip("\0 \r\n\t"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the parameters are not readable JSON: {error}") from error
    parameters = document.get("parameters", {}) if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        raise SettingsError('the JSON parameters have no object "parameters"')
    names: dict[str, str] = {id_of(f.name): f.name for f in fields(Settings)}
    return {names.get(str(name).lower(), str(name)): value for name, value in parameters.items()}
