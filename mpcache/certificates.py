"""Make and read who a party is: a key that never leaves it, and a certificate that the others pin.

A certificate is signed by its own key and names the rank. Nobody vouches for it: the pins in the config
(`certificates`) say that it is the right one, so there is no authority that could be fooled. Keys are ECDSA
on P-256, because gRPC's TLS does not take Ed25519.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpcache.errors import ConfigError
from mpcache.rank import Rank

VALID = timedelta(days=3650)
SKEW = timedelta(days=1)  # clocks of three hosts differ
KEY_MODE = 0o600


@dataclass(frozen=True)
class Identity:
    """A party's own. key, certificate: PEM."""

    rank: Rank
    key: bytes
    certificate: bytes

    @staticmethod
    def files(folder: Path, rank: Rank) -> tuple[Path, Path]:
        """Return where the key and the certificate of this rank lie."""
        return folder / f"{rank.label}.key", folder / f"{rank.label}.crt"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both files; only the owner can read the key's. Raises ConfigError, also when there is one."""
        key, certificate = self.files(folder, self.rank)
        made: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if there := [file.name for file in (key, certificate) if os.path.lexists(file)]:
                what = f"holds an identity of the {self.rank.label} already ({' and '.join(there)})"
                raise ConfigError(f"{folder}: {what}; give another folder with --out, or move it away")
            for file, data, mode in ((key, self.key, KEY_MODE), (certificate, self.certificate, 0o644)):
                with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
                    made.append(file)
                    out.write(data)
        except OSError as error:
            for file in made:  # half an identity would be taken for one
                file.unlink(missing_ok=True)
            raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None
        return key, certificate

    @staticmethod
    def read(folder: Path, rank: Rank) -> Identity:
        """Read what `write` wrote. Raises ConfigError, also when others could read the key."""
        key_file, certificate_file = Identity.files(folder, rank)
        hint = f"make it with: mpcache-party keygen --rank {int(rank)} --out {folder}"
        found = []
        for file in (key_file, certificate_file):
            try:
                if file == key_file and file.stat().st_mode & 0o077:
                    raise ConfigError(f"{file}: others than its owner may read it; run chmod 600 on it")
                found.append(file.read_bytes())
            except OSError as error:
                raise ConfigError(f"{file}: cannot be read: {error.strerror}; {hint}") from None
        try:
            key = serialization.load_pem_private_key(found[0], password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(f"{key_file}: is not a private key in PEM; {hint}") from None
        try:
            (certificate,) = certificates_in(found[1].decode())
        except ValueError:
            raise ConfigError(f"{certificate_file}: is not one certificate in PEM; {hint}") from None
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{key_file}: is not the key of {certificate_file}; {hint}")
        return Identity(rank, found[0], found[1])


def make_identity(rank: Rank) -> Identity:
    """Make a new key from the system's entropy, and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host_of(rank))])
    now = datetime.now(UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_of(rank))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(rank, pem, certificate.public_bytes(serialization.Encoding.PEM))


def host_of(rank: Rank) -> str:
    """Return the name in a rank's certificate, wherever the party runs."""
    return f"{rank.label}.mpcache"


def rank_of(certificate: x509.Certificate) -> Rank | None:
    """Return the rank that a certificate names; None for a foreign one."""
    names = {attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)}
    return next((rank for rank in Rank if host_of(rank) in names), None)


def certificates_in(pem: str) -> list[x509.Certificate]:
    """Read certificates from PEM: none, one or several, as in the config. Raises ValueError."""
    if not pem.strip():
        return []
    found = x509.load_pem_x509_certificates(pem.encode())
    try:
        for certificate in found:  # the library reads names and keys when they are asked for, and fails then
            rank_of(certificate)
            certificate.public_key()
    except UnsupportedAlgorithm as error:
        raise ValueError("a key of a kind that is not known") from error
    return found


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the certificate, hex: what people compare by telephone."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def short_fingerprint(print_: str) -> str:
    """Return enough of a fingerprint to tell two apart in an error line."""
    return f"sha256:{print_[:16]}"
