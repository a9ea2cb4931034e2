"""How fast readouts are received and files are read, beside the packages gadgetron and ismrmrd.

    python tests/bench_doors.py [--runs 7] [--toy]

A sender in a process of its own sends prebuilt bytes over TCP
(loopback) as fast as it can; it has one core, the receiver another. Medians of several runs after one that is
not counted; in that one all that is received is compared with what was sent. Rates are by the clock; those
by the receiver's own CPU time say what it can take where nothing else runs on its core and no sender is late.

Letters: T timepoints, K coefficients, C coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import torch
from gadgetron.external import Connection
from numpy.typing import NDArray

from benchmarks import TOY, heading, machine, row
from benchmarks import parser as plain_parser
from doors.messages import bytes_of
from doors.mutations import HEADER
from whorl.doors import wire
from whorl.doors.files import count_readouts, read_readouts
from whorl.doors.transport import Channel
from whorl.kspace.coils import compression_matrix
from whorl.kspace.slicebuffer import SliceBuffer, digest
from whorl.scan.readout import HEAD_DTYPE, Readout
from whorl.simulation.scan import simulate

K, V = 9, 8
BLOCK = 64


@dataclass(frozen=True)
class Size:
    """Of what is received: readouts, coils, samples and interleaves; and options of the scan in a file."""

    readouts: int = 1000
    coils: int = 20
    samples: int = 2000
    interleaves: int = 96
    file: dict[str, Any] = field(default_factory=dict)


SMALL = Size(130, 10, 100, 12, TOY)
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock and of CPU time."""

    clock_s: float
    cpu_s: float


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def taken(self) -> Taken:
        return Taken(time.perf_counter() - self._clock, time.process_time() - self._cpu)


#: From a connection: the time, and whether what was received is what was sent; only a run that checks looks
#: at every sample.
Receive = Callable[[socket.socket, bool], tuple[Taken, bool]]


@dataclass(frozen=True)
class Case:
    """One way to receive."""

    name: str
    receive: Receive
    opening: bytes = b""  # what it wants before the readouts


def make_scan(size: Size) -> list[Readout]:
    """Readouts of one slice, all different: (C, S), trajectories of I interleaves."""
    R, C, S, I = size.readouts, size.coils, size.samples, size.interleaves  # noqa: E741 - the field's letter
    rng = np.random.default_rng(0)
    trajectories = rng.uniform(-0.5, 0.5, (I, S, 2)).astype(np.float32)
    readouts = []
    for t in range(R):
        head = np.zeros(1, HEAD_DTYPE)[0]
        head["version"], head["scan_counter"] = 1, t
        head["active_channels"] = head["available_channels"] = C
        head["number_of_samples"], head["trajectory_dimensions"] = S, 2
        head["idx"]["repetition"], head["idx"]["kspace_encode_step_1"] = t, t % I
        data = rng.standard_normal((C, S, 2), np.float32).view(np.complex64)[..., 0]
        readouts.append(Readout(head, trajectories[t % I], data))
    return readouts


def acquisition(readout: Readout) -> bytes:
    """One readout as it is sent."""
    head = np.asarray(readout.head).tobytes()
    return (
        wire.ACQUISITION.to_bytes(2, "little") + head + readout.trajectory.tobytes() + readout.data.tobytes()
    )


def send(port: int, core: int | None, path: Path, openings: list[bytes]) -> None:
    """The sender's process: one connection after the other, in each an opening and what lies in `path`."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    data = path.read_bytes()
    for opening in openings:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(opening)
            connection.recv(1)  # the receiver is ready: its clock measures the stream alone
            connection.sendall(data)
            connection.recv(1)


def raw(stream: bytes) -> Receive:
    """Nothing but the bytes, into one buffer."""

    def receive(connection: socket.socket, check: bool) -> tuple[Taken, bool]:
        buffer = memoryview(bytearray(1 << 20))
        connection.sendall(b"x")
        watch, at, same = Stopwatch(), 0, True
        while at < len(stream) and (n := connection.recv_into(buffer)):
            if check:
                same = same and buffer[:n] == stream[at : at + n]
            at += n
        return watch.taken(), same and at == len(stream)

    return receive


def blocks(readouts: list[Readout]) -> Receive:
    """`read_message`, copied into a block `(64, C, S)` that is used again, as `SliceBuffer` does."""

    def receive(connection: socket.socket, check: bool) -> tuple[Taken, bool]:
        channel = Channel(connection, TIMEOUT_S)
        block = np.empty((BLOCK, *readouts[0].data.shape), np.complex64)
        connection.sendall(b"x")
        watch, n, same = Stopwatch(), 0, True
        while isinstance(message := wire.read_message(channel), Readout):
            block[n % BLOCK] = message.data
            if check:
                same = same and np.array_equal(block[n % BLOCK], readouts[n].data)
                same = same and np.array_equal(message.trajectory, readouts[n].trajectory)
            n += 1
        return watch.taken(), same and n == len(readouts)

    return receive


def folded(readouts: list[Readout]) -> Receive:
    """`SliceBuffer` with compression to virtual coils and folding into the subspace, as in the pipeline."""
    generator = torch.Generator().manual_seed(0)
    # (T, K), real as for most trains
    basis = torch.linalg.qr(torch.randn((len(readouts), K), generator=generator)).Q

    def strongest(block: torch.Tensor, _: object) -> tuple[torch.Tensor, str]:
        return compression_matrix(block, V), ""

    def take(following: Callable[[], wire.Message]) -> SliceBuffer:
        buffer: SliceBuffer | None = None
        while isinstance(message := following(), Readout):
            if buffer is None:
                buffer = SliceBuffer(message, None, strongest, torch.device("cpu"))
            t = int(message.head["idx"]["repetition"])
            buffer.add(message, buffer.interleaves.number(message.trajectory), t, digest(message))
            buffer.fold(basis)
        assert buffer is not None
        return buffer

    from_memory = iter([*readouts, wire.Close()])
    wanted = take(lambda: next(from_memory)).finish(basis)

    def receive(connection: socket.socket, check: bool) -> tuple[Taken, bool]:
        channel = Channel(connection, TIMEOUT_S)
        connection.sendall(b"x")
        watch = Stopwatch()
        kspace = take(lambda: wire.read_message(channel)).finish(basis)
        taken = watch.taken()
        return taken, torch.equal(kspace.bins, wanted.bins) and torch.equal(kspace.gram, wanted.gram)

    return receive


def objects(readouts: list[Readout]) -> Receive:
    """The package gadgetron, all acquisitions kept as objects, as its users do."""

    def receive(connection: socket.socket, check: bool) -> tuple[Taken, bool]:
        with Connection(connection) as stream:
            connection.sendall(b"x")
            watch = Stopwatch()
            kept = list(stream)
            taken = watch.taken()
            same = len(kept) == len(readouts)
            if check:
                pairs = zip(kept, readouts, strict=True)
                same = same and all(
                    np.array_equal(a.data, b.data) and np.array_equal(a.traj, b.trajectory) for a, b in pairs
                )
        return taken, same

    return receive


def report(title: str, n: int, unit: str, times: dict[str, list[Taken]], equal: dict[str, bool]) -> None:
    """A table; the last case is the peer of the others."""
    print(f"\n{title}:\n")
    heading("", f"{unit}/s", "best", "spread", "× peer", f"{unit} per s of CPU", "× peer", "data")
    rates = {name: [n / taken.clock_s for taken in some] for name, some in times.items()}
    by_cpu = {name: statistics.median(n / taken.cpu_s for taken in some) for name, some in times.items()}
    peer = list(times)[-1]
    for name, some in rates.items():
        median = statistics.median(some)
        row(
            name,
            f"{median:.0f}",
            f"{max(some):.0f}",
            f"{max(some) - min(some):.0f}",
            f"{median / statistics.median(rates[peer]):.2f}",
            f"{by_cpu[name]:.0f}",
            f"{by_cpu[name] / by_cpu[peer]:.2f}",
            "equal" if equal[name] else "DIFFERENT",
        )


def receiving(runs: int, cores: list[int], size: Size) -> None:
    """All cases in turn, again and again: what disturbs the machine meets them all."""
    own, other = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    if own is None:
        print("\nThere is no second core: receiver and sender share one.")
    else:
        os.sched_setaffinity(0, {own})
    torch.set_num_threads(1)
    readouts = make_scan(size)
    stream = b"".join([*map(acquisition, readouts), bytes_of(wire.write_close)])
    opening = bytes_of(lambda c: wire.write_config_text(c, "<configuration/>", terminate=False))
    opening += bytes_of(lambda c: wire.write_header(c, HEADER, terminate=False))
    cases = (
        Case("raw TCP, recv_into", raw(stream)),
        Case("whorl: read_message, copied into a block", blocks(readouts)),
        Case(f"whorl: SliceBuffer, {V} virtual coils, folded, K={K}", folded(readouts)),
        Case(f"gadgetron {version('gadgetron')}: acquisitions in a list", objects(readouts), opening),
    )
    times: dict[str, list[Taken]] = {case.name: [] for case in cases}
    equal = {case.name: True for case in cases}
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        path = Path(folder) / "stream"
        path.write_bytes(stream)
        listener.settimeout(TIMEOUT_S)
        openings = [case.opening for case in cases] * (runs + 1)
        sender = multiprocessing.get_context("spawn").Process(
            target=send, args=(listener.getsockname()[1], other, path, openings), daemon=True
        )
        sender.start()
        for number, case in itertools.product(range(runs + 1), cases):
            connection, _ = listener.accept()
            with connection:
                taken, same = case.receive(connection, number == 0)
            equal[case.name] &= same
            if number:
                times[case.name].append(taken)
        sender.join(TIMEOUT_S)
    R = size.readouts
    what = f"{size.coils} coils × {size.samples} samples, 2 trajectory columns, {len(stream) >> 20} MiB"
    report(f"Receiving {R} readouts of {what}", R, "readouts", times, equal)


def read_own(path: Path, take: Callable[..., object]) -> None:
    for readout in read_readouts(path):
        take(readout.data, readout.trajectory)


def read_peer(path: Path, take: Callable[..., object]) -> None:
    with closing(ismrmrd.Dataset(str(path), "dataset", create_if_needed=False)) as dataset:
        for number in range(dataset.number_of_acquisitions()):
            row = dataset.read_acquisition(number)
            take(row.data, row.traj)


def checksums(read: Callable[..., None], path: Path) -> list[int]:
    """One for each row of a file."""
    found: list[int] = []

    def take(data: NDArray[np.complex64], trajectory: NDArray[np.float32]) -> None:
        found.append(zlib.crc32(trajectory.tobytes(), zlib.crc32(data.tobytes())))

    read(path, take)
    return found


def files(runs: int, size: Size) -> None:
    """HDF5 files, whole, with a warm cache of the system; both readers in turn."""
    readers = {"whorl: read_readouts": read_own, f"ismrmrd {version('ismrmrd')}: read_acquisition": read_peer}
    times: dict[str, list[Taken]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        simulate(path, phantom="nist", **size.file)
        n = count_readouts(path)
        sums = [checksums(read, path) for read in readers.values()]
        for _, (name, read) in itertools.product(range(runs), readers.items()):
            watch = Stopwatch()
            read(path, lambda data, trajectory: None)
            times[name].append(watch.taken())
        with h5py.File(path) as file:
            head = file["dataset/data"][n - 1]["head"]
    what = f"{n} rows of {head['active_channels']} coils × {head['number_of_samples']} samples"
    report(f"Reading an MRD file, {what}", n, "rows", times, dict.fromkeys(readers, sums[0] == sums[1]))


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--runs", type=int, default=7, help="runs that count")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    runs, size = (1, SMALL) if told.toy else (told.runs, Size())
    cores = sorted(os.sched_getaffinity(0))
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; median of {runs} runs")
    receiving(runs, cores, size)
    files(runs, size)


if __name__ == "__main__":
    main()
