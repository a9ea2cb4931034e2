"""Logs for machines and people: one line per event, with the scan it belongs to.

No text of a log is taken from the part of a header that names the patient, unless the operator asks
for it (`whorl serve --log-patient`).
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import uuid
from datetime import datetime, timezone
from typing import Any

_logger = logging.getLogger("whorl")
_PLAIN = re.compile(r"[\w.:/@+\-\[\]]+")

#: Id of the scan that the current thread works on; each log line carries it.
current_scan: contextvars.ContextVar[str] = contextvars.ContextVar("current_scan", default="")


def new_scan() -> str:
    """Begin a scan on this thread; its id."""
    scan = uuid.uuid4().hex[:8]
    current_scan.set(scan)
    return scan


def event(name: str, level: int = logging.INFO, **values: object) -> None:
    """Log one event with its values."""
    _logger.log(level, name, extra={"values": values})


class EventFormatter(logging.Formatter):
    """Each record as one line: `time level scan=… event=… name=value …`, or as a JSON object.

    Texts of other loggers become the value `text`, tracebacks the value `trace`; nothing that came over
    a network can begin a new line.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One line, without an end of line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        values: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
        }
        if scan := current_scan.get():
            values["scan"] = scan
        own = getattr(record, "values", None)
        if own is None:
            values |= {"event": "log", "logger": record.name, "text": record.getMessage()}
        else:
            values |= {"event": record.getMessage(), **own}
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(values, default=str)
        begin = [values.pop("time"), values.pop("level")]
        return " ".join([*begin, *(f"{name}={_quoted(value)}" for name, value in values.items())])


def _quoted(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def configure(level: int, style: str = "text") -> None:
    """Send all logs to stderr, as lines for people (`text`) or as JSON objects (`json`)."""
    # Numba writes each byte code that it compiles.
    for name in ("numba", "matplotlib", "h5py", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter(style))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # else they are lines of another kind
