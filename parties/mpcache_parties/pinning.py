"""Run `mpcache-party pin`: tell a config whose certificates to take."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mpcache.certificates import certificates_in, fingerprint, rank_of, shared_name, short_fingerprint
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
                prints = " or ".join(short_fingerprint(each) for each in pins[rank])
                new = short_fingerprint(found)
                raise ConfigError(
                    f"{config}: {rank.label} is pinned to {prints}, {file} is {new}; "
                    "give --replace, or --add to take both"
                )
            given.setdefault(rank, []).append(found)
    changed = []
    for rank, some in sorted(given.items()):
        wanted = list(dict.fromkeys(some if replace else [*pins[rank], *some]))
        if (alike := shared_name(wanted)) is not None:
            raise ConfigError(f"{config}: {rank.label}'s certificates {alike}")
        if wanted != pins[rank]:
            pins[rank] = wanted
            changed.append(rank)
    if changed:
        _write_pins(config, pins, changed)
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


def _rank_lines(rank: Rank, some: Sequence[x509.Certificate], indent: str) -> list[str]:
    """Return a rank's entry, with the fingerprints above it for people."""
    pem = "".join(each.public_bytes(Encoding.PEM).decode() for each in some)
    return [
        *(f"{indent}# {rank.label} sha256:{fingerprint(each)}" for each in some),
        f"{indent}{rank.label}: |",
        *(f"{indent}  {line}" for line in pem.splitlines()),
    ]


def with_pinned(text: str, pins: Mapping[Rank, Sequence[x509.Certificate]], ranks: Iterable[Rank]) -> str:
    """Return a config's text with the entries of `ranks` exchanged, and every other line as it was."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += end
    section = _entry(yaml.compose(text, yaml.SafeLoader), SECTION)
    edits: list[tuple[int, int, list[str]]] = []  # (first line, line after the last, what comes there)
    if section is None or not isinstance(section[1], yaml.MappingNode) or section[1].flow_style:
        first, last = (len(lines), len(lines)) if section is None else _extent(lines, *section)
        new = [""] * (section is None and bool(lines) and bool(lines[-1].strip()))
        new.append(f"{SECTION}:  # written by mpcache-party pin")
        new += [line for rank, some in pins.items() if some for line in _rank_lines(rank, some, "  ")]
        edits.append((first, last, new))
    else:
        indent = " " * section[1].start_mark.column
        for rank in ranks:
            entry = _entry(section[1], rank.label)
            first, last = _extent(lines, *(entry or section))
            if entry is None:
                first = last
            while entry and re.fullmatch(rf"\s*# {rank.label} sha256:[0-9a-f]{{64}}\s*", lines[first - 1]):
                first -= 1
            edits.append((first, last, _rank_lines(rank, pins[rank], indent)))
    for first, last, new in reversed(sorted(edits, key=lambda edit: edit[0])):  # line numbers above stay
        lines[first:last] = [line + end for line in new]
    return "".join(lines)


def _entry(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next(((key, value) for key, value in reversed(pairs) if key.value == name), None)


def _extent(lines: Sequence[str], key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
    """Return the lines of an entry, without the comments and blank lines that follow it."""
    last = value.end_mark.line + bool(value.end_mark.column)
    while last > key.start_mark.line + 1 and lines[last - 1].strip()[:1] in ("", "#"):
        last -= 1
    return key.start_mark.line, last


def _write_pins(
    config: Path, pins: Mapping[Rank, Sequence[x509.Certificate]], ranks: Collection[Rank]
) -> None:
    """Exchange these ranks' pins in the file, or the file that it links to. Atomic.

    Raises ConfigError, also where YAML is written in a way that cannot be edited by lines.
    """
    file = Path(os.path.realpath(config))
    try:
        with file.open(encoding="utf-8", newline="") as source:  # its ends of lines stay
            text = source.read()
        new = with_pinned(text, pins, ranks)
        if not _says(new, text, {rank: pins[rank] for rank in ranks}):
            what = f"cannot be edited; write `{SECTION}:` in lines of its own, and pin again"
            raise ConfigError(f"{config}: {what}")
        _replace(file, new)
    except OSError as error:
        raise ConfigError(f"{config}: cannot be written: {error.strerror}") from None


def _says(new: str, old: str, pins: Mapping[Rank, Sequence[x509.Certificate]]) -> bool:
    """Return whether the new text says what the old one does, and these pins."""
    try:
        then, now = yaml.safe_load(old) or {}, yaml.safe_load(new)
        found = {rank.label: certificates_in(now[SECTION][rank.label]) for rank in pins}
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        return False
    given = {rank.label: list(some) for rank, some in pins.items()}
    others = [{**tree, SECTION: _others(tree.get(SECTION) or {}, given)} for tree in (then, now)]
    return found == given and others[0] == others[1]


def _others(section: Mapping[str, Any], given: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in given}


def _replace(file: Path, text: str) -> None:
    """Put a text in the place of a file, with its mode and owner. Raises OSError."""
    now = file.stat()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            out.write(text)
        with suppress(OSError):  # only root may give a file away
            os.chown(name, now.st_uid, now.st_gid)
        os.chmod(name, now.st_mode & 0o777)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
