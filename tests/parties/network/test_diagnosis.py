"""What a party says of a link that does not come about: which one it is, and why."""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpcache.certificates import Identity, fingerprint, make_identity
from mpcache.config import Addresses, Settings, Timeouts
from mpcache.errors import ConfigError, LinkError, MpcacheError
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.network import probe
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.listener import Listener
from mpcache_parties.network.probe import Unreached, reach
from mpcache_parties.network.tls import trust
from tests.support.identities import certificate_of, pinned, trusts
from tests.support.links import free_ports, free_settings

S, C, D = Rank
OVER = "the test is over"  # a reason: nobody waits for the other's end


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ECONNREFUSED, "x"), "refused: its host answers, and nobody listens there"),
        (OSError(errno.EHOSTUNREACH, "x"), "no route to its host"),
        (OSError(errno.ENETUNREACH, "x"), "no route to its network"),
        (TimeoutError(), "timed out: its host, or a firewall, is silent"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "its name is not known"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "its name cannot be looked up: no name server answers"),
        (OSError(errno.EPERM, "Operation not permitted"), "Operation not permitted"),
    ],
)
def test_a_dial_fails_for_a_reason(error: OSError, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    where = "socket.getaddrinfo" if isinstance(error, socket.gaierror) else "socket.socket.connect"
    monkeypatch.setattr(where, fail)
    with pytest.raises(Unreached) as caught:
        reach("127.0.0.1:9", 0.1)
    assert str(caught.value) == words


@pytest.mark.parametrize(("first_word_s", "found"), [(0.5, None), (2.0, "it does not answer")])
def test_a_party_on_a_busy_machine_may_be_slow_to_speak(
    first_word_s: float, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 0.1)
    monkeypatch.setattr(probe, "SILENCE_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as busy, ThreadPoolExecutor(1) as pool:

        def speak() -> None:
            caller, _ = busy.accept()
            with caller:
                time.sleep(first_word_s)
                caller.sendall(b"\0\0\0\x04\0\0\0\0\0")  # SETTINGS

        speaking = pool.submit(speak)
        assert probe.foreign_program_at(f"127.0.0.1:{busy.getsockname()[1]}") == found
        speaking.exception(timeout=5)


def ended(rank: Rank, settings: Settings, **more: Any) -> str:
    with pytest.raises(LinkError) as caught:
        connect_all(rank, settings, Ledger(), **more)
    return str(caught.value)


def unknown(host: str, real: Callable[..., Any] = socket.getaddrinfo) -> Callable[..., Any]:
    """A resolver that does not know this host."""

    def look_up(name: str, *rest: Any, **more: Any) -> Any:
        if name == host:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *rest, **more)

    return look_up


def test_the_last_line_names_each_missing_peer_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unknown("dealer.invalid"))
    settings = free_settings(connect_s=5)
    settings = settings.model_copy(
        update={"addresses": Addresses(server=settings.addresses.server, dealer="dealer.invalid:7102")}
    )
    said: list[str] = []
    line = ended(C, settings, say=said.append)
    assert re.search(r"server at 127.0.0.1:\d+ \(refused: its host answers, and nobody listens there\)", line)
    assert "dealer at dealer.invalid:7102 (its name is not known)" in line
    assert "after 5 s; start it, check `addresses`" in line


def test_the_missing_link_is_named_and_no_healthy_one() -> None:
    """A firewall between client and server alone: the dealer, which is healthy, gives up first."""
    good = free_settings(connect_s=9)
    blocked = Addresses(server=f"127.0.0.1:{free_ports(1)[0]}", dealer=good.addresses.dealer)
    patience = {S: 9.0, C: 30.0, D: 4.0}

    def party(rank: Rank) -> str:
        timeouts = Timeouts(connect_s=patience[rank])
        addresses = blocked if rank is C else good.addresses
        return ended(rank, good.model_copy(update={"timeouts": timeouts, "addresses": addresses}))

    with ThreadPoolExecutor(3) as pool:
        server, client, dealer = pool.map(party, Rank)
    assert client.startswith(
        f"client: no connection to server at {blocked.server} (refused: its host answers"
    )
    assert "gave up waiting for server to connect to" in dealer
    assert "(it does when the client has reached it)" in dealer
    assert "gave up waiting for client to connect to" in server and "dealer" not in server


# ---------------------------------------------------------------------------------- who was refused


def test_a_serving_party_tells_whom_it_took_and_whom_it_refused(tmp_path: Path) -> None:
    identities = [make_identity(S), make_identity(C), make_identity(D)]
    settings = pinned(free_settings(connect_s=20), identities)
    server, client, dealer = trusts(settings, identities, tmp_path)
    swapped = Identity(C, identities[S].key, identities[S].certificate)  # the server's, as the client
    swapped.write(tmp_path / "swapped")
    as_client = pinned(settings, [identities[S], swapped, identities[D]])
    stranger = make_identity(C)
    (unpinned,) = trusts(
        pinned(settings, [identities[S], stranger, identities[D]]), [stranger], tmp_path / "no"
    )
    said: list[str] = []
    with closing(Listener(D, settings, limit=2, trust=dealer, say=said.append)) as listener:
        connect_all(C, settings, Ledger(), peers=[D], trust=client).close(OVER)
        mine = fingerprint(certificate_of(identities[C]))
        assert re.fullmatch(
            rf"dealer: session \w{{8}}: client is 127.0.0.1:\d+ with certificate sha256:{mine}", said[0]
        )
        with pytest.raises(LinkError, match="dealer refused: the server's certificate is shown"):
            connect_all(
                C, as_client, Ledger(), peers=[D], trust=trust(C, as_client, tmp_path / "swapped", False)
            )
        theirs = fingerprint(certificate_of(identities[S]))
        assert re.match(
            rf"dealer: refused 127.0.0.1:\d+ with certificate sha256:{theirs}: the server's", said[1]
        )
        with pytest.raises(LinkError, match="refuses client's certificate"):
            connect_all(C, settings, Ledger(), peers=[D], trust=unpinned)
        limit = time.monotonic() + 20
        while len(said) < 3 and time.monotonic() < limit:
            listener.say_strangers()
            time.sleep(0.1)
        assert re.match(r"dealer: refused \d+ connections at 127.0.0.1:\d+: it shows no pinned", said[2])
        assert len(said) == 3


def test_a_caller_that_comes_again_and_again_does_not_fill_the_log() -> None:
    settings = free_settings()
    said: list[str] = []
    refused: list[int] = []
    with closing(Listener(D, settings, limit=1, say=said.append, on_refused=refused.append)):
        first = connect_all(C, settings, Ledger(), peers=[D])
        for _ in range(5):
            assert "dealer serves 1 session at once" in ended(C, settings, peers=[D])
        first.close(OVER)
    assert len(said) < 5 and "dealer: refused 127.0.0.1:" in said[1]
    assert sum(refused) == 5  # each one counts


# ------------------------------------------------------------------------------------------ --listen


def test_a_party_binds_another_address_than_the_public_one() -> None:
    settings = free_settings()
    behind = Addresses(server="127.0.0.1:1", dealer="192.0.2.1:7102", bind=settings.addresses.dealer)
    with ThreadPoolExecutor(1) as pool:
        dealer = pool.submit(
            connect_all, D, settings.model_copy(update={"addresses": behind}), Ledger(), peers=[C]
        )
        connect_all(C, settings, Ledger(), peers=[D]).close(OVER)
        dealer.result(60).close(OVER)
    alone = behind.model_copy(update={"bind": f"127.0.0.1:{free_ports(1)[0]}"})
    line = ended(D, Settings(addresses=alone, timeouts=Timeouts(connect_s=0.5)))
    assert f"client to connect to 192.0.2.1:7102 (listening at {alone.bind})" in line


def test_an_address_of_another_machine_tells_of_listen() -> None:
    settings = Settings(addresses=Addresses(dealer="192.0.2.1:7102"))
    with pytest.raises(
        ConfigError, match=r"Cannot assign requested address: .*give --listen 0\.0\.0\.0:7102"
    ):
        connect_all(D, settings, Ledger())


def test_listening_to_other_hosts_needs_tls() -> None:
    settings = Settings(addresses=Addresses(bind="0.0.0.0:7102"))
    with pytest.raises(ConfigError, match="--listen 0.0.0.0:7102 is open to other hosts"):
        trust(D, settings, None, False)
    assert not trust(D, settings, None, True).tls


def test_a_bad_listen_names_the_flag() -> None:
    from mpcache_parties.party_options import PartyOptions

    with pytest.raises(MpcacheError, match=r"--listen is '::1:80': must be \[IPV6\]:PORT"):
        PartyOptions(D, listen="::1:80").settings()
    with pytest.raises(MpcacheError, match="--listen belongs to the server and the dealer"):
        PartyOptions(C, listen="[::1]:80").settings()
    assert PartyOptions(D, listen="[::1]:80").settings().addresses.bound_by(D) == "[::1]:80"
