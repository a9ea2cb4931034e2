"""MRD headers that are refused, each with a sentence."""

from __future__ import annotations

import pytest

from scan_edit import Scan
from whorl.scan.failure import ScanError
from whorl.scan.header import read_header

_ENTITY = '<!DOCTYPE a [<!ENTITY b "c">]>'


def test_the_header_of_a_real_scan(scan: Scan) -> None:
    for raw in (scan.header, scan.header + b"\0", scan.header.decode()):
        header = read_header(raw)
        assert header.encoded.matrix == (64, 64, 1)
        assert header.recon.fov_mm == (300, 300, 5)
        assert (header.n_timepoints_announced, header.n_slices_announced) == (120, 1)
        assert len(header.flip_deg) == 120
        assert header.ti_ms == (20,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda xml: b"", "cannot be read"),
        (lambda xml: xml[:500], "cannot be read"),
        (lambda xml: xml.replace(b"<ismrmrdHeader", _ENTITY.encode() + b"<ismrmrdHeader"), "document type"),
        # Where ASCII finds no declaration.
        (
            lambda xml: b"\xfe\xff" + f"{_ENTITY}<ismrmrdHeader/>".encode("utf-16-be"),
            "expected UTF-8, got NUL bytes",
        ),
        (lambda xml: xml.replace(b"<x>64</x>", b"<x>0</x>", 1), "encodedSpace .* expected 2 to 2048"),
        (lambda xml: xml.replace(b"<x>64</x>", b"<x>4000</x>", 1), "encodedSpace .* expected 2 to 2048"),
        (lambda xml: xml.replace(b"<y>300.0</y>", b"<y>0</y>", 1), "field of view"),
        (lambda xml: xml.replace(b"<y>300.0</y>", b"<y>NaN</y>", 1), "field of view"),
    ],
    ids=["empty", "cut", "entity", "utf-16", "no pixels", "too many pixels", "no field", "no number"],
)
def test_a_header_that_cannot_be_used(scan: Scan, change, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScanError, match=says):
        read_header(change(scan.header))


def test_a_header_without_encoding(scan: Scan) -> None:
    start, end = scan.header.index(b"<encoding>"), scan.header.index(b"</encoding>") + len(b"</encoding>")
    with pytest.raises(ScanError):
        read_header(scan.header[:start] + scan.header[end:])
