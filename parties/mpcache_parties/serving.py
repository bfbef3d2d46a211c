"""Serve one session after another, and several at once, at a server or a dealer.

Each session has its own thread, links, ledger, seeds and masks, and nothing of it outlives it; what
is shared is read only: the model's weights and the document. One that fails says so and ends alone.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import NoReturn

import torch

from mpcache.config import Settings
from mpcache.console.signals import check_stop
from mpcache.errors import MpcacheError, told_as
from mpcache.rank import Rank
from mpcache_parties.network.listener import Listener
from mpcache_parties.network.session_network import Network
from mpcache_parties.network.tls import Trust
from mpcache_parties.say import Say

Serve = Callable[[Network, Say], None]  # one session, from its first stream to its end

AT_ONCE = 4  # sessions, unless told otherwise
STOP_S = 5.0  # for the sessions to end when this party is told to stop
LOOK_EVERY_S = 0.5  # whether it is


def serve_all(
    me: Rank, settings: Settings, trust: Trust, at_once: int, serve_one: Serve, say: Say,
    on_refused: Callable[[int], None] = lambda connections: None,
) -> NoReturn:  # fmt: skip
    """Take sessions until this process is told to stop. Raises PortInUse, ConfigError, or Stopped.

    on_refused: told of connections that are refused.
    """
    listener = Listener(me, settings, limit=at_once, trust=trust, say=say, on_refused=on_refused)
    address = settings.addresses.of(me)
    bound = settings.addresses.bound_by(me)
    where = f" (listening at {bound})" if bound != address else ""
    say(f"{me.label}: serving at {address}{where}, up to {at_once} session{'s' * (at_once > 1)} at once")
    threads: list[Thread] = []
    reason = f"{me.label} failed"
    try:
        while True:
            check_stop()
            network = listener.next(LOOK_EVERY_S)
            listener.say_strangers()
            threads = [thread for thread in threads if thread.is_alive()]
            if network is not None:
                threads.append(Thread(target=_session, args=(me, network, serve_one, say), daemon=True))
                threads[-1].start()
    except MpcacheError as stopped:
        reason = stopped.for_peers
        listener.refuse()
        _join(threads, STOP_S)  # they end after the token in flight
        raise
    finally:
        listener.close(reason)
        _join(threads, STOP_S)


def _join(threads: list[Thread], seconds: float) -> None:
    limit = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))


def _session(me: Rank, network: Network, serve_one: Serve, say_all: Say) -> None:
    assert network.session is not None
    name = f"{me.label}: session {network.session[:8]}: "

    def say(text: str) -> None:
        say_all(name + text.removeprefix(f"{me.label}: "))

    network.say = say
    torch.set_num_threads(1)  # counted per thread
    try:
        with network:
            serve_one(network, say)
    except (MpcacheError, OSError) as error:
        say(f"ended: {told_as(error)}")
    finally:
        del network, serve_one
        _give_back()


def _give_back() -> None:
    """Return what a session used to the system: the C library keeps freed memory per thread."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
