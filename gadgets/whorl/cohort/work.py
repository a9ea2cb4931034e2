"""What a worker does with one scan. Runs in processes of their own, on machines of their own."""

from __future__ import annotations

import base64
import glob
import io
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl import __version__
from whorl.cohort.plan import Job, fingerprint
from whorl.scan.failure import ScanError

logger = logging.getLogger("whorl")

#: Pixels of a thumbnail along its longer side, and the upper ends of the colours in ms.
_THUMBNAIL = 96
_TOPS = {"T1": 3000.0, "T2": 300.0}


def prepare(threads: int, gpus: tuple[str, ...], worker: str) -> None:
    """Settle which cores and which GPU this process uses, before it loads PyTorch.

    Parameters
    ----------
    threads
        Threads of each operation; 0: as PyTorch decides.
    gpus
        Names of this machine's GPUs that are shared out among its workers; empty: nothing is changed.
    worker
        Name of this worker; its number decides which of them it gets.
    """
    if gpus:
        number = int("".join(filter(str.isdigit, worker)) or 0)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    if threads:
        # PyTorch's own function would tell MKL as well, which then heeds no limit (`whorl.runtime.cores`).
        os.environ["OMP_NUM_THREADS"] = str(threads)


def work(job: Job, properties: Mapping[str, object], recorded: bool) -> dict[str, Any]:
    """Reconstruct one scan, write its maps and its record, each in one step; the record.

    A failure is a record too, and removes maps of an earlier time: those of other settings, or of another
    scan of this name, would be taken for its own.
    """
    began = time.monotonic()
    texts: list[str] = []
    n_images, code = 0, 1
    made: dict[str, Any] = {}
    before: dict[str, int] = {}
    try:
        before = fingerprint(job.scan)
        job.result.parent.mkdir(parents=True, exist_ok=True)
        # Whoever is killed from here on leaves a scan without a record, which is made again.
        job.record.unlink(missing_ok=True)
        for left in job.result.parent.glob(f".{glob.escape(job.result.name)}.*.part"):
            left.unlink(missing_ok=True)  # of a worker that was killed
        from whorl.doors.replaying import replay

        n_images, code = replay(
            job.scan,
            job.result,
            properties,
            lambda level, text: texts.append(f"{level} {text}"),
            recorded=recorded,
        )
        if code != 1:
            made = _describe(job.result)
    except (ScanError, OSError) as error:
        texts.append(f"ERR {error}")
        code = 1
    except Exception as error:
        logger.exception("internal error")
        texts.append(f"ERR internal error: {type(error).__name__}: {error}")
        code = 1
    if code == 1:
        with suppress(OSError):  # a name that cannot be
            job.result.unlink(missing_ok=True)
    state = "failed" if code == 1 else made["status"]
    if code == 3 and state == "complete":
        state = "degraded"  # something was said about it, or a slice is missing
    record = failed(job, before, [text for text in texts if not text.startswith("DBG")]) | {
        "whorl": __version__,
        "state": state,
        "exit_code": code,
        "images": n_images,
        "result_size": job.result.stat().st_size if code != 1 else 0,
        "seconds": round(time.monotonic() - began, 3),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        **{name: value for name, value in made.items() if name != "status"},
    }
    write_record(job.record, record)
    return record


def failed(job: Job, before: Mapping[str, int], texts: Sequence[str]) -> dict[str, Any]:
    """The record of a scan of which nothing came, with the scan's `fingerprint` and what was said."""
    return {
        "scan": str(job.scan),
        "fingerprint": before,
        "key": job.key,
        "state": "failed",
        "exit_code": 1,
        "images": 0,
        "result_size": 0,
        "texts": list(texts),
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(path)


def _describe(result: Path) -> dict[str, Any]:
    """Status, medians and thumbnails of a result."""
    from whorl.doors.files import read_images
    from whorl.maps.volumes import volumes

    found = {volume.role: volume for volume in reversed(volumes(read_images(result)))}
    statuses = {image.meta.get("whorl_status", "") for volume in found.values() for image in volume.images}
    worst = [status for status in ("fallback", "degraded", "complete") if status in statuses]
    described: dict[str, Any] = {"status": worst[0] if worst else "failed", "slices": 0, "method": ""}
    for role in ("T1", "T2", "QUALITY"):
        if role not in found:
            continue
        values = found[role].values
        inside = values[values > 0]
        described["slices"] = len(values)
        described["method"] = found[role].attribute("whorl_method")
        described[f"{role.lower()}_median"] = round(float(np.median(inside)), 4) if len(inside) else None
        if role in _TOPS:
            described[f"{role.lower()}_thumbnail"] = _thumbnail(values[len(values) // 2], role)
    return described


def _thumbnail(image: NDArray[np.float32], role: str) -> str:
    """A map `(Y, X)` as a small PNG in base64."""
    from PIL import Image

    from whorl.maps.images import colour_table

    step = max(1, -(-max(image.shape) // _THUMBNAIL))
    small = image[::step, ::step]
    table = colour_table("lipari" if role == "T1" else "navia")
    pixels = table[np.rint(255 * np.clip(small / _TOPS[role], 0, 1)).astype(np.int64)].astype(np.uint8)
    pixels[small <= 0] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
