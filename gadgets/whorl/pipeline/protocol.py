"""What was scanned: all that is settled about a scan, and where each value comes from.

`gather` reads what is known before the data (`Sources`), `settle` what a complete slice adds (`Protocol`).

Letters: T timepoints, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.scan import resolve
from whorl.scan.arrivals import Placed, ScanCounter, join_segments, mark_prescan, watched
from whorl.scan.failure import ScanError
from whorl.scan.header import REPETITIONS, Header, read_header
from whorl.scan.integrity import Tally, usable
from whorl.scan.pulseq import PulseqSequence, read_pulseq
from whorl.scan.readout import Readout
from whorl.scan.resolve import Numbering, Resolved
from whorl.scan.train import Train
from whorl.scan.trajectories import Trajectories
from whorl.scan.trajectory_file import read_trajectories, rotated
from whorl.scan.vds import trajectories_from_header

#: Relative difference of lengths and delays that two sources may have.
_SAME = 0.01
#: Share of the readouts that may be damaged; share of a train that a repetition has.
_DAMAGED, _MOST = 0.01, 0.7


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was found: its name, its value as text, and where it comes from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """What is known of a scan before its data come.

    Parameters
    ----------
    header
        The MRD header.
    train
        Of property ``sequence`` or the header's lists; ``None``: the readouts must tell it.
    inversion_time_ms
        For a train that the readouts tell; ``None``: no inversion.
    overridden
        Whether the train comes from the property.
    pulseq
        The sequence file, if it is one of Pulseq.
    trajectories
        ``None``: they are attached to the readouts.
    by_timepoint
        Whether timepoints number `trajectories`, else arms.
    replaces
        Whether `trajectories` count more than what is attached.
    warnings
        Contradictions that were settled.
    """

    header: Header
    train: Train | None
    inversion_time_ms: float | None
    overridden: bool = False
    pulseq: PulseqSequence | None = None
    trajectories: Trajectories | None = None
    by_timepoint: bool = False
    replaces: bool = False
    warnings: tuple[str, ...] = ()

    def with_first(self, readout: Readout) -> Sources:
        """The same after the first imaging readout: what it carries counts, unless it is to be replaced."""
        attached = readout.trajectory.shape[1] > 0 and not readout.placed
        if self.trajectories is None or self.replaces or not attached:
            return self
        return replace(self, trajectories=None, by_timepoint=False)

    def numberings(self) -> tuple[Numbering, ...]:
        """What a counter of timepoints may stand for."""
        if self.pulseq is None:
            return (Numbering(),)
        adc, of_slice = self.pulseq.adc, self.pulseq.slice_of_adc
        imaging = adc[(adc >= 0) & (of_slice == of_slice[adc >= 0][0])]
        plain = Numbering() if self.pulseq.measured.all() else Numbering(imaging, "readouts of a slice")
        return plain, Numbering(adc, "ADCs of the sequence")

    def prepared(
        self, readouts: Iterable[Readout], settings: Settings, tally: Tally, counter: ScanCounter
    ) -> Iterator[Readout]:
        """Noise and imaging readouts that are whole and have a place, those of `by_timepoint` but for it."""
        readouts = watched(readouts, counter)
        if settings.adc_segments == "join" or (
            settings.adc_segments == "auto" and settings.timepoint != "arrival"
        ):
            readouts = join_segments(readouts, self.header.n_segments_announced)
        if self.pulseq is not None and (n_noise := int(np.argmax(self.pulseq.adc >= 0))):
            readouts = mark_prescan(readouts, n_noise)
        if self.trajectories is not None and not self.by_timepoint:
            readouts = Placed(self.trajectories, replaces=self.replaces)(readouts)
        encoding = self.header.encoding if self.header.n_encodings > 1 else None
        return usable(readouts, tally, attached=not self.by_timepoint, encoding=encoding)


def gather(header_xml: bytes, settings: Settings) -> Sources:
    """Read what is known before the data: header, sequence and trajectory.

    Raises
    ------
    ScanError
        If one of them cannot be read, or they do not go together.
    """
    header = read_header(header_xml)
    inversion = resolve.inversion_time(header, settings.inversion_time_ms)
    warnings: list[str] = []
    pulseq: PulseqSequence | None = None
    overridden = bool(settings.sequence)
    if settings.sequence.lower().endswith(".seq"):
        told = settings.inversion_time_ms
        pulseq = read_pulseq(settings.sequence, told if told >= 0 else None)
        train: Train | None = pulseq.train
        warnings += [*pulseq.warnings, *_against_header(pulseq, header)]
    elif settings.sequence:
        train = resolve.train_from_csv(settings.sequence, inversion)
    else:
        train = resolve.train_from_header(header, inversion)
        user = resolve.train_from_user_parameters(header, inversion)
        if train is not None and user is not None:
            resolve.check_same(train, user)
        train = train or user
    if train is not None and settings.inversion_time_ms >= 0 and header.ti_ms:
        own, other = settings.inversion_time_ms, header.ti_ms[0]
        if abs(own - other) > _SAME * max(own, other):
            warnings.append(
                f"property inversion_time_ms is {own:g} ms, TI of the header is {other:g} ms: "
                f"the property counts"
            )
    sources = Sources(header, train, inversion, overridden, pulseq, warnings=tuple(warnings))
    trajectories = _trajectories(header_xml, sources, settings)
    if trajectories is None:
        return sources
    by_timepoint = _is_by_timepoint(trajectories, sources, settings)
    return replace(
        sources, trajectories=trajectories, by_timepoint=by_timepoint, replaces=bool(settings.trajectory)
    )


def _against_header(pulseq: PulseqSequence, header: Header) -> Iterator[str]:
    if pulseq.fov_mm is not None:
        for name, own, other in zip("xy", pulseq.fov_mm, header.encoded.fov_mm[:2], strict=True):
            if abs(own - other) > _SAME * other:
                yield (
                    f"the field of view in {name} is {own:g} mm in the Pulseq file and {other:g} mm in the "
                    f"header: that of the header counts"
                )
    if pulseq.n_slices > 1 and header.n_slices_announced == 1:
        yield (
            f"the Pulseq file has {pulseq.n_slices} slices, the header announces 1: slices are told by "
            f"idx.slice of the readouts, and those of one number are taken for repetitions"
        )
    own_ti, told = pulseq.train.inversion_time_ms or 0.0, (header.ti_ms or (0.0,))[0]
    if told and abs(own_ti - told) > _SAME * max(own_ti, told):
        yield (
            f"the inversion time is {own_ti:g} ms in the Pulseq file and {told:g} ms in the header: "
            f"that of the file counts"
        )


def _trajectories(header_xml: bytes, sources: Sources, settings: Settings) -> Trajectories | None:
    """Of property trajectory, else of the sequence or the header."""
    pulseq = sources.pulseq
    if settings.trajectory.lower().endswith(".seq"):
        if pulseq is None or settings.trajectory != settings.sequence:
            pulseq = read_pulseq(settings.trajectory)
        return pulseq.trajectories
    if settings.trajectory:
        found = read_trajectories(settings.trajectory)
    elif pulseq is not None:
        return pulseq.trajectories
    else:
        parameters = trajectories_from_header(header_xml, settings.rotation_deg)
        if parameters is None:
            return None
        found = parameters
    if len(found) > 1:
        return found
    # One interleaf stands for all.
    n = sources.header.n_arms_announced
    if settings.trajectory_by == "timepoint":
        n = sources.train.n_timepoints if sources.train else sources.header.n_timepoints_announced
    if n < 2:
        raise ScanError(
            f"{found.source} has one interleaf, and how many rotations of it there are is not known: "
            f"expected the limit kspace_encoding_step_1 in the header. Set property trajectory to a file "
            f"that has all"
        )
    return replace(found, points=rotated(found.points[0], n, settings.rotation_deg))


def _is_by_timepoint(found: Trajectories, sources: Sources, settings: Settings) -> bool:
    if settings.trajectory_by != "auto":
        return settings.trajectory_by == "timepoint"
    if found.by != "auto":
        return found.by == "timepoint"
    T = sources.train.n_timepoints if sources.train else sources.header.n_timepoints_announced
    return len(found) == T != sources.header.n_arms_announced


@dataclass(frozen=True, slots=True, eq=False)
class Protocol:
    """What was scanned.

    Parameters
    ----------
    header
        The MRD header.
    train
        What was played and measured.
    resolved
        How its timepoints are numbered.
    n_measured
        Timepoints of a whole slice.
    repetition
        Counters that number repetitions of the scan.
    receiver_deg
        `(T,)` phase of the receiver relative to the RF phase, but for a constant; ``None``: it follows it.
    trajectories
        ``None``: they are attached to the readouts.
    by_timepoint
        Whether timepoints number `trajectories`.
    items
        Everything with its source.
    warnings
        Contradictions that were settled, with both values.
    """

    header: Header
    train: Train
    resolved: Resolved
    n_measured: int
    repetition: tuple[str, ...]
    receiver_deg: NDArray[np.float64] | None
    trajectories: Trajectories | None
    by_timepoint: bool
    items: tuple[Item, ...]
    warnings: tuple[str, ...]

    @property
    def counter(self) -> str:
        """Name of the timepoint counter."""
        return self.resolved.counter

    @property
    def units(self) -> str:
        """Of the trajectory, if its source says it; else ``auto``."""
        return self.trajectories.units if self.trajectories is not None else "auto"

    def tag(self, head: np.void) -> tuple[int, ...]:
        """What tells the repetition of a readout, as far as a counter does."""
        return tuple(int(head["idx"][name]) for name in self.repetition)


def settle(sources: Sources, heads: NDArray[np.void], settings: Settings) -> Protocol:
    """The protocol of a scan, from what was known and the heads of one complete slice.

    Parameters
    ----------
    heads
        `(R,)` acquisition headers of the slice, of all its repetitions so far.

    Raises
    ------
    ScanError
        If train or timepoints cannot be told, or sources contradict each other.
    """
    if (
        settings.timepoint == "arrival"
        and settings.adc_segments == "auto"
        and np.ptp(heads["idx"]["segment"])
    ):
        raise ScanError(
            f"timepoint=arrival, and idx.segment goes from {heads['idx']['segment'].min()} to "
            f"{heads['idx']['segment'].max()}: whether these are parts of one ADC or timepoints cannot be "
            f"told. Set property adc_segments to join or off"
        )
    resolved = resolve.resolve_train(
        sources.train,
        sources.overridden,
        heads,
        settings.timepoint,
        sources.inversion_time_ms,
        min(resolve.COVERAGE, settings.min_readouts),
        n_measured=settings.timepoints,
        announced=sources.header.n_timepoints_announced,
        numberings=sources.numberings(),
    )
    train, pulseq = resolved.train, sources.pulseq
    resolve.check_room(train, heads)
    T = train.n_timepoints
    n_measured, receiver = T, None
    if pulseq is not None:
        n_measured = int(pulseq.measured[:T].sum())
        if np.any(pulseq.receiver_deg[:T]):
            receiver = pulseq.receiver_deg[:T]
    repetition = _repetition_counters(resolved, heads, n_measured)
    warnings = (*sources.warnings, *resolved.warnings)
    items = tuple(_items(sources, resolved, n_measured, settings))
    return Protocol(
        sources.header,
        train,
        resolved,
        n_measured,
        repetition,
        receiver,
        sources.trajectories,
        sources.by_timepoint,
        items,
        warnings,
    )


def _repetition_counters(resolved: Resolved, heads: NDArray[np.void], n_measured: int) -> tuple[str, ...]:
    """Counters that stand still during a train, so that they may tell repetitions apart.

    Each of their values holds most of a train; but for the last, which may still be arriving: where it
    begins, timepoints go back. A few damaged readouts count for nothing.
    """
    if resolved.counter == "arrival":
        return ()
    t = resolved.timepoints(heads)
    few = max(1, int(_DAMAGED * len(heads)))

    def stands_still(values: NDArray[np.int64]) -> bool:
        there, counts = np.unique(values, return_counts=True)
        start = int(np.argmax(values == values[-1]))
        goes_back = start > 0 and t[start] <= t[start - 1]
        for value, count in zip(there.tolist(), counts.tolist(), strict=True):
            arriving = goes_back and value == values[-1]
            share = len(np.unique(t[values == value])) / n_measured
            if count > few and share < _MOST and not arriving:
                return False
        return bool(counts.max() > few)

    names = (name for name in REPETITIONS if name != resolved.counter)
    return tuple(name for name in names if stands_still(heads["idx"][name].astype(np.int64)))


def _items(sources: Sources, resolved: Resolved, n_measured: int, settings: Settings) -> Iterator[Item]:
    header, train, pulseq = sources.header, resolved.train, sources.pulseq

    def mm(values: Iterable[float]) -> str:
        return " × ".join(f"{value:g}" for value in values) + " mm"

    def of_property(name: str, otherwise: str) -> str:
        return f"property {name}" if getattr(settings, name) != getattr(Settings(), name) else otherwise

    yield Item("encoded matrix", " × ".join(map(str, header.encoded.matrix[:2])), "header encodedSpace")
    yield Item("encoded field of view", mm(header.encoded.fov_mm[:2]), "header encodedSpace")
    yield Item("matrix", " × ".join(map(str, header.recon.matrix[:2])), "header reconSpace")
    yield Item("field of view", mm(header.recon.fov_mm), "header reconSpace")
    T = train.n_timepoints
    measured = "" if n_measured == T else f", {n_measured} of them measured"
    yield Item("timepoints", f"{T}{measured}", of_property("timepoints", train.source))
    for name, values, unit in (
        ("flip angle", train.flip_deg, "deg"),
        ("TR", train.tr_ms, "ms"),
        ("TE", train.te_ms, "ms"),
    ):
        yield Item(name, _span(values, unit), train.source)
    phase = train.source
    if not train.phase_known:
        phase = "not told: taken as constant"
    elif sources.train is not None and not sources.train.phase_known:
        phase = "user_int of the readouts"
    yield Item("RF phase", _span(train.phase_deg, "deg"), phase)
    if settings.inversion_time_ms >= 0:
        where = "property inversion_time_ms"
    elif pulseq is not None:
        where = train.source
    else:
        where = "header TI" if header.ti_ms else "not told"
        if not header.ti_ms and "inversion_time_ms" in header.user:
            where = "user parameters of the header"
    ti = train.inversion_time_ms
    yield Item("inversion", "none" if ti is None else f"{ti:g} ms before the first pulse", where)
    if ti is not None:
        yield Item(
            "inversion efficiency",
            f"{settings.inversion_efficiency:g}",
            of_property("inversion_efficiency", "default: ideal"),
        )
    if pulseq is not None and np.any(pulseq.receiver_deg):
        yield Item("receiver phase", "does not follow the RF phase: corrected", train.source)
    numbered = f" (numbers {resolved.numbering.what})" if resolved.numbering.what else ""
    yield Item("timepoint counter", resolved.counter + numbered, of_property("timepoint", "first that fits"))
    if sources.trajectories is None:
        yield Item("trajectory", "of each readout", "attached to the readouts")
    else:
        by = "timepoint" if sources.by_timepoint else "kspace_encode_step_1"
        table = sources.trajectories
        yield Item(
            "trajectory",
            f"{len(table.points)} interleaves of {table.points.shape[1]} samples, by {by}",
            table.source,
        )


def _span(values: NDArray[np.float64], unit: str) -> str:
    low, high = (round(float(value), 4) + 0.0 for value in (values.min(), values.max()))
    return f"{low:g} {unit}" if low == high else f"{low:g} to {high:g} {unit}"
