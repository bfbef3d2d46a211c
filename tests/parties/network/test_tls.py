"""A party is who shows the certificate that the others have pinned for its rank, and nobody else."""

from __future__ import annotations

import re
import socket
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

import pytest
import yaml

from mpcache.certificates import Identity, make_identity
from mpcache.config import Certificates, Settings, load_settings
from mpcache.errors import ConfigError, LinkError, MpcacheError
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import agree
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.tls import Trust, trust
from tests.support.links import free_ports, free_settings
from tests.support.processes import PARTY, errors_of, start, started, tiny_model, write_config

S, C, D = Rank
QUESTION = "the gate of"


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[Rank, Path]:
    """A folder with an identity for each rank."""
    folders = {}
    for rank in Rank:
        folders[rank] = tmp_path_factory.mktemp(rank.label)
        make_identity(rank).write(folders[rank])
    return folders


def pins(homes: dict[Rank, Path]) -> Certificates:
    return Certificates(
        **{rank.label: Identity.read(folder, rank).certificate.decode() for rank, folder in homes.items()}
    )


def another(rank: Rank, folder: Path) -> Path:
    """A folder with an identity of that rank that nobody has pinned."""
    make_identity(rank).write(folder)
    return folder


# ------------------------------------------------------------------------------------ what is refused

# What the client and the dealer start with, and what they say: (settings, identity folder) of each.
Side = tuple[Settings, Path | None]
Sides = Callable[[Settings, dict[Rank, Path], Path], tuple[Side, Side]]


def wrong_client(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    mine = {**homes, C: another(C, spare)}
    return (with_pins(good, mine), mine[C]), (good, homes[D])


def wrong_dealer(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    theirs = {**homes, D: another(D, spare)}
    return (good, homes[C]), (with_pins(good, theirs), theirs[D])


def swapped_client(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    """The server's key and certificate, by one who says that it is the client."""
    server = Identity.read(homes[S], S)
    Identity(C, server.key, server.certificate).write(spare)
    mine = {**homes, C: spare}
    return (with_pins(good, mine), spare), (good, homes[D])


def swapped_dealer(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    server = Identity.read(homes[S], S)
    Identity(D, server.key, server.certificate).write(spare)
    theirs = {**homes, D: spare}
    return (good, homes[C]), (with_pins(good, theirs), spare)


def plaintext_client(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    return (with_pins(good, {}), None), (good, homes[D])


def plaintext_dealer(good: Settings, homes: dict[Rank, Path], spare: Path) -> tuple[Side, Side]:
    return (good, homes[C]), (with_pins(good, {}), None)


def with_pins(settings: Settings, homes: dict[Rank, Path]) -> Settings:
    return settings.model_copy(update={"certificates": pins(homes)})


STRANGER = r"gave up waiting for .*refused a caller at .*: it shows no pinned certificate"
CASES: dict[str, tuple[Sides, str, str]] = {
    "wrong-client": (wrong_client, r"dealer at \S+ refuses client's certificate sha256:\w{16}", STRANGER),
    "wrong-dealer": (
        wrong_dealer,
        r"at \S+ a certificate for dealer that is not pinned is shown \(sha256:\w{16}\), not the dealer's",
        STRANGER,
    ),
    "swapped-client": (
        swapped_client,
        r"dealer refused: the server's certificate is shown \(sha256:\w{16}\), not the client's",
        r"Mismatch: refused client: the server's certificate is shown \(sha256:\w{16}\), not the client's",
    ),
    "swapped-dealer": (
        swapped_dealer,
        r"at \S+ the server's certificate is shown \(sha256:\w{16}\), not the dealer's",
        STRANGER,
    ),
    "plaintext-client": (plaintext_client, r"dealer at \S+ takes TLS alone", STRANGER),
    "plaintext-dealer": (plaintext_dealer, r"what listens at \S+ does not speak TLS", "gave up waiting for"),
}


@pytest.fixture(scope="module")
def refusals(
    homes: dict[Rank, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Future[str], Future[str]]]:
    """What the client and the dealer say in each case; all cases at once, as most of it is waiting."""

    def party(me: Rank, side: Side, peer: Rank) -> str:
        settings, folder = side
        with pytest.raises(LinkError) as caught:
            connect_all(me, settings, Ledger(), peers=[peer], trust=trust(me, settings, folder, False))
        return str(caught.value)

    said, ports = {}, free_ports(2 * len(CASES))
    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        for case, (sides, _, _) in CASES.items():
            good = with_pins(free_settings(connect_s=6, ports=(ports.pop(), ports.pop())), homes)
            client, dealer = sides(good, homes, tmp_path_factory.mktemp(case) / "spare")
            said[case] = pool.submit(party, C, client, D), pool.submit(party, D, dealer, C)
    return said


@pytest.mark.parametrize("case", CASES)
def test_who_is_not_pinned_is_refused_on_both_sides(
    case: str, refusals: dict[str, tuple[Future[str], Future[str]]]
) -> None:
    for end, words in zip(refusals[case], CASES[case][1:], strict=True):
        text = end.result()
        assert "\n" not in text
        assert re.search(words, text), text


@pytest.mark.processes
@pytest.mark.parametrize("case", [case if case == "swapped-client" else
                                  pytest.param(case, marks=pytest.mark.slow) for case in CASES])  # fmt: skip
def test_processes_refuse_with_one_line_each(case: str, homes: dict[Rank, Path], tmp_path: Path) -> None:
    sides, at_client, at_dealer = CASES[case]
    pair = sides(with_pins(free_settings(connect_s=15), homes), homes, tmp_path / "spare")
    with started() as children:
        for rank, (settings, folder) in zip((C, D), pair, strict=True):
            config = write_config(settings, tmp_path / f"{rank.label}.yaml")
            own = ["--identity", folder] if folder else []
            children.append(start(PARTY, "--rank", int(rank), "--config", config, *own))
        for child, words in zip(children, (at_client, at_dealer), strict=True):
            out, noise = child.communicate(timeout=60)
            assert (child.returncode, out) == (3, ""), noise
            (line,) = errors_of(noise)
            assert re.search(words, line), line


class Tap:
    """A wire with a hole: forwards a port's connections to an address and keeps all bytes."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.seen = bytearray()
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wake whoever waits at a socket, then close them all."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)  # no connection is taken any more
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # it does not listen yet: who calls calls again
                    near.close()
                    continue
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("encrypted", [True, False])
def test_right_identities_connect_and_a_wire_shows_nothing(encrypted: bool, homes: dict[Rank, Path]) -> None:
    """All three connect; the client reaches the dealer over a wire that somebody listens to."""
    settings = with_pins(free_settings(), homes if encrypted else {})
    tap = Tap(settings.addresses.dealer)
    tapped = settings.addresses.model_copy(update={"dealer": tap.address})
    secret = "a word that only the two ends may read"

    def party(me: Rank) -> None:
        own = settings.model_copy(update={"addresses": tapped}) if me is C else settings
        trusted = trust(me, own, homes[me] if encrypted else None, False)
        with connect_all(me, own, Ledger(), trust=trusted) as network:
            agree(network.links, me, own.public.flat())
            for peer, link in network.links.items():
                link.send_facts("facts", {"rank": int(me), "word": secret})
                assert link.recv_facts("facts") == {"rank": int(peer), "word": secret}

    with closing(tap), ThreadPoolExecutor(3) as pool:
        list(pool.map(party, Rank))
    assert len(tap.seen) > 500
    assert (secret.encode() in tap.seen) is not encrypted


# ------------------------------------------------------------------------------------- keygen and pin


@pytest.mark.processes
@pytest.mark.slow
def test_a_session_of_parties_that_made_and_pinned_their_identities(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As three people do it, with the commands alone."""
    model = tiny_model(tmp_path_factory.mktemp("model"))
    document = tmp_path / "document.txt"
    document.write_text("and the number of the gate of the city is in the book")
    settings = free_settings()
    config = write_config(settings, tmp_path / "session.yaml")
    with config.open("a") as file:
        file.write("# a comment of ours\n")

    def command(*words: object) -> str:
        with started() as children:
            children.append(start(PARTY, *words))
            out, noise = children[0].communicate(timeout=60)
            assert (children[0].returncode, noise) == (0, "")
            return out

    printed = [command("keygen", "--rank", int(rank), "--out", tmp_path / rank.label) for rank in Rank]
    prints = [text.splitlines()[-1] for text in printed]
    pinned = command("pin", "--config", config, *(Identity.files(tmp_path / r.label, r)[1] for r in Rank))
    assert pinned.splitlines() == prints
    assert "# a comment of ours" in config.read_text()
    flags = {
        S: ["--model", model, "--context", document],
        C: ["--question", QUESTION, "--max-new-tokens", 2],
        D: ["--max-new-tokens", 2],
    }
    flags[S] += ["--max-new-tokens", 2]
    with started() as children:
        for rank in Rank:
            own = ["--config", config, "--identity", tmp_path / rank.label]
            children.append(start(PARTY, "--rank", int(rank), *own, *flags[rank]))
        for child in children:
            _, noise = child.communicate(timeout=120)
            assert child.returncode == 0, noise
            assert "done: 2 tokens" in noise


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    key, certificate = make_identity(C).write(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    content = key.read_bytes()
    with pytest.raises(ConfigError, match="holds an identity of the client already"):
        make_identity(C).write(tmp_path)
    assert key.read_bytes() == content
    make_identity(D).write(tmp_path)  # another rank's beside it is no harm
    assert Identity.read(tmp_path, C) == Identity(C, content, certificate.read_bytes())
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="others than its owner may read it"):
        Identity.read(tmp_path, C)


def test_files_that_are_no_identity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file.*keygen --rank 2"):
        Identity.read(tmp_path, D)
    key, certificate = make_identity(D).write(tmp_path)
    good = key.read_bytes()
    key.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not a private key in PEM"):
        Identity.read(tmp_path, D)
    key.write_bytes(make_identity(D).key)
    with pytest.raises(ConfigError, match="is not the key of"):
        Identity.read(tmp_path, D)
    key.write_bytes(good)
    certificate.write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="is not one certificate in PEM"):
        Identity.read(tmp_path, D)


@pytest.fixture
def pin_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    from mpcache_parties.pinning import pin

    def run(config: Path, *files: Path, **flags: bool) -> str:
        pin(list(files), config, **flags)
        return capsys.readouterr().out

    return run


def test_pins_are_replaced_or_added_only_when_told(pin_here: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "session.yaml"
    config.write_text("public:\n  max_new_tokens: 5\n")
    first, second = (make_identity(C).write(tmp_path / name)[1] for name in ("one", "two"))
    once = pin_here(config, first)
    text = config.read_text()
    assert pin_here(config, first) == once and config.read_text() == text
    with pytest.raises(ConfigError, match="client is pinned to sha256:.*give --replace, or --add"):
        pin_here(config, second)
    assert config.read_text() == text
    assert len(pin_here(config, second, add=True).splitlines()) == 2
    assert pin_here(config, second, replace=True).splitlines() == pin_here(config, second).splitlines()
    settings = load_settings(config)
    assert settings.certificates.client == second.read_text()
    assert settings.public.max_new_tokens == 5
    assert list(yaml.safe_load(config.read_text())) == ["public", "certificates"]


def test_what_cannot_be_pinned(pin_here: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "session.yaml"
    config.write_text("")
    key, _ = make_identity(C).write(tmp_path / "one")
    with pytest.raises(MpcacheError, match="is not a certificate in PEM; give the .crt files"):
        pin_here(config, key)
    with pytest.raises(MpcacheError, match="cannot be read: No such file"):
        pin_here(config, tmp_path / "none.crt")
    assert config.read_text() == ""


# --------------------------------------------------------------------------------- TLS or in the open


def test_another_host_needs_tls(homes: dict[Rank, Path]) -> None:
    far = Settings.model_validate({"addresses": {"dealer": "192.0.2.1:7102"}})
    with pytest.raises(
        ConfigError, match="addresses.dealer 192.0.2.1:7102 is not on this machine.*--insecure"
    ):
        trust(S, far, None, False)
    assert isinstance(trust(S, far, None, True), Trust)
    assert isinstance(trust(S, with_pins(far, homes), homes[S], False), Trust)
    for near in ("127.0.0.1:7102", "[::1]:7102", "localhost:7102", "127.3.2.1:7102"):
        assert trust(S, Settings.model_validate({"addresses": {"dealer": near}}), None, False)
    for wide in ("0.0.0.0:7102", "[::]:7102", "localhost.example:7102", "dealer:7102"):
        with pytest.raises(ConfigError):
            trust(D, Settings.model_validate({"addresses": {"dealer": wide}}), None, False)


def test_half_a_setup_is_refused(homes: dict[Rank, Path], tmp_path: Path) -> None:
    settings = with_pins(Settings(), homes)
    with pytest.raises(ConfigError, match="pins certificates; give --identity"):
        trust(C, settings, None, False)
    with pytest.raises(ConfigError, match="no certificate is pinned for server and client and dealer"):
        trust(C, Settings(), homes[C], False)
    with pytest.raises(ConfigError, match="the config pins another for client"):
        trust(C, settings, another(C, tmp_path), False)
    with pytest.raises(ConfigError, match="give one of them"):
        trust(C, settings, homes[C], True)


@pytest.mark.processes
def test_insecure_is_said(tmp_path: Path) -> None:
    settings = free_settings(connect_s=0.5)
    config = write_config(settings, tmp_path / "config.yaml")
    with started() as children:
        children.append(start(PARTY, "--rank", 2, "--config", config, "--insecure"))
        _, noise = children[0].communicate(timeout=60)
    assert "dealer: warning: --insecure: the links are neither encrypted nor authenticated" in noise
