"""Run `mpcache-party keygen`: make a party's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcache.certificates import fingerprint, make_identity
from mpcache.rank import Rank


def keygen(
    rank: Annotated[int, typer.Option(min=0, max=2, help="0: server, 1: client, 2: dealer.")],
    out: Annotated[Path, typer.Option(help="Folder for the key and the certificate.")],
) -> None:
    """Make this party's key and certificate. Only the certificate is for the others."""
    identity = make_identity(Rank(rank))
    key, certificate = identity.write(out)
    print(f"{key}: the key; keep it here")
    print(f"{certificate}: the certificate; give it to the other two parties")
    print(f"{identity.rank.label} sha256:{fingerprint(identity.shown)}")
