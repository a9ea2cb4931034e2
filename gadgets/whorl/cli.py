"""The command line: a thin shell over simulation, doors and pipeline.

Exit codes: 0 all maps delivered; 1 nothing delivered; 2 usage; 3 delivered, but something is
degraded, a fall-back, or missing.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click

from whorl import __version__
from whorl.config import (
    PROPERTIES,
    Property,
    Settings,
    SettingsError,
    properties_from_environment,
    properties_from_xml,
    property_of,
)
from whorl.scan.failure import ScanError


class _Group(click.Group):
    """Says what is wrong with a scan in one sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.UsageError(str(error), ctx) from error
        except (ScanError, OSError) as error:
            click.echo(f"whorl: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log each event.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Log lines for people or programs.",
)
def main(verbose: bool, log_format: str) -> None:
    """T1 and T2 maps from spiral MR Fingerprinting, while the scan arrives. Research use only."""
    from whorl.runtime import logs

    logs.configure(logging.DEBUG if verbose else logging.WARNING, log_format)


def _properties(config: Path | None, assignments: tuple[str, ...]) -> dict[str, object]:
    """Properties of the environment, overridden by a configuration file, and that by ``name=value`` texts."""
    return {**properties_from_environment(), **_given(config, assignments)}


def _given(config: Path | None, assignments: tuple[str, ...]) -> dict[str, object]:
    """Properties of a configuration file, overridden by ``name=value`` texts."""
    properties: dict[str, object] = dict(properties_from_xml(config.read_bytes())) if config else {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f'-p {assignment}: expected name=value, for instance "-p method=lowrank"')
        properties[name.strip()] = value
    return properties


_existing = click.Path(exists=True, dir_okay=False, path_type=Path)
_output = click.Path(dir_okay=False, path_type=Path)
_config = click.option("-C", "--config", type=_existing, help="Configuration file (XML) with properties.")
_assign = click.option(
    "-p",
    "--property",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a property; see: whorl properties.",
)


@main.command(context_settings={"auto_envvar_prefix": "WHORL_SERVE"})
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=9002, type=click.IntRange(0, 65535), help="TCP port; 0 for a free one.")
@_config
@_assign
@click.option("--max-scans", default=4, type=click.IntRange(1, 64), help="Scans at the same time.")
@click.option("--grace", default=8.0, metavar="S", help="When stopped: time in which scans may still end.")
@click.option("--log-patient", is_flag=True, help="Name each scan's patient in the log.")
def serve(
    host: str,
    port: int,
    config: Path | None,
    assignments: tuple[str, ...],
    max_scans: int,
    grace: float,
    log_patient: bool,
) -> None:
    """Serve MRD streams: clients, FIRE, and Gadgetron's <connect>.

    Options may stand in the environment as WHORL_SERVE_PORT, WHORL_SERVE_CONFIG, WHORL_SERVE_MAX_SCANS ...,
    properties as WHORL_PROPERTY_METHOD ... A configuration file counts more than they do, -p more than both.
    """
    from whorl.doors.server import Server

    logging.getLogger("whorl").setLevel(min(logging.INFO, logging.getLogger().level))
    properties = _properties(config, assignments)
    Settings.from_properties(properties)  # a mistake here shall not wait for the first scan
    server = Server(host, port, properties, max_scans=max_scans, grace_s=grace, log_patient=log_patient)
    if not server.serve_forever():
        # Slices that nobody waits for any more would keep the process until they are ready.
        sys.stderr.flush()
        os._exit(1)


@main.command()
@click.option("--host", default="127.0.0.1", envvar="WHORL_SERVE_HOST", help="Where the server is.")
@click.option(
    "--port", default=9002, type=click.IntRange(1, 65535), envvar="WHORL_SERVE_PORT", help="Its TCP port."
)
@click.option("--timeout", default=5.0, metavar="S", help="Longest time for its answer.")
def ping(host: str, port: int, timeout: float) -> None:
    """Ask a server whether it answers, by its own protocol; for health checks. Exit code 1 if it does not."""
    from whorl.doors.client import ping as ask

    # One that listens on all addresses is asked on this machine.
    click.echo(ask({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, timeout))


@main.command()
@_config
@_assign
def stream(config: Path | None, assignments: tuple[str, ...]) -> None:
    """Reconstruct an MRD stream (version 1 or 2) from stdin and write the images to stdout.

    Texts go to stderr. If nothing could be reconstructed stdout stays empty.
    """
    from whorl.doors.pipes import run

    if any(end is None or end.isatty() for end in (sys.stdin, sys.stdout)):
        raise click.UsageError(
            "expected pipes: ismrmrd_hdf5_to_stream … | whorl stream | ismrmrd_stream_to_hdf5 …"
        )
    properties = _properties(config, assignments)
    Settings.from_properties(properties)

    def stop(number: int, frame: FrameType | None) -> None:
        _say("ERR", "stopped by a signal before the scan was ready: the stream is not complete")
        os._exit(1)  # the slice that is under way is waited for by nobody

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Whatever else is printed, by whichever library, must not get into the stream.
    target = os.dup(1)
    os.dup2(2, 1)
    from whorl.pipeline.scan import reconstruct_scan

    sys.exit(run(0, target, properties, reconstruct_scan, _say))


@main.command()
@click.argument("scan", type=_existing)
@click.option("-o", "--output", type=_output, required=True, help="MRD file (HDF5) for the images.")
@_config
@_assign
@click.option("--address", metavar="HOST:PORT", help="Send the scan to a running server.")
def replay(
    scan: Path, output: Path, config: Path | None, assignments: tuple[str, ...], address: str | None
) -> None:
    """Reconstruct a recorded scan, in this process or through a running server.

    SCAN is an MRD file (HDF5), or a stream as it was kept by the property spool. In this process the
    properties that were recorded with a stream are used, unless -C gives others; a server is sent only those
    that are given here.
    """
    if output.resolve() == scan.resolve():
        raise click.UsageError(f"{output} is the scan itself: the images need a file of their own")
    if address is None:
        from whorl.doors.replaying import replay as run

        properties = _properties(config, assignments)
        Settings.from_properties(properties)
        delivered, code = run(scan, output, properties, _say, recorded=config is None)
    else:
        from whorl.doors.client import send_file
        from whorl.doors.files import ResultFile, read_header

        host, colon, number = address.rpartition(":")
        if not colon or not number.isdigit() or int(number) > 65535:
            raise click.UsageError(f"--address {address}: expected HOST:PORT")
        properties = _given(None, assignments)
        Settings.from_properties(properties)  # a mistake is one of usage, with or without a server
        text = config.read_bytes() if config else None
        with ResultFile(output, read_header(scan)) as result:
            received = send_file(
                scan,
                host.strip("[]") or "127.0.0.1",
                int(number),
                properties=properties,
                config_text=text,
                on_image=result.append,
                on_text=lambda text: _say(text[:3], text[4:]),
            )
        for problem in received.problems:
            click.echo(f"whorl: {problem}", err=True)
        delivered, code = len(received.images), received.exit_code
    if delivered:
        click.echo(f"{delivered} images in {output}")
    if code == 1:
        click.echo("whorl: nothing was delivered", err=True)
    sys.exit(code)


def _say(level: str, text: str) -> None:
    click.echo(f"{level} {text}", err=True)


def _numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(f'"{value}": expected numbers with commas between them') from error


_SIMULATION = (
    click.option(
        "--phantom",
        type=click.Choice(["nist", "brain", "texture", "letters"]),
        default="nist",
        help="What is scanned; texture: a brain with smooth texture and lesions; letters: nothing in it is "
        "symmetric.",
    ),
    click.option("--plate", type=click.Choice(["t1", "t2"]), default="t2", help="Spheres of the NIST plate."),
    click.option("--timepoints", default=500, help="Pulses of the train."),
    click.option(
        "--order",
        type=click.Choice(["golden", "sequential", "golden-angle"]),
        default="golden",
        help="Of the interleaves; golden-angle: each timepoint has its own.",
    ),
    click.option("--noise", default=1e-3, help="SD of the noise, relative to the largest sample."),
    click.option("--matrix", default=256, help="Pixels along one side."),
    click.option("--seed", default=0, help="Of noise, coils and texture."),
    click.option("--b1", default=0.0, help="Largest relative deviation of the transmit field."),
    click.option("--inversion-efficiency", default=1.0, help="The inversion leaves Mz = -efficiency."),
    click.option(
        "--slice-profile",
        default="",
        callback=_numbers,
        metavar="F,F,...",
        help="Flip-angle factors at equidistant places across the slice.",
    ),
    click.option("--b0", "b0_hz", default=0.0, metavar="HZ", help="Largest off-resonance, of either sign."),
    click.option(
        "--gradient-delay",
        "gradient_delay_us",
        default=0.0,
        metavar="US",
        help="Time by which the gradients lag the trajectory in the file.",
    ),
    click.option(
        "--phase-jump",
        "phase_jump_rad",
        default=0.0,
        metavar="RAD",
        help="Jump of the object's phase at the border of an ellipse in its front.",
    ),
    click.option(
        "--motion",
        "motion_pixels",
        default=0.0,
        metavar="PIXELS",
        help="Shift of the object along x between the halves of the train.",
    ),
    click.option("--fat", is_flag=True, help="A ring of fat around the object, -440 Hz off."),
)


def _simulated(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what is simulated."""
    for option in reversed(_SIMULATION):
        command = option(command)
    return command


@main.command()
@click.argument("output", type=_output)
@_simulated
@click.option("--interleaves", default=96, help="Rotations of the spiral that fill k-space.")
@click.option("--coils", default=8, help="Receive coils.")
@click.option("--slices", default=1, help="Slices.")
@click.option("--sequence", type=_existing, help="Pulseq file with train, trajectory and matrix.")
@click.option(
    "--layout",
    type=click.Choice(["reference", "pulseq"]),
    default="reference",
    help="What the file says: all; or as a Pulseq scan, no train, no trajectory, noise not flagged.",
)
@click.option(
    "--turned",
    "turned_deg",
    default="0,0,0",
    callback=_numbers,
    metavar="X,Y,Z",
    help="Angles in degrees about the patient's axes (LPS) by which the slices are turned from axial.",
)
@click.option(
    "--centre",
    "centre_mm",
    default="0,0,0",
    callback=_numbers,
    metavar="X,Y,Z",
    help="Middle of the stack of slices in mm from the isocentre (LPS).",
)
@click.option("--girf", type=_existing, help="Gradient impulse response (.npy) that the spirals go through.")
@click.option("--noise-correlation", default=-1.0, metavar="R", help="Of any two coils; -1: random.")
@click.option(
    "--noisy-coil", default=1.0, metavar="F", help="SD of the first coil's noise, relative to others."
)
@click.option("--noise-dwell", "noise_dwell_us", type=float, metavar="US", help="Of the noise readouts.")
def simulate(output: Path, layout: str, noise_correlation: float, noisy_coil: float, **options: Any) -> None:
    """Write a simulated scan (MRD) with its ground truth."""
    from whorl.simulation.noise import correlated_noise
    from whorl.simulation.parameters import PULSEQ
    from whorl.simulation.scan import simulate as run

    if layout == "pulseq":
        options["layout"] = PULSEQ
    try:
        if noise_correlation >= 0 or noisy_coil != 1:
            options["noise_covariance"] = correlated_noise(
                options["coils"], max(noise_correlation, 0.0), noisy_coil
            )
        run(output, **options, progress=lambda text: click.echo(text, err=True))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"scan in {output}")


@main.command()
@_simulated
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("out"))
def demo(output: Path, **options: Any) -> None:
    """The main job, end to end: scan, server, socket, maps, accuracy against the truth."""
    from whorl.tools.demo import run

    sys.exit(run(output, **options))


@main.command()
@click.argument("scan", type=_existing)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder."
)
@_config
@_assign
def compare(scan: Path, output: Path, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Low-rank, LLR and INR side by side on one scan, with tables and figures."""
    from whorl.tools.comparison import run

    properties = _properties(config, assignments)
    try:
        code = run(scan, output, properties, lambda text: click.echo(text, err=True), click.echo)
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[demo]'") from error
    sys.exit(code)


@main.command()
@click.argument("result", type=_existing)
@click.option("-o", "--output", type=_output, required=True, help="HTML file.")
@click.option("--truth", type=_existing, help="Simulated scan, with whose truth the maps are compared.")
@click.option(
    "--plate",
    type=click.Choice(["auto", "t1", "t2", "off"]),
    default="auto",
    help="Spheres of the NIST system phantom, with whose values maps are compared; auto: if they are found.",
)
@click.option("--phantom-version", default=1, type=click.IntRange(1, 2), help="Of the NIST system phantom.")
@click.option("--temperature", default=20.0, metavar="C", help="Of the phantom, in degrees Celsius.")
def report(
    result: Path, output: Path, truth: Path | None, plate: str, phantom_version: int, temperature: float
) -> None:
    """Write a report of a result: one HTML file with maps, tables, figures and how they came about."""
    from whorl.doors.files import read_images, read_result_header
    from whorl.reporting.content import gather
    from whorl.scan.header import field_strength_t

    content = gather(
        read_images(result),
        truth=truth,
        plate=plate if plate in ("t1", "t2") else None,  # type: ignore[arg-type]
        look_for_plate=plate != "off",
        version=phantom_version,
        temperature_c=temperature,
        field_t=_known_field(field_strength_t(read_result_header(result))),
    )
    try:
        from whorl.reporting.page import page

        text = page(content, result.name)
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[report]'") from error
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(output)
    for remark in content.remarks:
        click.echo(f"whorl: {remark}", err=True)
    click.echo(f"report in {output}")


def _known_field(field_t: float) -> float:
    """The nominal field of a scanner: a Vida says 2.89 T."""
    return 1.5 if 0 < field_t < 2.2 else 3.0


@main.command("inspect")
@click.argument("scan", type=_existing)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a page of text.")
@click.option("--png", type=_output, help="Draw trajectory, order and point-spread function into a file.")
@_config
@_assign
def inspect_scan(
    scan: Path, as_json: bool, png: Path | None, config: Path | None, assignments: tuple[str, ...]
) -> None:
    """Say what a scan contains, where that was found, what would be done, and what is missing.

    Exit codes: 0 nothing is wrong; 1 nothing can be reconstructed; 3 something is missing or doubtful.
    """
    import json

    from whorl.doors.files import open_scan
    from whorl.tools.inspection import inspect

    properties = _properties(config, assignments)
    settings = Settings.from_properties(properties)
    if png is not None:
        from whorl.tools.inspection_figure import check_installed

        try:
            check_installed()
        except ImportError as error:
            raise click.ClickException(f"{error}: pip install 'whorl-mrf[demo]'") from error
    with open_scan(scan) as source:
        found = inspect(source.opening.header.rstrip(b"\0"), source.readouts(), settings)
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text())
    if png is not None:
        from whorl.tools.inspection_figure import draw

        if found.figure is None:
            click.echo("whorl: no picture: no slice could be collected", err=True)
        else:
            draw(found.figure, found.order, scan.name, png)
            click.echo(f"picture in {png}", err=True)
    sys.exit(found.exit_code)


@main.group()
def dictionary() -> None:
    """Build, show and plot the dictionary of a scan; clear the cache.

    The train comes from SCAN, or from a file by -p sequence=train.csv.
    """


def _of_train(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the scan and the properties that a dictionary depends on."""
    for decorate in (_assign, _config, click.argument("scan", type=_existing, required=False)):
        command = decorate(command)
    return command


def _dictionary(scan: Path | None, config: Path | None, assignments: tuple[str, ...]) -> tuple[Any, ...]:
    """Settings, parameters and the dictionary of a scan or a train."""
    from whorl.pipeline.dictionaries import dictionary_parameters, get_dictionary
    from whorl.scan.pulseq import read_pulseq
    from whorl.scan.resolve import train_from_csv
    from whorl.scan.transmit import read_b1_map

    settings = Settings.from_properties(_properties(config, assignments))
    if scan is not None:
        from whorl.doors.files import read_header, read_readouts
        from whorl.pipeline.scan import find_train

        train = find_train(read_header(scan), read_readouts(scan), settings)
    elif settings.sequence:
        told = settings.inversion_time_ms
        if settings.sequence.lower().endswith(".seq"):
            train = read_pulseq(settings.sequence, told if told >= 0 else None).train
        else:
            train = train_from_csv(settings.sequence, told if told > 0 else None)
        if 0 < settings.timepoints < train.n_timepoints:
            train = train.first(settings.timepoints)
    else:
        raise click.UsageError(
            "no train: give a SCAN, or -p sequence=train.csv (and -p inversion_time_ms=20)"
        )
    span = read_b1_map(settings.b1_map).span() if settings.b1_map else None
    parameters = dictionary_parameters(train, settings, span)
    return settings, parameters, get_dictionary(parameters, settings, lambda text: _say("WRN", text))


@dictionary.command("build")
@_of_train
def build_dictionary(scan: Path | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Build a dictionary and keep it in the cache."""
    import time

    began = time.monotonic()
    _, _, built = _dictionary(scan, config, assignments)
    seconds = time.monotonic() - began
    click.echo(f"{len(built.grid)} atoms, {built.basis.shape[1]} coefficients, ready after {seconds:.1f} s")


@dictionary.command("show")
@_of_train
def show_dictionary(scan: Path | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Show atoms, states, coefficients with their energies, and size; without a train, the cache."""
    from whorl.pipeline.dictionaries import store_of
    from whorl.tools.dictionary_report import describe, describe_entries

    settings = Settings.from_properties(_properties(config, assignments))
    store = store_of(settings)
    if scan is None and not settings.sequence:
        if store is None:
            raise click.UsageError("the cache is off (cache_mb=0): give a SCAN, or -p sequence=train.csv")
        click.echo(describe_entries(store.entries(), store.folder))
        return
    _, parameters, shown = _dictionary(scan, config, assignments)
    click.echo(describe(parameters, shown, store))


@dictionary.command("plot")
@_of_train
@click.option("-o", "--output", type=_output, required=True, help="Picture (PNG, PDF or SVG).")
def plot_dictionary(
    scan: Path | None, config: Path | None, assignments: tuple[str, ...], output: Path
) -> None:
    """Draw the train, the signals of some tissues and the basis."""
    from whorl.tools.dictionary_report import draw

    _, parameters, drawn = _dictionary(scan, config, assignments)
    try:
        draw(parameters, drawn, output)
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[demo]'") from error
    except ValueError as error:  # a format that matplotlib does not write
        raise click.UsageError(str(error)) from error
    click.echo(f"picture in {output}")


@dictionary.command("clear")
@_config
@_assign
def clear_dictionaries(config: Path | None, assignments: tuple[str, ...]) -> None:
    """Remove all dictionaries from the cache."""
    from whorl.pipeline.dictionaries import store_of

    store = store_of(Settings.from_properties(_properties(config, assignments)))
    if store is None:
        raise click.UsageError("the cache is off (cache_mb=0): there is nothing to clear")
    count, n_bytes = store.clear()
    click.echo(f"{count} dictionaries removed from {store.folder}, {n_bytes / (1 << 20):.1f} MiB")


@main.command()
@click.argument(
    "inputs", type=click.Path(exists=True, path_type=Path), nargs=-1, required=True, metavar="IN..."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the results; on a cluster one that all its machines share.",
)
@click.option(
    "--cluster",
    default="local",
    metavar="local|slurm|ADDRESS",
    help="This machine, SLURM, or a Dask scheduler (tcp://host:8786).",
)
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(0),
    help="Scans at the same time; 0: one for each GPU of this machine, else for each two cores; 2 on SLURM.",
)
@click.option(
    "--cores", default=0, type=click.IntRange(0), help="Of each worker; 0: all, shared out; 1 on SLURM."
)
@click.option("--memory", default="8GB", help="SLURM: of each worker.")
@click.option("--gpus", default=0, type=click.IntRange(0), help="SLURM: of each worker.")
@click.option("--partition", default="", help="SLURM: partition; by default as Dask's configuration says.")
@click.option("--walltime", default="", metavar="HH:MM:SS", help="SLURM: of each job, which is then renewed.")
@click.option("--sbatch", multiple=True, metavar="OPTION", help="SLURM: further option, as --account=mri.")
@click.option("--interface", default="", help="SLURM: network interface of scheduler and workers, as ib0.")
@click.option(
    "--patience",
    default=3600.0,
    type=click.FloatRange(0),
    metavar="S",
    help="Give up if there is no worker for so long.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done.")
@_config
@_assign
def batch(
    inputs: tuple[Path, ...],
    output: Path,
    cluster: str,
    patience: float,
    dry_run: bool,
    config: Path | None,
    assignments: tuple[str, ...],
    **resources: Any,
) -> None:
    """Reconstruct many scans: files, and all scans in folders (.h5, .hdf5, .mrd).

    Each scan becomes NAME.h5 (maps) and NAME.json (what is known about them) in the folder of the results;
    summary.csv and summary.html tell of them all. What is done already, with the same settings and whorl, is
    not done again; what failed or was broken off is.
    """
    try:
        from whorl.cohort.batch import run
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[cluster]'") from error
    properties = _properties(config, assignments)
    Settings.from_properties(properties)
    sys.exit(
        run(
            inputs,
            output,
            properties,
            cluster,
            resources,
            recorded=config is None,
            patience_s=patience,
            dry_run=dry_run,
            say=lambda text: click.echo(f"whorl: {text}", err=True),
            show=click.echo,
        )
    )


@main.group()
def openrecon() -> None:
    """Offer whorl on a scanner with Siemens' OpenRecon."""


@openrecon.command("package")
@click.option("--vendor", required=True, help="Your institution: letters, digits, hyphens.")
@click.option("--name", default="whorl", help="Of the application: letters and digits.")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder."
)
@click.option("--image", default="whorl", help="Image that Dockerfile has made.")
@click.option(
    "--no-image", is_flag=True, help="Write metadata, label and documentation alone; needs no Docker."
)
@click.option("--version", default=__version__, help="Of the application: three numbers.")
@click.option(
    "--address", default="", help="Yours, by default the vendor; for the card and the documentation."
)
@click.option("--made-in", default="unknown", help="Country.")
@click.option("--gpu", is_flag=True, help="It may use a GPU: the image is one for CUDA 11.8.")
@click.option("--memory", "memory_mb", default=8000, type=click.IntRange(1), help="MB that are kept for it.")
@click.option("--gpu-memory", "gpu_memory_mb", default=8000, type=click.IntRange(1), help="MB, with --gpu.")
@click.option("--cores", default=2, type=click.IntRange(1), help="CPU cores that are kept for it.")
@_config
@_assign
def package_openrecon(
    output: Path,
    image: str,
    no_image: bool,
    config: Path | None,
    assignments: tuple[str, ...],
    **application: Any,
) -> None:
    """Make the package that OpenRecon installs: OpenRecon_VENDOR_NAME_VVERSION.zip.

    Beside it lie the metadata (.json), the label made of them (.label) and the documentation (.pdf).
    Properties (-C, -p) are put into the package as its defaults, with the files that they name; what stands
    on the card at the console counts more.
    """
    try:
        from whorl.openrecon.metadata import Application
        from whorl.openrecon.package import make
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[openrecon]'") from error
    paths = make(
        Application(**{**application, "address": application["address"] or application["vendor"]}),
        _given(config, assignments),
        "" if no_image else image,
        output,
        lambda text: click.echo(f"whorl: {text}", err=True),
    )
    for path in paths:
        click.echo(path)


@main.command()
@click.argument("result", type=_existing)
@click.option("--to", "kind", type=click.Choice(["dicom", "nifti", "bids"]), required=True, help="Format.")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder."
)
@click.option("--mr-images", is_flag=True, help="DICOM: MR images of 16 bits, not parametric maps.")
@click.option("--subject", default="", help="BIDS: label; by default from the patient id, else 01.")
@click.option("--session", default="", help="BIDS: label of the session.")
@click.option(
    "--force", is_flag=True, help="Write into a folder that is not empty, over files of equal names."
)
def export(
    result: Path, kind: str, output: Path, mr_images: bool, subject: str, session: str, force: bool
) -> None:
    """Write the maps of a result (MRD) as DICOM, NIfTI or a BIDS derivative.

    The patient of the MRD header is named in DICOM, and by the subject label of BIDS.
    """
    if mr_images and kind != "dicom":
        raise click.UsageError("--mr-images is for --to dicom only")
    if (subject or session) and kind != "bids":
        raise click.UsageError("--subject and --session are for --to bids only")
    from whorl.doors.files import read_images, read_result_header
    from whorl.exports import exportable, facts_of, target_folder
    from whorl.maps.volumes import volumes

    try:
        from whorl.exports import bids, dicom, nifti
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'whorl-mrf[export]'") from error
    found = exportable(volumes(read_images(result)))
    facts = facts_of(read_result_header(result))
    if kind == "bids":
        paths, notes = bids.write(found, facts, output, subject, session, force)
    else:
        target_folder(output, force)
        if kind == "nifti":
            paths, notes = nifti.write(found, output)
        else:
            paths, notes = dicom.write(found, facts, output, mr_images)
    for note in notes:
        click.echo(f"whorl: {note}", err=True)
    click.echo(f"{len(paths)} files in {output}")


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, for programs.")
def properties(names: tuple[str, ...], as_json: bool) -> None:
    """List properties with their choices or ranges, units and defaults; without a NAME all of them."""
    asked = {property_of(name).name for name in names}
    shown = [known for known in PROPERTIES.values() if not names or known.name in asked]
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(known) for known in shown], indent=2))
        return
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    margin = max(len(known.name) for known in shown) + 4
    lines = []
    for group, members in itertools.groupby(shown, key=lambda known: known.group):
        lines += [click.style(group, bold=True), ""]
        for known in members:
            lines += [_wrapped(known.text, width, margin, known.name), _wrapped(_facts(known), width, margin)]
        lines.append("")
    lines.append(
        textwrap.fill(
            "Unless it says otherwise, a property may come over the network and changes the maps.", width
        )
    )
    click.echo("\n".join(lines))


_TYPES = {"boolean": "true or false", "integer": "whole number"}


def _facts(known: Property) -> str:
    """Type or choices, unit, range and default of a property, as `--help` shows such things."""
    kind = f"one of {', '.join(known.choices)}" if known.choices else _TYPES.get(known.type, known.type)
    kind += f" in {known.unit}" if known.unit else ""
    kind += f", {known.bounds}" if known.bounds else ""
    default = known.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:.15g}"
    facts = [kind, f"default {default}" if default != "" else "default empty"]
    if known.local:
        facts.append("not over the network")
    if not known.changes_maps:
        facts.append("maps unchanged")
    return f"[{'; '.join(facts)}]"


def _wrapped(text: str, width: int, margin: int, name: str = "") -> str:
    """A text beside a margin, in which a name may stand."""
    return textwrap.fill(
        text,
        width,
        initial_indent=f"  {name}".ljust(margin),
        subsequent_indent=" " * margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
