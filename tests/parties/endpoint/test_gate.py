"""Who may call the endpoint, and what of a call is bounded: raw HTTP, as an attacker would send it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from mpcache_parties.endpoint import app as app_module
from mpcache_parties.endpoint import http_server
from mpcache_parties.endpoint.app import LARGEST_BODY, Endpoint
from mpcache_parties.endpoint.gate import LOOPBACK, Admission
from tests.support.endpoint import listening
from tests.support.scripted_chat import Script

KEY = "k" * 20
FRIEND = "https://friend.example"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def address(script: Script) -> Iterator[str]:
    with listening(Endpoint({"demo": script.open}, limit=2), Admission(origins=(FRIEND,))) as at:
        yield at


@pytest.fixture(scope="module")
def locked(script: Script) -> Iterator[str]:
    with listening(Endpoint({"demo": script.open}, limit=2), Admission(key=KEY)) as at:
        yield at


def call(
    address: str, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, named, answer.read()
    finally:
        connection.close()


def refused(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str | None]:
    """Return status and code of an answer in the shape of OpenAI's errors."""
    status, _, body = answer
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return status, error["code"]


def test_a_name_that_is_not_this_hosts_is_refused(address: str) -> None:
    """An attacker's name that its DNS leads to this machine: the browser takes its page for ours."""
    port = address.rpartition(":")[2]
    for path in ("/", "/v1/models", "/health"):
        assert refused(call(address, "GET", path, {"Host": f"evil.example:{port}"})) == (403, "unknown_host")
    for name in LOOPBACK:
        assert call(address, "GET", "/", {"Host": f"{name}:{port}"})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_may_not_call(address: str, script: Script, headers: dict[str, str]) -> None:
    before = len(script.opened)
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/mpcache/status")):
        answer = call(address, method, path, headers | JSON, BODY if method == "POST" else None)
        assert refused(answer) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer[1]
    assert len(script.opened) == before


def test_our_own_page_and_an_allowed_one_may_call(address: str) -> None:
    own = call(address, "POST", "/v1/chat/completions", {"Origin": address, **JSON}, BODY)
    assert own[0] == 200
    friend = call(address, "POST", "/v1/chat/completions", {"Origin": FRIEND, **JSON}, BODY)
    assert friend[0] == 200 and friend[1]["access-control-allow-origin"] == FRIEND
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert call(address, "OPTIONS", "/v1/chat/completions", {"Origin": FRIEND, **asks})[0] == 200
    evil = call(address, "OPTIONS", "/v1/chat/completions", {"Origin": "https://evil.example", **asks})
    assert evil[0] == 400 and "access-control-allow-origin" not in evil[1]


def test_without_allowed_origins_a_browser_is_told_nothing(locked: str) -> None:
    asks = {"Origin": FRIEND, "Access-Control-Request-Method": "POST"}
    assert refused(call(locked, "OPTIONS", "/v1/chat/completions", asks)) == (403, "foreign_origin")


def test_a_form_cannot_send_a_question(address: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert refused(call(address, "POST", "/v1/chat/completions", {"Content-Type": kind}, BODY))[0] == 415
    assert refused(call(address, "POST", "/v1/chat/completions", {}, BODY))[0] == 415


def test_a_link_from_elsewhere_leads_to_the_page_which_no_other_can_frame(address: str) -> None:
    status, headers, body = call(address, "GET", "/", {"Sec-Fetch-Site": "cross-site"})
    policy = headers["content-security-policy"]
    assert status == 200 and "frame-ancestors 'none'" in policy and headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert body.count(f'nonce="{nonce}"'.encode()) == 2 and b"{{" not in body
    assert call(address, "GET", "/")[1]["content-security-policy"] != policy
    assert b" onclick=" not in body and b"://" not in body and b"innerHTML" not in body


def test_a_key_opens_what_is_anybodys(locked: str) -> None:
    assert call(locked, "GET", "/")[0] == call(locked, "GET", "/health")[0] == 200
    for path in ("/v1/models", "/v1/mpcache/status", "/v1/nothing"):
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {KEY}"},
                      {"Authorization": f"Bearer {KEY}k"}, {"Authorization": "Bearer \xff"}):  # fmt: skip
            assert refused(call(locked, "GET", path, wrong)) == (401, "invalid_api_key")
    assert call(locked, "GET", "/v1/models", {"Authorization": f"Bearer {KEY}"})[0] == 200
    assert refused(call(locked, "POST", "/v1/chat/completions", JSON, BODY)) == (401, "invalid_api_key")


def test_what_is_not_there_is_told_in_the_same_shape(address: str) -> None:
    assert refused(call(address, "GET", "/v1/embeddings"))[0] == 404
    assert refused(call(address, "POST", "/v1/responses", JSON, BODY))[0] == 404
    assert refused(call(address, "GET", "/v1/chat/completions"))[0] == 405
    assert refused(call(address, "DELETE", "/v1/models"))[0] == 405


def test_a_large_body_is_refused(address: str) -> None:
    large = b" " * (LARGEST_BODY + 1)
    assert refused(call(address, "POST", "/v1/chat/completions", JSON, large)) == (413, "body_too_large")
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    parts = (b" " * 65536 for _ in range(LARGEST_BODY // 65536 + 1))  # without a length, told in chunks
    connection.request("POST", "/v1/chat/completions", parts, JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_head_and_a_body_come_in_time_or_not_at_all(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.1)
    monkeypatch.setattr(app_module, "BODY_S", 0.1)
    host, _, port = address.removeprefix("http://").rpartition(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for sent in (b"", head.encode()):
        with socket.create_connection((host, int(port)), 5) as slow:
            slow.sendall(sent)
            assert slow.recv(1) == b""
    with socket.create_connection((host, int(port)), 5) as slow:
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port)), 5) as wide:
        wide.sendall(head.encode() + b"X: " + b"y" * (2 * http_server.HEAD_BYTES) + b"\r\n\r\n")
        assert wide.recv(4096).startswith(b"HTTP/1.1 400")
