"""From what a scan says about itself to its train and its timepoints.

Several places can carry the same thing; the order in which they are asked is fixed, and two that
contradict each other stop the scan: wrong maps are worse than none.

Letters: T timepoints, R readouts.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import ScanError
from whorl.scan.header import Header
from whorl.scan.train import Train

#: Counters that may number the timepoints, in the order in which they are tried.
COUNTERS = ("user_int", "repetition", "contrast", "set")
#: Share of the timepoints that a counter must reach to be taken for the timepoint counter.
COVERAGE = 0.9
#: Timepoints of the shortest train of which it is told that it was repeated.
_SHORTEST_REPEATED = 16
#: Share of a slice's readouts, or one of them, whose counters may be damaged.
_DAMAGED = 0.01
#: Between two samples of a receiver lies less.
_LONGEST_DWELL_US = 100.0


def inversion_time(header: Header, inversion_time_ms: float) -> float | None:
    """Inversion delay in ms: the property if it is not negative (0: none), else ``TI[0]`` of the header, else
    its user parameter inversion_time_ms."""
    value = inversion_time_ms if inversion_time_ms >= 0 else (header.ti_ms or (0.0,))[0]
    if inversion_time_ms < 0 and not header.ti_ms and "inversion_time_ms" in header.user:
        value = _numbers(header.user["inversion_time_ms"], "inversion_time_ms")[0]
    if not np.isfinite(value):
        raise ScanError(f"the inversion time TI of the MRD header is {value}: expected a number")
    return value if value > 0 else None


def train_from_csv(path: str, inversion_time_ms: float | None) -> Train:
    """Read a train from a CSV file with the columns ``flip_deg,tr_ms,te_ms`` (``phase_deg`` optional).

    Raises
    ------
    ScanError
        If the file is missing, or a column or value is not readable.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScanError(f"the sequence file {path} cannot be read: {error}") from error
    missing = {"flip_deg", "tr_ms", "te_ms"} - set(names)
    if missing:
        raise ScanError(
            f"the sequence file {path} lacks {', '.join(sorted(missing))}: expected flip_deg,tr_ms,te_ms"
        )
    if not rows:
        raise ScanError(f"the sequence file {path} has no timepoints: expected one line for each")

    def column(name: str) -> NDArray[np.float64]:
        values = []
        for line, row in enumerate(rows, start=2):
            try:
                values.append(float(row[name] or ""))
            except ValueError as error:  # noqa: PERF203 - the line is part of the message
                raise ScanError(
                    f"the sequence file {path}: {name} in line {line} is {row[name]!r}: expected a number"
                ) from error
        return np.array(values)

    phase_known = "phase_deg" in names
    try:
        return Train(
            flip_deg=column("flip_deg"),
            tr_ms=column("tr_ms"),
            te_ms=column("te_ms"),
            phase_deg=column("phase_deg") if phase_known else np.zeros(len(rows)),
            inversion_time_ms=inversion_time_ms,
            source=f"file {path}",
            phase_known=phase_known,
        )
    except ScanError:
        raise
    except ValueError as error:
        raise ScanError(f"the sequence file {path}: {error}") from error


def train_from_header(header: Header, inversion_time_ms: float | None) -> Train | None:
    """The train in the header's lists, or ``None`` if they are only protocol values.

    A list has T entries, or one that holds for all; T is the longest list. Lists that are
    shorter than the number of timepoints announced in the encoding limits are no train.
    """
    lists = {"flip_deg": header.flip_deg, "tr_ms": header.tr_ms, "te_ms": header.te_ms}
    T = max(len(values) for values in lists.values())
    if (
        T < 2
        or any(len(values) not in (1, T) for values in lists.values())
        or header.n_timepoints_announced > T
    ):
        return None
    columns = {name: np.broadcast_to(np.array(values), T).copy() for name, values in lists.items()}
    try:
        return Train(
            **columns,
            phase_deg=np.zeros(T),
            inversion_time_ms=inversion_time_ms,
            source="header lists",
            phase_known=False,
        )
    except ValueError as error:
        raise ScanError(f"the train in the MRD header: {error}") from error


def _numbers(text: str, name: str) -> list[float]:
    """The numbers of a user parameter, with spaces or commas between them."""
    try:
        numbers = [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ScanError(
            f"user parameter {name} of the MRD header is {text[:60]!r}: expected numbers"
        ) from error
    if not numbers:
        raise ScanError(f"user parameter {name} of the MRD header is empty: expected numbers")
    return numbers


def train_from_user_parameters(header: Header, inversion_time_ms: float | None) -> Train | None:
    """The train in the header's user parameters flip_deg, tr_ms, te_ms (and phase_deg), ``None`` if there is
    none: texts with one number for each timepoint, or one for all.

    Raises
    ------
    ScanError
        If they cannot be read, or their lengths differ.
    """
    names = ("flip_deg", "tr_ms", "te_ms")
    if any(name not in header.user for name in names):
        return None
    told = {name: _numbers(header.user[name], name) for name in (*names, "phase_deg") if name in header.user}
    T = max(len(values) for values in told.values())
    if wrong := {name: len(values) for name, values in told.items() if len(values) not in (1, T)}:
        raise ScanError(
            f"user parameters of the MRD header have {T} timepoints, but "
            f"{', '.join(f'{name} has {n}' for name, n in wrong.items())}: expected one number for each, "
            f"or one for all"
        )
    if T < 2:  # values of a protocol
        return None
    columns = {name: np.broadcast_to(np.array(values), T).copy() for name, values in told.items()}
    phase = columns.pop("phase_deg", None)
    try:
        return Train(
            **columns,
            phase_deg=np.zeros(T) if phase is None else phase,
            inversion_time_ms=inversion_time_ms,
            source="user parameters of the header",
            phase_known=phase is not None,
        )
    except ValueError as error:
        raise ScanError(f"the train in the user parameters of the MRD header: {error}") from error


def check_same(first: Train, second: Train) -> None:
    """Compare two trains.

    Raises
    ------
    ScanError
        If they differ, with both values.
    """
    if first.n_timepoints != second.n_timepoints:
        raise ScanError(
            f"two sources disagree on the length of the train: {first.source} have {first.n_timepoints} "
            f"timepoints, {second.source} have {second.n_timepoints}. "
            f"Set property sequence to the train that was played"
        )
    for name, tolerance in (("flip_deg", 0.02), ("tr_ms", 0.01), ("te_ms", 0.01)):
        mine, its = getattr(first, name), getattr(second, name)
        if (wrong := np.abs(mine - its) > tolerance).any():
            t = int(wrong.argmax())
            raise ScanError(
                f"two sources disagree on {name} of timepoint {t}: {first.source} say {mine[t]:g}, "
                f"{second.source} say {its[t]:g}. Set property sequence to the train that was played"
            )


def _has_user_train(heads: NDArray[np.void]) -> bool:
    return bool(heads["user_int"][:, [2, 3, 5]].any())


def train_from_readouts(
    heads: NDArray[np.void], timepoint: NDArray[np.int64], T: int, ti: float | None
) -> Train:
    """The train in ``user_int`` of one slice's readouts.

    Timepoints whose readout is missing are interpolated linearly between their neighbours.

    Parameters
    ----------
    heads
        `(R,)` acquisition headers.
    timepoint
        `(R,)` timepoint of each.
    """
    present, first = np.unique(timepoint, return_index=True)
    user = heads["user_int"][first].astype(np.float64)

    def column(index: int, scale: float) -> NDArray[np.float64]:
        return np.interp(np.arange(T), present, user[:, index] / scale)

    source = "user_int of the readouts"
    if len(present) < T:
        source += f", {T - len(present)} missing timepoints interpolated"
    try:
        return Train(column(5, 100), column(2, 1000), column(3, 1000), column(6, 100), ti, source)
    except ValueError as error:
        raise ScanError(f"the train in user_int of the readouts: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """What the values of a timepoint counter stand for.

    Parameters
    ----------
    timepoint
        `(A,)` timepoint of each value, -1 where the value stands for none; ``None``: the value itself.
    what
        What is numbered, for the operator; empty where it is the timepoints.
    """

    timepoint: NDArray[np.int64] | None = None
    what: str = ""

    def first(self, n: int) -> Numbering:
        """Without timepoints from n on."""
        t = self.timepoint
        return self if t is None else replace(self, timepoint=np.where(t < n, t, -1))

    def length(self, T: int) -> int:
        """Values that are possible."""
        return T if self.timepoint is None else len(self.timepoint)

    def expected(self, T: int) -> int:
        """Values that a whole slice has."""
        return T if self.timepoint is None else len(np.unique(self.timepoint[self.timepoint >= 0]))

    def timepoints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Timepoints of values, -1 where there is none."""
        if self.timepoint is None:
            return values
        inside = (values >= 0) & (values < len(self.timepoint))
        return np.where(inside, self.timepoint[np.where(inside, values, 0)], -1)


_PLAIN = Numbering()


def _values(heads: NDArray[np.void], counter: str) -> NDArray[np.int64]:
    raw = heads["user_int"][:, 0] if counter == "user_int" else heads["idx"][counter]
    return raw.astype(np.int64)


def timepoints(heads: NDArray[np.void], counter: str) -> NDArray[np.int64]:
    """Timepoint `(R,)` of each readout by a counter's name; ``arrival`` numbers them."""
    return np.arange(len(heads)) if counter == "arrival" else _values(heads, counter)


def find_counter(
    heads: NDArray[np.void],
    T: int | None,
    choice: str,
    coverage: float = COVERAGE,
    numbering: Numbering = _PLAIN,
) -> str:
    """Name of the counter that numbers the timepoints of one slice, by what its values stand for.

    It is the first of `COUNTERS` whose values lie in [0, T) and cover at least the share `coverage`
    of it. Where T is not known (``None``), it is the first that tells nearly all readouts apart. If there
    is none, it is the first that does so but for a few damaged readouts.

    Raises
    ------
    ScanError
        If there is none, or the one that was asked for does not fit.
    """
    if choice == "arrival":
        expected = len(heads) if T is None else numbering.expected(T)
        # A whole multiple is a scan that was repeated.
        if not expected or len(heads) % expected:
            raise ScanError(
                f"timepoint=arrival needs exactly one readout for each of {expected} timepoints, "
                f"got {len(heads)}"
            )
        return choice
    tried = COUNTERS if choice == "auto" else (choice,)
    for n_damaged in (0, max(1, int(_DAMAGED * len(heads)))):
        for counter in tried:
            values = _values(heads, counter)
            if T is None:
                fits = train_length(values, None, coverage, n_damaged)
            else:
                length, expected = numbering.length(T), numbering.expected(T)
                fits = train_length(values, length, coverage, n_damaged, expected)
            if fits:
                return counter
    seen = []
    for counter in tried:
        values = _values(heads, counter)
        seen.append(f"{counter} has {len(np.unique(values))} values from {values.min()} to {values.max()}")
    wanted = (
        f"at least {coverage:.0%} of [0, {numbering.length(T)}), the length of the train,"
        if T is not None
        else "each readout of the slice"
    )
    raise ScanError(
        f"no counter numbers the timepoints: expected one that covers {wanted} and no more; "
        f"of {len(heads)} readouts "
        f"{'; '.join(seen)}. Set property timepoint or sequence, or timepoints if only a part of the train "
        f"was measured"
    )


def train_length(
    values: NDArray[np.int64],
    T: int | None,
    coverage: float = COVERAGE,
    n_damaged: int | None = None,
    expected: int | None = None,
) -> int:
    """Length of the train that a counter's values number; 0 if they do not.

    Parameters
    ----------
    values
        `(R,)` values of one slice.
    T
        The length if it is known.
    coverage
        Share of the timepoints that must be there.
    n_damaged
        Values that may lie outside; ``None``: as many as may be damaged.
    expected
        Values that a whole slice has; ``None``: all.
    """
    n_damaged = max(1, int(_DAMAGED * len(values))) if n_damaged is None else n_damaged
    there = np.unique(values)
    for n in range(n_damaged + 1):
        inside = there[there >= 0]
        if T is None:
            inside = inside[: max(len(inside) - n, 0)]
        length = T if T is not None else int(inside.max(initial=-1)) + 1
        inside = inside[inside < length]
        outside = values[(values < 0) | (values >= length)]
        enough = coverage * ((expected or length) if T is not None else max(length, len(values), 2))
        # Values that go on beyond an end are not damaged: they number another train.
        goes_on = length in outside or -1 in outside
        if length and len(inside) >= enough and len(outside) <= n_damaged and not goes_on:
            return length
    return 0


def disagreement(train: Train, heads: NDArray[np.void], timepoint: NDArray[np.int64]) -> str:
    """Where a train and ``user_int`` of the readouts contradict each other, with both values; else empty."""
    if not _has_user_train(heads):
        return ""
    inside = timepoint < train.n_timepoints  # what lies outside is dropped
    inside &= timepoint >= 0
    heads, timepoint = heads[inside], timepoint[inside]
    for name, index, scale, tolerance in (
        ("flip_deg", 5, 100, 0.02),
        ("tr_ms", 2, 1000, 0.01),
        ("te_ms", 3, 1000, 0.01),
    ):
        told = heads["user_int"][:, index] / scale
        known = getattr(train, name)[timepoint]
        wrong = np.flatnonzero(np.abs(told - known) > tolerance)
        if len(wrong):
            r = wrong[0]
            return (
                f"two sources disagree on {name} of timepoint {timepoint[r]}: {train.source} say "
                f"{known[r]:g}, user_int of the readout says {told[r]:g}; "
                f"{len(wrong)} of {len(heads)} readouts differ"
            )
    return ""


def check_agreement(train: Train, heads: NDArray[np.void], timepoint: NDArray[np.int64]) -> None:
    """Compare a train with ``user_int`` of the readouts.

    Raises
    ------
    ScanError
        If both are there and disagree, with both values.
    """
    if why := disagreement(train, heads, timepoint):
        raise ScanError(f"{why}. Set property sequence to the train that was played")


def check_room(train: Train, heads: NDArray[np.void]) -> None:
    """Check that a readout fits into TR, as it does not if TR is in seconds.

    Medians of both, because some pulses may have no readout, and a few headers may be damaged. A dwell time
    that no receiver has (0, 100 µs and more) is not known.

    Parameters
    ----------
    heads
        `(R,)` headers of imaging readouts.

    Raises
    ------
    ScanError
        If it does not, with both values.
    """
    dwell_us = float(np.median(heads["sample_time_us"]))
    readout_ms = dwell_us * float(np.median(heads["number_of_samples"])) / 1e3
    tr_ms = float(np.median(train.tr_ms))
    if 0 < dwell_us < _LONGEST_DWELL_US and readout_ms > tr_ms:
        raise ScanError(
            f"TR is {tr_ms:g} ms ({train.source}), a readout takes {readout_ms:g} ms: expected TR and TE in "
            f"ms, with room for it. Set property sequence to the train that was played"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """A train, and how its timepoints are numbered.

    Parameters
    ----------
    train
        What was played and measured.
    counter
        Name of the timepoint counter.
    numbering
        What its values stand for.
    warnings
        Contradictions that a property settled.
    """

    train: Train
    counter: str
    numbering: Numbering = _PLAIN
    warnings: tuple[str, ...] = ()

    def timepoints(self, heads: NDArray[np.void]) -> NDArray[np.int64]:
        """Timepoint `(R,)` of each readout, outside [0, T) where it has none."""
        return self.numbering.timepoints(timepoints(heads, self.counter))


def resolve_train(
    early: Train | None,
    overridden: bool,
    heads: NDArray[np.void],
    choice: str,
    ti: float | None,
    coverage: float = COVERAGE,
    *,
    n_measured: int = 0,
    announced: int = 1,
    numberings: Sequence[Numbering] = (_PLAIN,),
) -> Resolved:
    """Train and timepoint counter of a scan from one complete slice.

    Parameters
    ----------
    early
        Train of the property or the header, if there is one.
    overridden
        Whether `early` comes from the property, which counts more than user_int of the readouts.
    heads
        `(R,)` acquisition headers of the slice.
    choice
        Property ``timepoint``.
    ti
        Inversion time in ms or ``None``.
    coverage
        Share of the timepoints that the slice must have.
    n_measured
        Property ``timepoints``: pulses at the start of the train that are used; 0: all.
    announced
        Timepoints that the header announces: if `early` is longer and does not fit, so many are tried.
    numberings
        What values of a counter may stand for, for `early`; the first that fits is taken.

    Raises
    ------
    ScanError
        If there is no train, no counter, or sources contradict each other.
    """
    has_user = _has_user_train(heads)
    if early is not None and n_measured > early.n_timepoints:
        raise ScanError(
            f"timepoints is {n_measured}: expected at most {early.n_timepoints}, the length of the train "
            f"({early.source})"
        )
    if choice == "arrival" and n_measured and len(heads) != n_measured:
        # More may be a longer train or repetitions, and nothing tells which.
        raise ScanError(
            f"timepoint=arrival with timepoints={n_measured} needs exactly {n_measured} readouts of a slice, "
            f"got {len(heads)}"
        )
    if early is not None and not overridden:
        # Header lists that are shorter than what was played are protocol values and not a train.
        try:
            _fitting(early, heads, choice, coverage, announced, numberings, n_measured)
        except ScanError as error:
            try:
                counter = find_counter(heads, None, choice, coverage)
            except ScanError:
                raise error from None
            T = len(np.unique(timepoints(heads, counter)))
            # Order of arrival counts whatever comes: a list that nearly fits is the train.
            if T * (COVERAGE if counter == "arrival" else 1) > early.n_timepoints:
                early = None
    if early is not None:
        found = _fitting(early, heads, choice, coverage, announced, numberings, n_measured)
        early, t, warnings = found.train, found.timepoints(heads), []
        if choice == "arrival":
            t = found.numbering.timepoints(t % found.numbering.expected(early.n_timepoints))
        if not overridden:
            check_agreement(early, heads, t)
        elif why := disagreement(early, heads, t):
            warnings.append(f"{why}: property sequence counts")
        if has_user and not early.phase_known and heads["user_int"][:, 6].any():
            inside = (t >= 0) & (t < early.n_timepoints)
            played = train_from_readouts(heads[inside], t[inside], early.n_timepoints, ti)
            early = replace(early, phase_deg=played.phase_deg, phase_known=True)
        return replace(found, train=early, warnings=tuple(warnings))
    if not has_user:
        raise ScanError(
            "no fingerprint train: the MRD header has no lists of flip angle, TR and TE with one entry for "
            "each timepoint, and user_int of the readouts is empty. "
            "Set property sequence to a CSV file flip_deg,tr_ms,te_ms or to the Pulseq file"
        )
    counter, T = _repeated_train(heads, choice)
    if not counter:
        counter = find_counter(heads, None, choice, coverage)
        # Those that arrival numbers are as many as there are.
        t = timepoints(heads, counter)
        T = train_length(t, None, coverage) or len(t)
    T = min(T, n_measured or T)
    t = timepoints(heads, counter)
    inside = (t >= 0) & (t < T)
    return Resolved(train_from_readouts(heads[inside], t[inside], T, ti), counter)


def _repeated_train(heads: NDArray[np.void], choice: str) -> tuple[str, int]:
    """Counter and length of a train in ``user_int`` that was played several times; ("", 0) if it was not.

    A counter of something else, as of arms, has other flip angles each time it comes round.
    """
    played = heads["user_int"][:, [2, 3, 5]]
    few = max(1, int(_DAMAGED * len(heads)))
    for counter in COUNTERS if choice == "auto" else (choice,):
        if counter not in COUNTERS:
            continue
        values = _values(heads, counter)
        there, first, back, counts = np.unique(
            values, return_index=True, return_inverse=True, return_counts=True
        )
        T, often = len(there), int(np.median(counts))
        whole = T >= _SHORTEST_REPEATED and often >= 2 and there[0] == 0 and there[-1] == T - 1
        if whole and np.count_nonzero((played != played[first][back]).any(axis=1)) <= few:
            return counter, T
    return "", 0


def _fitting(
    early: Train,
    heads: NDArray[np.void],
    choice: str,
    coverage: float,
    announced: int,
    numberings: Sequence[Numbering],
    n_measured: int = 0,
) -> Resolved:
    """The first numbering of a train that a counter fits; at last that of its announced beginning.

    With `n_measured` only the beginning is used, whether more was measured or not.
    """
    n_used = min(n_measured or early.n_timepoints, early.n_timepoints)
    trials = [(early, numbering) for numbering in numberings]
    if n_used < early.n_timepoints:
        trials = [] if choice == "arrival" else trials
        trials += [(early.first(n_used), numbering.first(n_used)) for numbering in numberings]
    if 1 < announced < early.n_timepoints and choice != "arrival":
        trials.append((early.first(announced), _PLAIN))
    failure: ScanError | None = None
    for train, numbering in trials:
        try:
            counter = find_counter(heads, train.n_timepoints, choice, coverage, numbering)
        except ScanError as error:  # noqa: PERF203 - a few, once
            failure = failure or error
        else:
            used = train.first(n_used) if n_used < train.n_timepoints else train
            return Resolved(used, counter, numbering)
    assert failure is not None
    try:
        raise failure
    finally:
        del failure  # which knows this frame: both would stay until cycles are looked for
