"""Certificates over real connections: several of one rank, of an older release, and of other dates."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from mpcache.certificates import FIRST_DAY, LAST_DAY, Identity, fingerprint, make_identity, shared_name
from mpcache.config import Certificates, Settings
from mpcache.errors import ConfigError, LinkError
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import agree
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.listener import Listener
from mpcache_parties.network.tls import Trust, trust
from mpcache_parties.pinning import pin
from tests.support.links import free_settings
from tests.support.old_identity import old_identity

S, C, D = Rank


def pinned(settings: Settings, identities: Sequence[Identity]) -> Settings:
    """The settings with these certificates."""
    pins = {r.label: "".join(i.certificate.decode() for i in identities if i.rank is r) for r in Rank}
    return settings.model_copy(update={"certificates": Certificates(**pins)})


def certificate_of(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(identity.certificate)


def trusts(settings: Settings, identities: Sequence[Identity], folder: Path) -> list[Trust]:
    """What each of these takes for whom, its files in a folder of its own."""
    found = []
    for n, identity in enumerate(identities):
        identity.write(folder / str(n))
        found.append(trust(identity.rank, settings, folder / str(n), False))
    return found


def serve_one(listener: Listener, settings: Settings) -> None:
    network = listener.next(60)
    assert network is not None
    with network:
        network.wait()
        agree(network.links, listener.rank, settings.public.flat())


@pytest.mark.parametrize("oldest_first", [None, True, False])
def test_three_pinned_clients_reach_one_server_and_dealer(oldest_first: bool | None, tmp_path: Path) -> None:
    """All at once; one of the three may have its identity from 0.1.0."""
    old = [] if oldest_first is None else [old_identity(C)]
    new = [make_identity(C) for _ in range(3 - len(old))]
    clients = old + new if oldest_first else new + old
    identities = [make_identity(S), make_identity(D), *clients]
    settings = pinned(free_settings(), identities)
    server, dealer, *trusted = trusts(settings, identities, tmp_path)

    def ask(trust: Trust) -> None:
        with connect_all(C, settings, Ledger(), trust=trust) as network:
            agree(network.links, C, settings.public.flat())

    with (
        closing(Listener(S, settings, limit=3, trust=server)) as at_server,
        closing(Listener(D, settings, limit=3, trust=dealer)) as at_dealer,
        ThreadPoolExecutor(9) as pool,
    ):
        jobs = [pool.submit(serve_one, there, settings) for there in (at_server, at_dealer) for _ in clients]
        jobs += [pool.submit(ask, one) for one in trusted]
        for job in jobs:
            job.result(60)


def test_a_certificate_has_a_name_of_its_own_and_never_expires() -> None:
    first, second = (certificate_of(make_identity(C)) for _ in range(2))
    assert first.subject != second.subject and first.issuer == first.subject
    own = first.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    by = first.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert own.digest == by.key_identifier
    assert (first.not_valid_before_utc, first.not_valid_after_utc) == (FIRST_DAY, LAST_DAY)


def test_old_certificates_that_share_a_name_are_told_what_to_do(tmp_path: Path) -> None:
    """By `pin --add`, and by a party whose config has them already."""
    old = [old_identity(C), old_identity(C)]
    assert shared_name([certificate_of(old[0])]) is None
    words = r"share a name, as mpcache 0.1.0 made them, and TLS takes the first alone; make new ones"
    config = tmp_path / "session.yaml"
    config.write_text("")
    files = [identity.write(tmp_path / str(n))[1] for n, identity in enumerate(old)]
    pin([files[0]], config)
    before = config.read_text()
    with pytest.raises(ConfigError, match=words):
        pin([files[1]], config, add=True)
    assert config.read_text() == before
    identities = [make_identity(S), make_identity(D), *old]
    with pytest.raises(ConfigError, match=f"certificates.client: sha256:.*{words}"):
        trusts(pinned(free_settings(), identities), identities[:1], tmp_path / "homes")


# ------------------------------------------------------------------------------------------- dates


def dated(rank: Rank, first: int, last: int) -> Identity:
    """An identity that is valid from so many days from now, to so many."""
    now = datetime.now(UTC)
    return make_identity(rank, now + timedelta(days=first), now + timedelta(days=last))


@pytest.mark.parametrize(("first", "last"), [(3, 10), (-10, -3)])
def test_an_identity_of_other_dates_is_told_at_its_start(first: int, last: int, tmp_path: Path) -> None:
    identities = [make_identity(S), dated(C, first, last), make_identity(D)]
    settings = pinned(free_settings(), identities)
    with pytest.raises(
        ConfigError, match=r"client.crt: is valid from .* UTC, and it is .* here; set the clock"
    ):
        trusts(settings, identities[1:2], tmp_path)
    (server,) = trusts(settings, identities[:1], tmp_path / "server")
    (warning,) = server.warnings()
    assert warning.startswith(
        f"client's pinned certificate sha256:{fingerprint(certificate_of(identities[1]))[:16]}"
    )


def test_a_dealer_of_other_dates_is_named_by_who_dials_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = [make_identity(S), make_identity(C), dated(D, 3, 10)]
    settings = pinned(free_settings(connect_s=8), identities)
    (client,) = trusts(settings, identities[1:2], tmp_path)
    with monkeypatch.context() as patch:  # its own clock stands in the time of its certificate
        patch.setattr("mpcache_parties.network.tls.dates_refuse", lambda _: None)
        (dealer,) = trusts(settings, identities[2:], tmp_path / "dealer")
    words = r"dealer's certificate sha256:\w{16} is valid from .*; set the clock, or make a new one"
    with closing(Listener(D, settings, trust=dealer)), pytest.raises(LinkError, match=words):
        connect_all(C, settings, Ledger(), peers=[D], trust=client)
