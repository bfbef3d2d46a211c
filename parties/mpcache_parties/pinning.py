"""Run `mpcache-party pin`: tell a config whose certificates to take."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mpcache.certificates import certificates_in, fingerprint, rank_of, short_fingerprint
from mpcache.config import load_settings
from mpcache.errors import BadInput, ConfigError
from mpcache.rank import Rank
from mpcache_parties.network.tls import pins_of

SECTION = "certificates"


def pin(
    certificate: Annotated[list[Path], typer.Argument(help="Certificates, as keygen made them.")],
    config: Annotated[Path, typer.Option(help="The YAML file that gets them.")],
    replace: Annotated[bool, typer.Option("--replace", help="Instead of the rank's pinned ones.")] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Beside the rank's pinned ones: several clients.")
    ] = False,
) -> None:
    """Put certificates into the config: a party is then who shows one of its rank, and nobody else.

    Compare the printed fingerprints with what keygen printed at the other parties.
    """
    if replace and add:
        raise BadInput("--replace and --add: give one of them")
    settings = load_settings(config)
    pins = pins_of(settings)
    given: dict[Rank, list[x509.Certificate]] = {}
    for file in certificate:
        for found in _read_certificates(file):
            rank = rank_of(found)
            if rank is None:
                raise ConfigError(f"{file}: names no rank; make it with mpcache-party keygen")
            if pins[rank] and found not in pins[rank] and not (replace or add):
                prints = " or ".join(short_fingerprint(fingerprint(each)) for each in pins[rank])
                new = short_fingerprint(fingerprint(found))
                raise ConfigError(
                    f"{config}: {rank.label} is pinned to {prints}, {file} is {new}; "
                    "give --replace, or --add to take both"
                )
            given.setdefault(rank, []).append(found)
    for rank, some in given.items():
        pins[rank] = list(dict.fromkeys(some if replace else [*pins[rank], *some]))
    _write_section(config, pins)
    for rank, some in pins.items():
        for each in some:
            print(f"{rank.label} sha256:{fingerprint(each)}")


def _read_certificates(file: Path) -> list[x509.Certificate]:
    try:
        found = certificates_in(file.read_text(encoding="ascii"))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        found = []
    if not found:
        raise BadInput(f"{file}: is not a certificate in PEM; give the .crt files that keygen made")
    return found


def certificates_section(pins: Mapping[Rank, list[x509.Certificate]]) -> str:
    """Return the config's section, with fingerprints beside the certificates for people."""
    lines = [f"{SECTION}:  # written by mpcache-party pin"]
    for rank, some in pins.items():
        if some:
            lines += [f"  # {rank.label} sha256:{fingerprint(each)}" for each in some]
            lines.append(f"  {rank.label}: |")
            pem = "".join(each.public_bytes(Encoding.PEM).decode() for each in some)
            lines += [f"    {line}" for line in pem.splitlines()]
    return "\n".join(lines) + "\n"


def _write_section(config: Path, pins: Mapping[Rank, list[x509.Certificate]]) -> None:
    """Exchange the section in the file, and leave everything else in it, comments too. Atomic."""
    try:
        text = config.read_text(encoding="utf-8")
        rest = re.sub(
            rf"^{SECTION}:.*\n(?:[ \t].*\n|\n)*", "", text + "\n" * (not text.endswith("\n")), flags=re.M
        )
        new = rest.rstrip("\n") + "\n\n" + certificates_section(pins)
        handle, name = tempfile.mkstemp(dir=config.parent, prefix=config.name)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(new)
        os.chmod(name, config.stat().st_mode & 0o777)
        os.replace(name, config)
    except OSError as error:
        raise ConfigError(f"{config}: cannot be written: {error.strerror}") from None
