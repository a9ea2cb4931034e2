"""What a scan contains, what would be done with it, and what is missing: for people and programs.

The scan is collected as in a reconstruction, and each slice is made by the low-rank method.

Letters: K coefficients, C coils, V virtual coils, I interleaves, S samples, T timepoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.slicebuffer import SliceBuffer
from whorl.physics.dictionary import Dictionary
from whorl.pipeline.collecting import Collector
from whorl.pipeline.dictionaries import dictionary_parameters, get_dictionary
from whorl.pipeline.encoding import Encoder, Encoding
from whorl.pipeline.folding import fold, shortcomings
from whorl.pipeline.losses import HARMLESS
from whorl.pipeline.parts import Part
from whorl.pipeline.protocol import Item, Protocol, gather
from whorl.pipeline.report import Report
from whorl.pipeline.scan import device_of
from whorl.pipeline.slices import reconstruct_slice
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.integrity import Tally
from whorl.scan.readout import Readout
from whorl.tools.pointspread import OrderCheck, check_order, spread, white_matter

#: Correlation of two coils, and SD of one relative to the median, from which on they are worth a word.
_CORRELATED, _NOISY = 0.5, 3.0
#: Share of a train's samples, at the edge of k-space, that show the noise where there are no noise readouts.
_EDGE = 0.9


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise of the receive coils.

    Parameters
    ----------
    n_readouts
        Noise readouts that can be used.
    largest_correlation
        Of two coils, magnitude, 0 to 1.
    relative_sd
        SD of each coil `(C,)` relative to their median.
    """

    n_readouts: int
    largest_correlation: float
    relative_sd: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SliceSummary:
    """One slice of one repetition.

    Parameters
    ----------
    name
        For people.
    n_readouts, n_expected
        Timepoints that came, and those of a whole slice.
    snr
        Median over the object of the first subspace image of x0 relative to its noise; ``None`` if there is
        no object. Without noise readouts the edge of k-space tells the noise, and this is a lower bound.
    object_share
        Share of the image that the object fills.
    status, notes
        Of its low-rank maps; see `whorl.pipeline.slices.SliceResult`.
    """

    name: str
    n_readouts: int
    n_expected: int
    snr: float | None
    object_share: float
    status: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FigureData:
    """What a picture of the trajectory is made of.

    Parameters
    ----------
    points
        `(I, S, 2)` in cycles per pixel.
    interleaf
        `(R,)` interleaf of each readout of a slice, in their order.
    spread
        `(Y, X)`: magnitude of the point-spread function of white matter, relative to its peak.
    """

    points: NDArray[np.float32]
    interleaf: NDArray[np.int64]
    spread: NDArray[np.float32]


@dataclass(slots=True)
class Inspection:
    """What was found; see the fields' names. `exit_code` is that of the reconstruction that would follow."""

    items: list[Item] = field(default_factory=list)
    would: list[str] = field(default_factory=list)
    slices: list[SliceSummary] = field(default_factory=list)
    noise: Noise | None = None
    order: OrderCheck | None = None
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    figure: FigureData | None = None

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong; 1: nothing can be reconstructed; 3: something is missing or doubtful."""
        if not self.slices:
            return 1
        doubtful = any(one.status != "complete" for one in self.slices)
        return 3 if self.missing or self.warnings or doubtful else 0

    def as_json(self) -> dict[str, Any]:
        """All of it but for the figure, as JSON has it."""
        return {
            "exit_code": self.exit_code,
            "found": [asdict(item) for item in self.items],
            "would": self.would,
            "slices": [asdict(one) for one in self.slices],
            "noise": asdict(self.noise) if self.noise else None,
            "order": asdict(self.order) if self.order else None,
            "warnings": self.warnings,
            "missing": self.missing,
            "remarks": self.remarks,
        }

    def text(self) -> str:
        """A page for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "Found"
        width = max((len(item.name) for item in self.items), default=0)
        values = max((len(item.value) for item in self.items if len(item.value) < 50), default=0)
        for item in self.items:
            yield f"  {item.name:<{width}}  {item.value:<{values}}  ({item.source})"
        if self.noise is not None:
            yield from ("", "Noise")
            sd = self.noise.relative_sd
            yield (
                f"  {self.noise.n_readouts} readouts of {len(sd)} coils, largest correlation of two "
                f"{self.noise.largest_correlation:.2f}, SD {min(sd):.2f} to {max(sd):.2f} of the median"
            )
        if self.order is not None:
            yield from ("", "Order of the interleaves")
            for line in self.order.lines():
                yield f"  {line}"
        if self.slices:
            yield from ("", "Slices")
            for one in self.slices:
                least = "" if self.noise is not None else "at least "
                snr = f"SNR {least}{one.snr:.0f}, object {one.object_share:.0%}" if one.snr else "no object"
                notes = f": {'; '.join(one.notes)}" if one.notes else ""
                came = f"{one.n_readouts} of {one.n_expected} readouts"
                yield f"  {one.name}: {came}, {snr}, {one.status}{notes}"
        for title, lines in (
            ("What would be done", self.would),
            ("Remarks", self.remarks),
            ("Warnings", self.warnings),
            ("Missing", self.missing),
        ):
            if lines:
                yield from ("", title)
                for line in lines:
                    yield f"  {line}"


class _Inspector:
    """Collects the scan and looks at each slice."""

    def __init__(self, header_xml: bytes, settings: Settings) -> None:
        self.found = Inspection()
        self.settings = settings
        self._device = torch.device("cpu")
        sources = gather(header_xml, settings)
        self.report = Report(self._said)
        self.tally = Tally()
        self.collector = Collector(
            sources,
            settings,
            self._device,
            self.tally,
            self.report,
            settled=self._settled,
            complete=self._complete,
            basis=lambda: self._dictionary.basis if self._dictionary else None,
        )
        self._encoder = Encoder(sources.header, settings, self._device, self._said)
        self._dictionary: Dictionary | None = None
        self._protocol: Protocol | None = None
        self._encoding_said = False

    def _said(self, level: str, text: str) -> None:
        if level == "WRN":
            self.found.warnings.append(text)
        elif level == "ERR":
            self.found.missing.append(text)
        elif text not in self.found.remarks:
            self.found.remarks.append(text)

    def _settled(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self.found.items = list(protocol.items)
        parameters = dictionary_parameters(protocol.train, self.settings)
        warn = self.found.warnings.append
        self._dictionary = get_dictionary(parameters, self.settings, warn, self._device)
        K = self._dictionary.basis.shape[1]
        self.found.would.append(
            f"fold {protocol.n_measured} readouts of each slice into {K} coefficients that keep "
            f"{self.settings.energy:.2%} of the signal energy of {len(self._dictionary.grid)} atoms"
        )

    def _complete(self, part: Part, buffer: SliceBuffer) -> None:
        assert self._protocol is not None
        assert self._dictionary is not None
        protocol, dictionary = self._protocol, self._dictionary
        summary = SliceSummary(str(part), len(part.seen), protocol.n_measured, None, 0.0, "failed", ())
        try:
            kspace, encoding = fold(
                buffer, dictionary.basis, self.collector.receiver, self._encoder, protocol.units
            )
            if self.found.order is None:
                n_virtual = kspace.bins.shape[2]
                self._look_at_order(kspace.gram, encoding, n_virtual, kspace.interleaves, buffer.order)
            lowrank = replace(self.settings, method="lowrank", b1="nominal")
            result = reconstruct_slice(kspace, encoding, dictionary, lowrank, None)
            for note in shortcomings(part, buffer.head, encoding, protocol, kspace, dictionary):
                result.remark("degraded", note)
            for note in self.report.of_each_slice:
                result.remark("degraded", note)
            snr, share = None, 0.0
            if result.inside is not None:
                mask = result.inside.mask
                share = float(mask.float().mean())
                noise = self._image_noise(kspace.bins, kspace.gram, encoding)
                signal = float(result.inside.images[0][mask].abs().median()) * result.inside.scale
                snr = signal / noise if noise > 0 else None
            summary = replace(
                summary, snr=snr, object_share=share, status=result.status, notes=tuple(result.notes)
            )
        except ScanError as error:
            self.found.missing.append(f"{part} failed: {error}")
            return
        self.found.slices.append(summary)

    def _image_noise(self, bins: Tensor, gram: Tensor, encoding: Encoding) -> float:
        """SD of the noise in the first subspace image of x0, in the unit of the data."""
        I = len(bins)  # noqa: E741 - the field's letter
        weights = (I * encoding.dcf).square().sum(1)  # (I,)
        if self.collector.whitening is not None:  # variance 1 in each sample of a virtual coil
            variance = 1.0
        else:
            # Beyond the signal, at the edge of k-space: of its samples in the first coefficient.
            radius = encoding.points.reshape(*encoding.dcf.shape, 2).norm(dim=-1)
            edge = radius > _EDGE * radius.max()
            power = bins[:, 0].abs().square().median(1).values[edge] / np.log(2)  # mean of an exponential
            energy = gram[:, 0, 0].real[:, None].expand_as(edge)[edge]
            variance = float((power / energy.clamp_min(1e-12)).median())
        return float((variance * (weights * gram[:, 0, 0].real).sum()).sqrt())

    def _look_at_order(
        self,
        gram: Tensor,
        encoding: Encoding,
        n_virtual: int,
        interleaves: NDArray[np.int64],
        order: list[int],
    ) -> None:
        assert self._dictionary is not None
        assert self._protocol is not None
        points = encoding.points.reshape(*encoding.dcf.shape, 2)
        self.found.order = check_order(
            gram, encoding.dcf, points, encoding.nufft, encoding.shape, self._dictionary
        )
        if self.found.order.biased:
            self.found.warnings.append(self.found.order.warning())
        self.found.items.append(
            Item("interleaves", f"{len(gram)} distinct, {encoding.dcf.shape[1]} samples", "readouts")
        )
        image = torch.linalg.vector_norm(
            spread(gram, encoding.dcf, encoding.nufft, white_matter(self._dictionary)), dim=0
        )
        places = {number: n for n, number in enumerate(interleaves.tolist())}
        self.found.figure = FigureData(
            points.numpy(),
            np.array([places[i] for i in order if i in places], dtype=np.int64),
            (image / image.max()).numpy(),
        )
        C = len(self.collector.whitening) if self.collector.whitening is not None else 0
        white = f"whitened by {self.collector.noise.n_readouts} noise readouts, " if C else "not whitened, "
        settings = self.settings
        self.found.would.append(
            f"coils: {white}compressed by {settings.compression} to {n_virtual}, maps by "
            f"{settings.coil_maps_file or settings.coil_maps}"
        )
        try:
            device, why = device_of(settings)
        except ScanError as error:
            self.found.missing.append(str(error))
        else:
            where = "the CPU" if device.type == "cpu" else "a GPU"
            self.found.would.append(f"reconstruct by {settings.method} on {where}{f': {why}' if why else ''}")
        self.found.would.append(
            "match to T1, T2, M0 and quality" + (", B1" if settings.b1 == "match" else "")
        )

    def look_at_noise(self, n_coils: int) -> None:
        """Correlation and size of the noise of the coils."""
        noise = self.collector.noise
        if not noise.n_usable(n_coils):
            return
        try:
            covariance = noise.covariance(n_coils).numpy()
        except ValueError:
            return
        sd = np.sqrt(np.clip(covariance.diagonal().real, 0, None))
        scale = np.outer(sd, sd)
        correlation = np.abs(covariance) / np.where(scale > 0, scale, 1)
        np.fill_diagonal(correlation, 0)
        relative = sd / (np.median(sd) or 1)
        self.found.noise = Noise(
            noise.n_usable(n_coils), float(correlation.max(initial=0)), tuple(map(float, relative))
        )
        if noisy := [str(c) for c in np.flatnonzero(relative > _NOISY)]:
            self.found.remarks.append(f"noisy coils (numbers from 0): {', '.join(noisy)}")
        if correlation.max(initial=0) > _CORRELATED:
            a, b = np.unravel_index(correlation.argmax(), correlation.shape)
            self.found.remarks.append(
                f"the noise of coils {a} and {b} is correlated by {correlation[a, b]:.2f}"
            )


def inspect(header_xml: bytes, readouts: Iterable[Readout], settings: Settings) -> Inspection:
    """Look at a scan as the reconstruction would; what is wrong with it is told in the result.

    Parameters
    ----------
    header_xml
        The MRD header document.
    readouts
        In order of arrival.
    settings
        See `whorl.config.Settings`.
    """
    try:
        inspector = _Inspector(header_xml, settings)
    except ScanError as error:
        return Inspection(missing=[str(error)])
    collector, found = inspector.collector, inspector.found
    n_coils, ended_early = 0, ""
    try:
        source = collector.sources.prepared(readouts, settings, inspector.tally, collector.scan_counter)
        try:
            for readout in source:
                n_coils = readout.data.shape[0]
                collector.add(readout)
        except EndOfStream as error:
            ended_early = f"the stream ended early: {error}"
        collector.finish(ended_early)
    except ScanError as error:
        found.missing.append(str(error))
    if ended_early and ended_early not in " ".join(found.missing):
        found.missing.append(ended_early)
    inspector.look_at_noise(n_coils)
    for reason in HARMLESS:
        if count := inspector.tally.pop(reason, 0):
            found.remarks.append(f"{count} readouts {reason}, which changes nothing")
    found.warnings.extend(inspector.tally.sentences())
    if sentence := collector.scan_counter.sentence():
        found.remarks.append(sentence)
    return found
