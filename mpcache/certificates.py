"""Make and read who a party is: a key that never leaves it, and a certificate that the others pin.

A certificate is signed by its own key and names the rank. Nobody vouches for it: the pins in the config
(`certificates`) say that it is the right one, so there is no authority that could be fooled, and a pin is
taken back by removing it: certificates never expire. TLS finds a pinned certificate by its subject, so a
subject holds the key's digest beside the rank. Keys are ECDSA on P-256, because gRPC's TLS does not take
Ed25519.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpcache.errors import ConfigError
from mpcache.rank import Rank

# The widest dates that a certificate can say (RFC 5280, 4.1.2.5): what a clock shows is no reason to refuse.
FIRST_DAY = datetime(1970, 1, 1, tzinfo=UTC)
LAST_DAY = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
KEY_MODE = 0o600


@dataclass(frozen=True)
class Identity:
    """A party's own. key, certificate: PEM."""

    rank: Rank
    key: bytes
    certificate: bytes

    @property
    def shown(self) -> x509.Certificate:
        """Return the certificate that the others are shown, and compare with their pins."""
        return x509.load_pem_x509_certificate(self.certificate)

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


def make_identity(rank: Rank, begins: datetime = FIRST_DAY, ends: datetime = LAST_DAY) -> Identity:
    """Make a new key from the system's entropy, and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    key_id = x509.SubjectKeyIdentifier.from_public_key(public)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, host_of(rank)),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, key_id.digest.hex()),
        ]
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id)
    certificate = (
        x509.CertificateBuilder(name, name, public, x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_of(rank))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(key_id, critical=False)
        .add_extension(authority, critical=False)
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


def dates_refuse(certificate: x509.Certificate) -> str | None:
    """Say why this machine's clock makes TLS refuse a certificate; None if it does not."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(UTC)
    if begins <= now <= ends:
        return None
    times = [f"{time:%Y-%m-%d %H:%M}" for time in (begins, ends, now)]
    return f"is valid from {times[0]} to {times[1]} UTC, and it is {times[2]} here"


def shared_name(certificates: Sequence[x509.Certificate]) -> str | None:
    """Say which of a rank's certificates TLS cannot tell apart, as 0.1.0 made them; None if it can."""
    subjects = [each.subject for each in certificates]
    alike = [each for each in certificates if subjects.count(each.subject) > 1]
    if not alike:
        return None
    prints = " and ".join(short_fingerprint(each) for each in alike)
    return (
        f"{prints} share a name, as mpcache 0.1.0 made them, and TLS takes the first alone; "
        "make new ones with mpcache-party keygen, and pin them with --replace in every config"
    )


def certificates_in(pem: str) -> list[x509.Certificate]:
    """Read certificates from PEM: none, one or several, as in the config. Raises ValueError."""
    if not pem.strip():
        return []
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
        for certificate in found:  # the library reads names and keys when they are asked for, and fails then
            rank_of(certificate)
            certificate.public_key()
    except UnsupportedAlgorithm as error:
        raise ValueError("a key of a kind that is not known") from error
    except x509.InvalidVersion as error:
        raise ValueError("a certificate of a version that is not known") from error
    return found


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the certificate, hex: what people compare by telephone."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def short_fingerprint(certificate: x509.Certificate) -> str:
    """Return enough of a certificate's fingerprint to tell two apart in an error line."""
    return f"sha256:{fingerprint(certificate)[:16]}"
