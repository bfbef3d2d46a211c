"""Settings: what is read, and that every mistake is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mpcache.choices import ProtocolName, Reveal
from mpcache.config import Settings, load_settings
from mpcache.errors import ConfigError
from mpcache.rank import Rank
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"


def test_local_yaml_states_the_defaults() -> None:
    assert load_settings(CONFIGS / "local.yaml") == load_settings(None) == Settings()


def test_three_hosts_yaml_is_valid() -> None:
    addresses = load_settings(CONFIGS / "three-hosts.yaml").addresses
    assert addresses.of(Rank.SERVER) == "server.example:7100"
    assert addresses.of(Rank.DEALER) == "dealer.example:7102"
    with pytest.raises(ValueError, match="does not listen"):
        addresses.of(Rank.CLIENT)


def test_overrides_win_and_none_means_not_given(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("public: {policy: full, max_new_tokens: 4}\ntimeouts: {connect_s: 3}\n")
    settings = load_settings(
        file, {"public.policy": "mpcache:keep=8", "public.protocol": None, "timeouts.recv_s": 7}
    )
    assert settings.public.policy == "mpcache:keep=8"
    assert settings.public.max_new_tokens == 4
    assert (settings.timeouts.connect_s, settings.timeouts.recv_s) == (3, 7)


def test_flat_is_text_with_the_policys_options_apart() -> None:
    flat = load_settings(None, {"public.policy": "mpcache:n_keep=128,alpha=0.5"}).public.flat()
    assert flat == {
        "protocol": "auto",
        "hide_document": "False",
        "policy": "mpcache",
        "policy.alpha": "0.5",
        "policy.n_keep": "128",
        "max_new_tokens": "32",
        "conversation_tokens": "1024",
        "chat": "template",
        "document_as": "system",
        "reveal": "logits",
        "length_grid": "1",
        "private_policy": "full",
        "document_chunk": "0",
        "fraction_bits": "16",
        "network": "none",
        "kernels": "auto",
    }
    assert list(flat) == sorted(flat)


def test_a_choice_is_its_text_in_yaml_and_its_member_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("public: {protocol: fast-bits, reveal: token}\n")
    settings = load_settings(file)
    assert settings.public.protocol is ProtocolName.FAST_BITS and settings.public.reveal is Reveal.TOKEN
    file.write_text(yaml.safe_dump(settings.model_dump()))
    assert "protocol: fast-bits" in file.read_text() and load_settings(file) == settings


def test_numbers_and_texts_are_what_they_seem(tmp_path: Path) -> None:
    """10:50 is 650 in YAML 1.1, which counts in sixties."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "\ufeffpublic: {network: 10:50, max_new_tokens: 7}\ntimeouts: {connect_s: 1e1, recv_s: 2.5, "
        "reconnect_s: 3}\naddresses: {server: 127.0.0.1:4710}\n",
        encoding="utf-8",
    )
    settings = load_settings(file)
    assert (settings.public.network, settings.public.max_new_tokens) == ("10:50", 7)
    times = settings.timeouts
    assert (times.connect_s, times.recv_s, times.reconnect_s) == (10.0, 2.5, 3.0)
    assert settings.addresses.server == "127.0.0.1:4710"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert load_settings(file) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pubic: {}", "unknown key pubic; did you mean public?"),
        (
            "public: {max_new_token: 3}",
            "unknown key public.max_new_token; did you mean public.max_new_tokens?",
        ),
        ("addresses: {client: 'a:1'}", "unknown key addresses.client; known: server, dealer, bind"),
        ("1: 2", "unknown key 1; known: public, addresses, certificates, timeouts"),
        ("public: fast", "public must be a section with protocol, .*, not a str"),
        ("public:", "public must be a section with .*, not nothing"),
        ("- a", r"must hold sections \(public, addresses, certificates, timeouts\), not a list"),
        (
            "public: {max_new_tokens: many}",
            "public.max_new_tokens is 'many': input should be a valid integer",
        ),
        ("public: {max_new_tokens: true}", "public.max_new_tokens is True: input should be a valid integer"),
        ("public: {max_new_tokens: 0}", "public.max_new_tokens is 0: .*greater than or equal to 1"),
        (
            "public: {protocol: slow}",
            "public.protocol is 'slow': input should be 'stock', 'fast', 'fast-bits' or 'auto'",
        ),
        ("public: {policy: 'full:a'}", "public.policy is 'full:a': must be NAME or NAME:key=value"),
        ("public: {policy: 'full:a=1,a=2'}", "each key once"),
        ("public: {network: fast}", "public.network is 'fast': must be none, lan, wan or RTT_MS:MBPS"),
        ("public: {network: '10:0'}", "public.network is '10:0': must be none, lan, wan or RTT_MS:MBPS"),
        ("public: {reveal: all}", "public.reveal is 'all': input should be 'logits' or 'token'"),
        ("public: {policy: 'a|b|c'}", r"public.policy is 'a\|b\|c': must be NAME .* or two with a \|"),
        ("addresses: {server: nowhere}", "addresses.server is 'nowhere': must be HOST:PORT"),
        ("addresses: {server: 'a:70000'}", "a port from 1 to 65535"),
        ("timeouts: {recv_s: .nan}", "timeouts.recv_s is nan"),
        ("timeouts: {recv_s: -1}", "timeouts.recv_s is -1: .*greater than 0"),
        ("public: {policy: 'a", "line 1: not valid YAML"),
        ("a: &a [*a, *a]", r"line 1: not valid YAML: aliases \(\*\) are not allowed"),
        ("? {a: 1}\n: 2", "not valid YAML"),
        ("public: {}\ntimeouts: {}\npublic: {}", "line 3: not valid YAML: the key public comes twice"),
        ("public:\n  policy: full\n  policy: quest\n", "line 3: not valid YAML: the key policy comes twice"),
        ("public: {max_new_tokens: 010}", "public.max_new_tokens is '010': input should be a valid integer"),
        ("public: {max_new_tokens: 1_0}", "public.max_new_tokens is '1_0'"),
        ("public: {max_new_tokens: 0x10}", "public.max_new_tokens is '0x10'"),
        ("timeouts: {connect_s: 1:30}", "timeouts.connect_s is '1:30': input should be a valid number"),
        ("public: {<<: {policy: full}, policy: quest}", "unknown key public.<<"),
        ("\x00", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_settings(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_settings(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not a text file"):
        load_settings(tmp_path / "binary.yaml")


def test_a_wrong_override_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown key public.protocl; did you mean public.protocol?"):
        load_settings(None, {"public.protocl": "fast"})
    with pytest.raises(ConfigError, match="public.max_new_tokens is 0"):
        load_settings(None, {"public.max_new_tokens": 0})
