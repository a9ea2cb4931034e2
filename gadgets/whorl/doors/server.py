"""A server for MRD streams: scanners (FIRE), MRD clients and Gadgetron's `<connect>`."""

from __future__ import annotations

import contextvars
import errno
import logging
import selectors
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

from whorl import __version__
from whorl.doors import session, wire
from whorl.doors.opening import Opening, read_opening
from whorl.doors.receivers import MrdClient, Receiver
from whorl.doors.sources import StreamSource
from whorl.doors.transport import Channel, StreamTimeout
from whorl.runtime.logs import event, new_scan
from whorl.runtime.memory import return_free_memory
from whorl.scan.failure import EndOfStream
from whorl.scan.header import patient_of

logger = logging.getLogger("whorl")

#: Connections that have not sent their header yet, or are told that they are refused.
MAX_WAITING = 64
#: So long a scan waits for a place: who has just read the end of one may send the next before it is free.
PLACE_S = 1.0
#: Time to tell those whose scan is given up; the grace and this fit into the 10 s that containers are given.
TELL_S = 1.5


class Server:
    """Listens, and reconstructs each connection's scan in a thread of its own.

    The sockets listen as soon as the object exists; `serve_forever` answers them.

    Parameters
    ----------
    host
        Address to listen on. For the loopback both the IPv4 and the IPv6 one are taken, because
        Gadgetron tries only the first to which "localhost" resolves; "0.0.0.0" or "::" mean all.
    port
        TCP port; 0 takes a free one, see `port`.
    properties
        Defaults of the properties; what a scan's sender sets counts more.
    max_scans
        Scans at the same time; one more is refused with a text.
    opening_timeout_s
        Time from the connection to the end of its header.
    grace_s
        When the server is stopped, scans that run may end within this time; then they are told and given up.
    log_patient
        Whether the log names the patient of each scan.
    reconstruct
        Stands in for `whorl.pipeline.scan.reconstruct_scan`.

    Raises
    ------
    OSError
        If the address cannot be listened on.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9002,
        properties: Mapping[str, object] | None = None,
        *,
        max_scans: int = 4,
        opening_timeout_s: float = 30.0,
        grace_s: float = 8.0,
        log_patient: bool = False,
        reconstruct: session.Reconstruct | None = None,
    ) -> None:
        self._operator = session.Operator(dict(properties or {}))
        self._max_scans = max_scans
        self._opening_timeout_s = opening_timeout_s
        self._grace_s = grace_s
        self._log_patient = log_patient
        self._reconstruct = reconstruct
        self._slots = threading.Semaphore(max_scans)
        self._lock = threading.Lock()
        self._links: dict[threading.Thread, _Link] = {}
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._listeners = _listen(host, port)
        self.port: int = self._listeners[0].getsockname()[1]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)

    def serve_forever(self) -> bool:
        """Serve until `shutdown`, or until SIGTERM or SIGINT if this is the main thread.

        Returns
        -------
        bool
            Whether all scans have ended; others were told that they are given up.
        """
        in_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if in_main else ()
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            if self._reconstruct is None:
                # Seconds, once, before the first scan and not within it; who connects meanwhile is queued.
                from whorl.pipeline.scan import reconstruct_scan

                self._reconstruct = reconstruct_scan
            event("listening", address=", ".join(_name(s.getsockname()) for s in self._listeners))
            self._accept()
        finally:
            all_ended = self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        return all_ended

    def shutdown(self) -> None:
        """Let `serve_forever` return; from any thread or signal handler. A second time: at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        # A full buffer means that it is woken already, a closed one that it has returned.
        with suppress(OSError):
            self._wake_writer.send(b"\0")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.shutdown()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in (*self._listeners, self._wake_reader):
                selector.register(listener, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self._wake_reader:
                        continue
                    assert isinstance(key.fileobj, socket.socket)
                    try:
                        connection, address = key.fileobj.accept()
                    except OSError as error:
                        # The peer may be gone already, or file descriptors may be short for a moment.
                        event("not accepted", logging.WARNING, text=str(error))
                        self._stopping.wait(0.05)
                        continue
                    self._start(connection, _name(address))

    def _start(self, connection: socket.socket, address: str) -> None:
        with suppress(OSError):  # gone already: its thread will see
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(Channel(connection, self._opening_timeout_s, received=b""), address)
        with self._lock:
            full = len(self._links) >= MAX_WAITING + self._max_scans
            if not full:
                thread = threading.Thread(target=self._serve, args=(connection, link), daemon=True)
                self._links[thread] = link
        if full:
            event("refused", logging.WARNING, peer=address, why=f"{len(self._links)} connections are open")
            with connection, suppress(OSError):
                wire.write_text(link.channel, "ERR too many connections are open: try again later")
                wire.write_close(link.channel)
            return
        thread.start()

    def _serve(self, connection: socket.socket, link: _Link) -> None:
        new_scan()
        link.context = contextvars.copy_context()
        try:
            with connection:
                try:
                    self._scan(link)
                except Exception as error:
                    logger.exception("internal error")
                    receiver = link.receiver or MrdClient(link.channel, session.say_to_log)
                    session.refuse(link.channel, None, receiver, f"internal error: {error!r}")
        finally:
            with self._lock:
                del self._links[threading.current_thread()]

    def _scan(self, link: _Link) -> None:
        channel = link.channel
        channel.limit_time(self._opening_timeout_s)
        try:
            opening = read_opening(channel)
        except (wire.ProtocolError, StreamTimeout, EndOfStream) as error:
            if isinstance(error, EndOfStream) and not channel.n_bytes:
                event("probe", logging.DEBUG, peer=link.address)
                return
            event("refused", logging.WARNING, peer=link.address)
            receiver: Receiver = MrdClient(channel, session.say_to_log)
            # Not kept: what never became a scan would drive scans out of the spool.
            session.refuse(channel, None, receiver, str(error))
            return
        if opening.dialect == "ping":
            self._answer_ping(link)
            return
        receiver = session.receiver_of(channel, opening)
        with session.on_this_machine(channel, opening, self._operator, receiver):
            link.source, link.receiver = StreamSource(channel, opening), receiver
            # Only who goes on after the header takes a place: the silent block nobody.
            channel.wait()
            if self._stopping.is_set():
                refused = "the server is being stopped: send it again later"
            elif self._slots.acquire(timeout=PLACE_S):
                refused = ""
            else:
                n = self._max_scans
                refused = f"{n} scans are being reconstructed, which is the limit: send it again later"
            if refused:
                event("refused", logging.WARNING, peer=link.address)
                link.over = True  # no scan that could be given up
                session.refuse(channel, link.source, receiver, refused)
                return
            try:
                self._run(link, opening, link.source, receiver)
            finally:
                return_free_memory()
                self._slots.release()
        link.over = True
        channel.linger(session.LINGER_S)

    def _answer_ping(self, link: _Link) -> None:
        # Not by way of a scan: it takes no place, and drives none out of the spool.
        event("ping", logging.DEBUG, peer=link.address)
        with self._lock:
            running = sum(other.source is not None and not other.over for other in self._links.values())
        if self._stopping.is_set():
            text = "ERR the server is being stopped"
        else:
            text = f"DBG whorl {__version__} answers: {running} of {self._max_scans} scans are being received"
        link.over = True
        with suppress(OSError):  # who asked did not wait: nothing was lost
            wire.write_text(link.channel, text)
            wire.write_close(link.channel)
            link.channel.linger(1.0)

    def _run(self, link: _Link, opening: Opening, source: StreamSource, receiver: Receiver) -> None:
        started = time.monotonic()
        event("begins", peer=link.address, dialect=opening.dialect)
        if self._log_patient:
            event("patient", **patient_of(opening.header))  # type: ignore[arg-type]
        assert self._reconstruct is not None
        code = session.run_scan(source, receiver, self._operator, self._reconstruct)
        event(
            "ends",
            code=code,
            images=receiver.delivered,
            readouts=link.channel.n_readouts,
            seconds=time.monotonic() - started,
        )

    def _end(self) -> bool:
        for listener in self._listeners:
            listener.close()
        with self._lock:
            links = dict(self._links)
        for link in links.values():
            if link.receiver is None:
                link.channel.interrupt()
        end = time.monotonic() + self._grace_s
        for thread in links:
            while thread.is_alive() and time.monotonic() < end and not self._hurry.is_set():
                thread.join(0.1)
        left = [link for thread, link in links.items() if thread.is_alive() and not link.over]
        tellers = [
            threading.Thread(target=link.context.run, args=(link.give_up,), daemon=True) for link in left
        ]
        for teller in tellers:
            teller.start()
        end = time.monotonic() + TELL_S
        for teller in tellers:  # who does not read is not waited for
            teller.join(max(end - time.monotonic(), 0.0))
        self._wake_reader.close()
        self._wake_writer.close()
        event("stopped", given_up=len(left))
        return not left


@dataclass(slots=True)
class _Link:
    """One connection, as far as it has come."""

    channel: Channel
    address: str
    source: StreamSource | None = None
    receiver: Receiver | None = None
    over: bool = False
    #: With the id of its scan, for what is logged about it by others than its own thread.
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def give_up(self) -> None:
        if self.receiver is not None:
            early = self.source is None or self.source.ended != "close"
            self.receiver.abandon(
                "the server was stopped before the scan was ready: send it again", early=early
            )
        self.channel.interrupt()


def _name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host in ("127.0.0.1", "::1", "localhost"):
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    if host in ("", "*", "0.0.0.0", "::"):
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _listen(host: str, port: int) -> list[socket.socket]:
    # With port 0 the free port of one family can be taken in the other; another one is tried then.
    for _ in range(8 if port == 0 else 0):
        with suppress(OSError):
            return _listen_once(host, port)
    return _listen_once(host, port)


def _listen_once(host: str, port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    for family, address in _addresses(host):
        listener: socket.socket | None = None
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            listener.listen(64)
        except OSError as error:
            if listener is not None:
                listener.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and family == socket.AF_INET6:
                continue  # a machine without IPv6
            for other in listeners:
                other.close()
            raise OSError(
                error.errno, f"cannot listen on {_name((address, port))}: {error.strerror or error}"
            ) from error
        listeners.append(listener)
        port = listener.getsockname()[1]
    if not listeners:
        raise OSError(errno.EADDRNOTAVAIL, f"cannot listen on {host}: no such address")
    return listeners
