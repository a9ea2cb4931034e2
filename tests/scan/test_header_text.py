"""MRD headers that are refused, each with a sentence."""

from __future__ import annotations

import warnings

import pytest

from scan_edit import Result, Scan
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
        assert header.noise_bandwidth == 1


_BANDWIDTH = b"<relativeReceiverNoiseBandwidth>1.0</relativeReceiverNoiseBandwidth>"


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [(b" 0.79\n", 0.79), (b"", 0), (b"wide", 0), (b"-1", 0), (b"nan", 0), (b"1e9", 0), (b"1e999", 0)],
    ids=str,
)
def test_the_noise_bandwidth_never_stops_a_scan(scan: Scan, text: bytes, bandwidth: float) -> None:
    assert _BANDWIDTH in scan.header
    said = scan.header.replace(_BANDWIDTH, _BANDWIDTH.replace(b"1.0", text))
    assert read_header(said).noise_bandwidth == bandwidth
    assert read_header(scan.header.replace(_BANDWIDTH, b"")).noise_bandwidth == 0


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


def test_a_header_without_limits_announces_nothing(scan: Scan) -> None:
    header = read_header(scan.limit("slice", None).limit("repetition", None).header)
    assert (header.n_timepoints_announced, header.n_slices_announced) == (1, 0)


_PRIVATE = "Mueller"


@pytest.mark.parametrize(
    "element",
    [
        f"<subjectInformation><patientName>{_PRIVATE}</patientName>"
        f"<patientBirthdate>{_PRIVATE} 1.1.1970</patientBirthdate></subjectInformation>",
        f"<subjectInformation><patientID>{_PRIVATE}</patientID><patientWeight_kg>{_PRIVATE}</patientWeight_kg>"
        f"<{_PRIVATE}>{_PRIVATE}</{_PRIVATE}></subjectInformation>",
        f"<studyInformation><studyDate>{_PRIVATE}</studyDate><unknown>{_PRIVATE}</unknown></studyInformation>",
        f"<userParameters><userParameterLong><name>a</name><value>{_PRIVATE}</value></userParameterLong>"
        f"</userParameters><{_PRIVATE}/>",
    ],
    ids=["birth date", "unknown element", "study", "user parameters"],
)
def test_whom_the_header_names_is_not_read(
    scan: Scan, untouched: Result, element: str, caplog: pytest.LogCaptureFixture
) -> None:
    scan.header = scan.header.replace(b"<encoding>", element.encode() + b"<encoding>", 1)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        result = scan.run()
    assert result.outcome == untouched.outcome
    assert not warned
    assert _PRIVATE not in result.said + caplog.text
    assert not any(_PRIVATE in image.attribute_string for image in result.images)


@pytest.mark.parametrize("place", [b"<matrixSize>", b"<TR>", b"</encoding>"])
def test_what_is_wrong_elsewhere_names_nobody(scan: Scan, place: bytes) -> None:
    private = f"<subjectInformation><patientName>{_PRIVATE}</patientName></subjectInformation>"
    broken = scan.header.replace(b"<encoding>", private.encode() + b"<encoding>", 1)
    with pytest.raises(ScanError) as caught:
        read_header(broken.replace(place, b"<odd/>" + place, 1).replace(b"</ismrmrdHeader>", b""))
    assert _PRIVATE not in str(caught.value)
    with pytest.raises(ScanError, match="cannot be read") as caught:
        read_header(broken.replace(place, b"<odd/>" + place, 1))
    assert _PRIVATE not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"<TI>", b"<TI>soon</TI><TI>"), (b"<maximum>119</maximum>", b"<maximum>many</maximum>")],
    ids=["list", "limit"],
)
def test_what_is_no_number_is_said(scan: Scan, old: bytes, new: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the XML binding, which leaves the text as it is
        with pytest.raises(ScanError, match="cannot be read: expected"):
            read_header(scan.header.replace(old, new))
