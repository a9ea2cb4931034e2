"""A server for MRD streams: scanners (FIRE), MRD clients and Gadgetron's `<connect>`."""

from __future__ import annotations

import errno
import logging
import selectors
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

from whorl.doors import session, wire
from whorl.scan.failure import EndOfStream

logger = logging.getLogger("whorl")

#: Connections that have not sent their header yet, or are told that they are refused.
MAX_WAITING = 64
#: Scans that still run when the server is stopped have so long to say so.
GRACE_S = 8.0


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
    idle_timeout_s
        Longest silence within a scan.
    opening_timeout_s
        Time from the connection to the end of its header.
    reconstruct
        Stands in for `whorl.pipeline.reconstruct_scan`.

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
        idle_timeout_s: float = 600.0,
        opening_timeout_s: float = 30.0,
        reconstruct: session.Reconstruct | None = None,
    ) -> None:
        self._properties = dict(properties or {})
        self._max_scans = max_scans
        self._idle_timeout_s = idle_timeout_s
        self._opening_timeout_s = opening_timeout_s
        self._reconstruct = reconstruct
        self._slots = threading.Semaphore(max_scans)
        self._lock = threading.Lock()
        self._channels: dict[threading.Thread, wire.Channel] = {}
        self._n_connections = 0
        self._stopping = threading.Event()
        self._listeners = _listen(host, port)
        self.port: int = self._listeners[0].getsockname()[1]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)

    def serve_forever(self) -> None:
        """Serve until `shutdown`, or until SIGTERM or SIGINT if this is the main thread."""
        in_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if in_main else ()
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            if self._reconstruct is None:
                # Seconds, once, before the first scan and not within it; who connects meanwhile is queued.
                from whorl.pipeline import reconstruct_scan
                from whorl.recon.inr import warm_up

                warm_up()
                self._reconstruct = reconstruct_scan
            logger.info("listening on %s", ", ".join(_name(s.getsockname()) for s in self._listeners))
            self._accept()
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def shutdown(self) -> None:
        """Let `serve_forever` return; from any thread or signal handler."""
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
                        logger.warning("a connection could not be accepted: %s", error)
                        self._stopping.wait(0.05)
                        continue
                    self._start(connection, _name(address))

    def _start(self, connection: socket.socket, address: str) -> None:
        with suppress(OSError):  # gone already: its thread will see
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = wire.Channel(connection, self._idle_timeout_s)
        with self._lock:
            self._n_connections += 1
            label = f"scan {self._n_connections}: "
            full = len(self._channels) >= MAX_WAITING + self._max_scans
            if not full:
                thread = threading.Thread(
                    target=self._serve,
                    args=(connection, channel, label, address),
                    name=label.strip(": "),
                    daemon=True,
                )
                self._channels[thread] = channel
        if full:
            logger.warning("%srefused, %d connections are open", label, MAX_WAITING + self._max_scans)
            with connection, suppress(OSError):
                wire.write_text(channel, "ERR too many connections are open: try again later")
                wire.write_close(channel)
            return
        thread.start()

    def _serve(self, connection: socket.socket, channel: wire.Channel, label: str, address: str) -> None:
        try:
            with connection:
                try:
                    self._scan(channel, label, address)
                except Exception as error:
                    logger.exception("%sinternal error", label)
                    session.refuse(channel, None, f"internal error: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                del self._channels[threading.current_thread()]

    def _scan(self, channel: wire.Channel, label: str, address: str) -> None:
        channel.limit_time(self._opening_timeout_s)
        try:
            opening = session.read_opening(channel)
        except (wire.ProtocolError, wire.StreamTimeout, EndOfStream) as error:
            if isinstance(error, EndOfStream) and not channel.n_bytes:
                logger.debug("%s%s connected and said nothing", label, address)
                return
            logger.warning("%srefused, %s", label, address)
            session.refuse(channel, None, str(error))
            return
        channel.limit_time(None)
        # Only who goes on after the header takes a place: the silent block nobody.
        channel.wait(self._idle_timeout_s)
        if not self._slots.acquire(blocking=False):
            text = f"{self._max_scans} scans are being reconstructed, which is the limit: send it again later"
            logger.warning("%srefused, %s", label, address)
            session.refuse(channel, opening, text)
            return
        started = time.monotonic()
        try:
            kind = "Gadgetron" if opening.gadgetron else "MRD client"
            logger.info("%sbegins, %s at %s", label, kind, address)
            assert self._reconstruct is not None
            code = session.run_scan(
                channel, opening, reconstruct=self._reconstruct, defaults=self._properties, label=label
            )
        finally:
            self._slots.release()
        logger.info(
            "%sends with code %d after %.1f s, %d readouts",
            label,
            code,
            time.monotonic() - started,
            channel.n_readouts,
        )
        channel.linger(session.LINGER_S)

    def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        with self._lock:
            open_now = dict(self._channels)
        for channel in open_now.values():
            channel.interrupt()
        end = time.monotonic() + GRACE_S
        for thread in open_now:
            thread.join(max(end - time.monotonic(), 0.0))
        self._wake_reader.close()
        self._wake_writer.close()
        logger.info("stopped")


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
