"""The address that is listened on: by one process alone, or by several that share it."""

import socket

from bln_serve.errors import UsageError

_BACKLOG = 2048


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Listen on an address.

    Args:
        host: a name or a number; of several addresses that a name has, the first is taken.
        port: 0 for any free one.
        shared: whether other processes of this user may listen there too; the system spreads connections over them.

    Raises:
        UsageError: the address cannot be listened on, or not by several.
    """
    listener = _bound(host, port, shared=shared)
    listener.listen(_BACKLOG)
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Take an address for processes that will share it. Whoever connects before one of them listens is refused.

    Args:
        host: as for `listen`.
        port: 0 for any free one.

    Raises:
        UsageError: the address cannot be listened on, or not by several, or somebody else listens there.
    """
    if port:
        # Whoever shares the port would not be refused, and would share its connections with a stranger's.
        _bound(host, port).close()
    return _bound(host, port, shared=True)


def url(listener: socket.socket) -> str:
    """Return the URL under which a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    if shared and not hasattr(socket, "SO_REUSEPORT"):
        raise UsageError(
            "Expected a system on which several processes may listen on one port. Received: one without SO_REUSEPORT. "
            "Start the service with --workers 1."
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"Expected an address to listen on. Received: {host} port {port}: {error.strerror}. "
            "Give another --host or --port; port 0 takes any free one."
        ) from error
    return listener
