"""Look at what listens where a peer should, when it is not a party."""

from __future__ import annotations

import socket

PROBE_S = 2.0


def foreign_program_at(address: str) -> str | None:
    """Return what is wrong with the program that listens there.

    None if it speaks HTTP/2 or TLS, or if nobody listens. Blocks for PROBE_S at most.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as probe:
            probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            frame = probe.recv(9)
    except TimeoutError:
        return "it does not answer"
    except OSError:
        return None
    if not frame or frame[3:4] == b"\x04" or frame[:1] == b"\x15":  # SETTINGS, or an alert of TLS
        return None
    return "it does not speak gRPC"
