"""A small scan as the messages of a stream, and what may happen to them on their way."""

from __future__ import annotations

import struct
from collections.abc import Callable

from doors.messages import bytes_of, make_image, make_readout, make_waveform
from whorl.doors import wire
from whorl.scan.readout import Flag

CONFIG = (
    b'<configuration><property name="method" value="llr"/>'
    b"<property><name>llr_block</name><value>4</value></property></configuration>"
)
PARAMETERS = '{"version": "1.1.0", "parameters": {"iterations": "60.0", "deadline_s": 5, "b1": "match"}}'
_SPACE = (
    "<{0}><matrixSize><x>{1}</x><y>{1}</y><z>1</z></matrixSize>"
    "<fieldOfView_mm><x>300</x><y>300</y><z>5</z></fieldOfView_mm></{0}>"
)
HEADER = (
    '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions>'
    "<H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
    f"{_SPACE.format('encodedSpace', 9)}{_SPACE.format('reconSpace', 8)}"
    "<encodingLimits><repetition><minimum>0</minimum><maximum>3</maximum><center>0</center></repetition>"
    "</encodingLimits><trajectory>spiral</trajectory></encoding><sequenceParameters><TR>12.5</TR><TE>3</TE>"
    "<TI>20</TI><flipAngle_deg>10</flipAngle_deg></sequenceParameters></ismrmrdHeader>"
).encode()


def _scan() -> list[bytes]:
    noise = make_readout(2, 11, 0, seed=0)
    noise.head["flags"] = Flag.IS_NOISE_MEASUREMENT
    readouts = [make_readout(2, 9, 2, seed) for seed in (1, 2, 3)]
    return [
        bytes_of(lambda c: wire.write_config_text(c, CONFIG)),
        bytes_of(lambda c: wire.write_header(c, HEADER)),
        bytes_of(lambda c: wire.write_text(c, PARAMETERS)),
        *(bytes_of(lambda c, r=r: wire.write_readout(c, r)) for r in (noise, *readouts)),
        make_waveform(),
        bytes_of(lambda c: wire.write_image(c, make_image(ny=3, nx=5, a="b"))),
        bytes_of(wire.write_close),
    ]


#: Configuration, header, parameters, noise, imaging readouts, a waveform, an image and CLOSE.
SCAN = _scan()

#: Numbers that length fields and counters are set to: around the bounds of their types and of the limits.
_NUMBERS = (0, 1, 2, 5, 0x7F, 0xFF, 1024, 1025, 0x7FFF, 0xFFFF, 1 << 20, (1 << 20) + 1, 4 << 20, 1 << 28)
_NUMBERS += (0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, 0xFFFFFFFFFFFFFFFF)


def mutated_scan(draw: Callable[[int, int], int]) -> bytes:
    """`SCAN` after up to eight changes.

    Parameters
    ----------
    draw
        A whole number from the first to the second, both included: of a fuzzer, or of hypothesis.
    """
    messages = list(SCAN)
    for _ in range(draw(0, 8)):
        which = draw(0, len(messages) - 1)
        message = messages[which]
        at = draw(0, len(message))
        # What is announced stands at the front.
        front = min(at, draw(0, len(message)), 64)
        change = draw(0, 6)
        if change == 0:
            messages[which] = b""
        elif change == 1:
            messages.insert(draw(0, len(messages)), message)
        elif change == 2:
            other = draw(0, len(messages) - 1)
            messages[which], messages[other] = messages[other], message
        elif change == 3:
            messages[which] = message[:at]
        elif change == 4:
            messages[which] = message[:at] + bytes([draw(0, 255)]) + message[at + 1 :]
        elif change == 5:
            messages[which] = message[:at] + bytes([draw(0, 255)]) * draw(1, 600) + message[at:]
        else:
            width = 1 << draw(0, 3)
            number = struct.pack("<Q", _NUMBERS[draw(0, len(_NUMBERS) - 1)])[:width]
            messages[which] = message[:front] + number + message[front + width :]
    return b"".join(messages)
