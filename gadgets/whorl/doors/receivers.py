"""Who gets the images and is told what happened, each in his own way.

* Gadgetron takes a TEXT for a broken stream, and an ERROR only after its CLOSE was read. What is said
  during the scan goes to the log; failures are one ERROR between its CLOSE and ours.
* MRD clients and FIRE abort at an ERROR. Here TEXT is the log, its first three letters are the level;
  a failure is sent at once, and CLOSE always comes at the end.
* Behind a pipe nothing but header and images may be written. Texts go to stderr, and the end of the
  stream is only marked if something was delivered: an empty result must not look like one.
* A file is a pipe's reader that has no stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import ismrmrd

from whorl.doors import wire
from whorl.doors.transport import Channel

if TYPE_CHECKING:
    from whorl.doors import files, mrd2

#: Letters of one text; operators read sentences.
MAX_TEXT = 4000
#: DBG texts that are sent to one receiver; all of them are said to the operator.
MAX_DEBUG_TEXTS = 400

Say = Callable[[str, str], None]


class Receiver:
    """Takes images, what is said and what failed. Thread-safe; after the end nothing is sent any more.

    Parameters
    ----------
    say
        Takes (level, text), level being ``DBG``, ``WRN`` or ``ERR``: the log of a server, or stderr.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._said: set[tuple[str, str]] = set()
        self._n_debug = 0
        self._over = False
        self.failures: list[str] = []
        self.delivered = 0
        self.gone = False

    # --- What differs between receivers ---------------------------------------------------------

    def _image(self, image: ismrmrd.Image) -> None:
        raise NotImplementedError

    def _tell(self, level: str, text: str) -> None:
        """Say something in the receiver's channel, if he has one for it."""

    def _end(self) -> None:
        """Say what failed, if that is said at the end, and end the stream."""

    # --- What is the same -----------------------------------------------------------------------

    def image(self, image: ismrmrd.Image) -> None:
        """Send one image; `ConnectionError` if the receiver is gone or the scan was given up."""
        self.explain(image)
        self.delivered += 1

    def explain(self, image: ismrmrd.Image) -> None:
        """Send an image that is no result, but says why there is none; errors as `image`."""
        with self._lock:
            if self._over:
                raise ConnectionError("the scan was given up")
            if self.gone:  # perhaps within a message: nothing may follow that, and nobody is waited for twice
                raise ConnectionError("the receiver is gone")
            try:
                self._image(image)
            except OSError as error:
                self.gone = True
                raise ConnectionError(f"the receiver does not take images any more: {error}") from error

    def log(self, level: str, text: str) -> None:
        """Say something; warnings and errors once, and an error is a failure of the scan."""
        text = text[:MAX_TEXT]
        with self._lock:
            if level == "DBG":
                self._n_debug += 1
            elif (level, text) in self._said:
                return
            else:
                self._said.add((level, text))
            if level == "ERR":
                self.failures.append(text)
            self._say(level, text)
            if level != "DBG" or self._n_debug <= MAX_DEBUG_TEXTS:
                self._send(lambda: self._tell(level, text))

    def finish(self) -> None:
        """Everything was said: end the stream."""
        with self._lock:
            self._send(self._end)
            self._over = True

    def abandon(self, text: str, *, early: bool) -> None:
        """Say why the scan is given up and end the stream, whatever is still under way.

        Parameters
        ----------
        text
            The reason.
        early
            Whether its readouts are still coming.
        """
        if not self._over:
            self.log("ERR", text)
            self.finish()

    def _send(self, send: Callable[[], None]) -> None:
        if self.gone or self._over:
            return
        try:
            send()
        except OSError as error:
            self.gone = True
            self._say("WRN", f"the receiver is gone: {error}")


class Gadgetron(Receiver):
    """Gadgetron, to which this program is an external.

    Parameters
    ----------
    channel
        Its connection.
    say
        See `Receiver`.
    send_close
        Whether CLOSE is sent at the end, or by somebody else.
    """

    def __init__(self, channel: Channel, say: Say, *, send_close: bool = True) -> None:
        super().__init__(say)
        self._channel, self._send_close = channel, send_close

    def _image(self, image: ismrmrd.Image) -> None:
        wire.write_image(self._channel, image)

    def _end(self) -> None:
        if self.failures:
            text = "whorl: " + "; ".join(self.failures)
            wire.write_error(self._channel, text[:MAX_TEXT])
        if self._send_close:
            wire.write_close(self._channel)

    def abandon(self, text: str, *, early: bool) -> None:
        """As `Receiver.abandon`; while its readouts come Gadgetron may crash at an ERROR, so it is left."""
        self.gone = self.gone or early
        super().abandon(text, early=early)


class MrdClient(Receiver):
    """An MRD client, or FIRE."""

    def __init__(self, channel: Channel, say: Say) -> None:
        super().__init__(say)
        self._channel = channel

    def _image(self, image: ismrmrd.Image) -> None:
        wire.write_image(self._channel, image)

    def _tell(self, level: str, text: str) -> None:
        wire.write_text(self._channel, f"{level} {text}")

    def _end(self) -> None:
        wire.write_close(self._channel)


class PipeReader(Receiver):
    """A program that reads an MRD version 1 stream: header, images, CLOSE."""

    def __init__(self, channel: Channel, header: bytes, say: Say) -> None:
        super().__init__(say)
        self._channel, self._header = channel, header
        self._begun = False

    def _image(self, image: ismrmrd.Image) -> None:
        if not self._begun:
            wire.write_header(self._channel, self._header, terminate=False)
            self._begun = True
        wire.write_image(self._channel, image)

    def _end(self) -> None:
        if self._begun:
            wire.write_close(self._channel)


class Mrd2Reader(Receiver):
    """A program that reads an MRD version 2 stream: header, images, end mark."""

    def __init__(self, channel: Channel, header: mrd2.Header, say: Say) -> None:
        super().__init__(say)
        self._channel, self._header = channel, header
        self._writer: mrd2.Writer | None = None

    def _image(self, image: ismrmrd.Image) -> None:
        if self._writer is None:
            from whorl.doors import mrd2

            self._writer = mrd2.Writer(self._channel, self._header)
        self._writer.image(image)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class File(Receiver):
    """A file with the images of a result."""

    def __init__(self, result: files.ResultFile, say: Say) -> None:
        super().__init__(say)
        self._result = result

    def _image(self, image: ismrmrd.Image) -> None:
        self._result.append(image)
