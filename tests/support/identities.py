"""Identities of several parties, and the settings that pin them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from mpcache.certificates import Identity
from mpcache.config import Certificates, Settings
from mpcache.rank import Rank
from mpcache_parties.network.tls import Trust, trust


def pinned(settings: Settings, identities: Sequence[Identity]) -> Settings:
    """The settings with these certificates."""
    pins = {r.label: "".join(i.certificate.decode() for i in identities if i.rank is r) for r in Rank}
    return settings.model_copy(update={"certificates": Certificates(**pins)})


def certificate_of(identity: Identity) -> x509.Certificate:
    return identity.shown


def trusts(settings: Settings, identities: Sequence[Identity], folder: Path) -> list[Trust]:
    """What each of these takes for whom, its files in a folder of its own."""
    found = []
    for n, identity in enumerate(identities):
        identity.write(folder / str(n))
        found.append(trust(identity.rank, settings, folder / str(n), False))
    return found
