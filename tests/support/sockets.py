"""What a process and those it started listen on and talk to, as Linux tells it."""

import socket
import struct
from pathlib import Path

LISTENING = "0A"
Address = tuple[str, int]


def family_of(pid: int) -> list[int]:
    """Return a process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def listeners(pids: list[int]) -> list[Address]:
    """Return where these processes listen for TCP or take in UDP, once for each socket."""
    found: list[Address] = []
    for pid in pids:
        inodes = _inodes(pid)
        for protocol in ("tcp", "tcp6", "udp", "udp6"):
            for local, state, inode in _table(pid, protocol):
                if inode in inodes and (state == LISTENING or protocol.startswith("udp")):
                    found.append(local)
    return found


def _inodes(pid: int) -> set[str]:
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except OSError:  # closed meanwhile
            continue
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def _table(pid: int, protocol: str) -> list[tuple[Address, str, str]]:
    rows = [line.split() for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]]
    return [(_address(row[1]), row[3], row[9]) for row in rows]


def _address(text: str) -> Address:
    host, port = text.split(":")
    words = [int(host[start : start + 8], 16) for start in range(0, len(host), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed), int(port, 16)
