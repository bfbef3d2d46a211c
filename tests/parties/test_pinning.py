"""`mpcache-party keygen` and `pin` as people run them: they say what is wrong, and change nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mpcache.certificates import certificates_in, make_identity
from mpcache.errors import ConfigError
from mpcache.rank import Rank
from mpcache_parties.pinning import pin, with_pinned
from tests.support.processes import PARTY, start, started

S, C, D = Rank


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with started() as children:
        children.append(start(PARTY, *words))
        out, noise = children[0].communicate(timeout=60)
        return children[0].returncode, out, noise


@pytest.fixture(scope="module")
def crts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates of the server, the client and the dealer, and of another client."""
    folder = tmp_path_factory.mktemp("keys")
    found = {rank.label: make_identity(rank).write(folder)[1] for rank in Rank}
    return found | {"other": make_identity(C).write(folder / "other")[1]}


@pytest.mark.processes
@pytest.mark.slow
def test_keygen_and_pin_never_fail_in_silence(tmp_path: Path, crts: dict[str, Path]) -> None:
    config = tmp_path / "session.yaml"
    config.write_text("public:\n  max_new_tokens: 5\n")
    pin([crts["client"]], config)
    (tmp_path / "file").write_text("")
    cases = {
        ("keygen", "--rank", 1, "--out", crts["client"].parent): "holds an identity of the client already",
        ("keygen", "--rank", 1, "--out", tmp_path / "file" / "keys"): "cannot be written: Not a directory",
        ("pin", "--config", config, tmp_path / "none.crt"): "none.crt: cannot be read: No such file",
        ("pin", "--config", config, crts["other"]): "client is pinned to sha256:.*give --replace, or --add",
        ("pin", "--config", tmp_path / "none.yaml", crts["client"]): "none.yaml: cannot be read",
    }
    before = config.read_text()
    for words, told in cases.items():
        code, out, noise = run(*words)
        assert (code, out) == (2, ""), noise
        (line,) = noise.splitlines()
        assert re.match(f"error: .*{told}", line), line
    assert config.read_text() == before


def test_half_an_identity_is_never_left(tmp_path: Path) -> None:
    """A certificate without its key, of an earlier life: the new key must not be written beside it."""
    (tmp_path / "client.crt").write_text("old")
    with pytest.raises(ConfigError, match=r"holds an identity of the client already \(client.crt\)"):
        make_identity(C).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["client.crt"]


def test_pin_edits_the_file_that_a_link_names(tmp_path: Path, crts: dict[str, Path]) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("public: {max_new_tokens: 5}\n")
    real.chmod(0o640)
    link.symlink_to("real.yaml")
    pin([crts["server"]], link)
    assert link.is_symlink() and "BEGIN CERTIFICATE" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.yaml", "real.yaml"]


def test_every_line_that_is_not_asked_for_stays(tmp_path: Path, crts: dict[str, Path]) -> None:
    """Comments too, also in the first column, in the section and behind it; and what comes after it."""
    config = tmp_path / "session.yaml"
    head = "# ours\npublic:\n  max_new_tokens: 5  # a few\n\n"
    tail = "\n# for the firewall\naddresses:\n  server: a:1\n  dealer: b:2\n\n\n"
    config.write_text(head + "certificates:\n# told by telephone\n  server: ''   \n# and this\n" + tail)
    pin([crts["server"]], config)
    pin([crts["dealer"], crts["client"]], config)
    text = config.read_text()
    assert text.startswith(head + "certificates:\n# told by telephone\n  # server sha256:")
    assert text.endswith("-----END CERTIFICATE-----\n# and this\n" + tail)
    tree = yaml.safe_load(text)
    assert tree["addresses"] == {"server": "a:1", "dealer": "b:2"}
    for rank in Rank:
        assert certificates_in(tree["certificates"][rank.label]) == certificates_in(
            crts[rank.label].read_text()
        )
    pin([crts["other"]], config, replace=True)
    again = config.read_text()
    pin([crts["client"]], config, replace=True)
    assert config.read_text() == text != again
    pin([crts["client"]], config)
    assert config.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public: {max_new_tokens: 5}",
        "public: {max_new_tokens: 5}\r\n# c\r\n",
        "certificates: {}\npublic: {}\n",
        "certificates:\n    server: ''\n    client: ''\npublic: {}\n",
        "'certificates':\n  client: |\n\n  server: ''\n\n#c\n",
    ],
)
def test_configs_in_other_hands(text: str, tmp_path: Path, crts: dict[str, Path]) -> None:
    config = tmp_path / "session.yaml"
    config.write_bytes(text.encode())
    pin([crts[rank.label] for rank in Rank], config)
    new = config.read_bytes().decode()
    assert ("\r\n" in new) == ("\r\n" in text) and new.count("\n") - new.count("\r\n") in (0, new.count("\n"))
    kept = {name: value for name, value in (yaml.safe_load(text) or {}).items() if name != "certificates"}
    assert {**kept, "certificates": {r.label: crts[r.label].read_text() for r in Rank}} == yaml.safe_load(new)
    for line in text.splitlines():
        assert "public" not in line or line in new


def test_what_cannot_be_edited_by_lines_is_refused_and_stays(tmp_path: Path, crts: dict[str, Path]) -> None:
    config = tmp_path / "session.yaml"
    config.write_text("{public: {max_new_tokens: 5}}\n")
    with pytest.raises(ConfigError, match="cannot be edited; write `certificates:` in lines of its own"):
        pin([crts["server"]], config)
    assert [file.name for file in tmp_path.iterdir()] == ["session.yaml"]
    assert config.read_text() == "{public: {max_new_tokens: 5}}\n"
    assert (
        with_pinned("# only this", {}, []) == "# only this\n\ncertificates:  # written by mpcache-party pin\n"
    )
