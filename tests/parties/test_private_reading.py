"""A document of the client's own as users bring it: in Python, by an endpoint, to a party that is killed."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import mpcache
from mpcache.answer import plain_answer
from mpcache.cost.reading import reading_plan
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.sampling import Sampling
from tests.support.links import free_ports
from tests.support.processes import PARTY, start
from tests.support.service import DOCUMENT, QUESTIONS, TOKENS, Service, serving

pytestmark = [pytest.mark.slow, pytest.mark.processes]

OWN = "the gate of the city was shut and the guard has it"
RULE: dict[str, Any] = {"private_policy": "snapkv:cap=0.5,queries=4", "document_chunk": 8}


def expected(model: Model, service: Service) -> str:
    """The answer in plaintext."""
    public, encode = service.settings.public, model.tokenizer.encode
    context, own, asked = encode(DOCUMENT, bos=True), encode(OWN, bos=False), encode(QUESTIONS[0], bos=False)
    bound = bind_policy(model.shape, public, len(context), len(asked), private=len(own))
    reading = reading_plan(model.shape, public, len(context), len(own), "fast")
    assert len(reading.chunks) > 2 and reading.kept < len(own)
    return plain_answer(
        model, bound, context, asked, TOKENS, Sampling(), (), private=own, reading=reading
    ).text


def ask_endpoint(address: str) -> str:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as told:
        named = json.load(told)["data"][0]["id"]
    body = {"model": named, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as told:
        found: str = json.load(told)["choices"][0]["message"]["content"]
    return found


def test_it_is_answered_about_however_it_is_brought(model: Model, tmp_path: Path) -> None:
    """By `mpcache.connect`, by the client's endpoint; and by a client that is killed in the middle of it."""
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    with serving(model, tmp_path, state=tmp_path / "state", **RULE) as service:
        want = expected(model, service)
        with mpcache.connect(service.config, private_context=OWN) as chat:
            assert "".join(chat.ask(QUESTIONS[0])) == want

        client = [*PARTY, "--rank", "1", "--config", str(service.config), "--context", str(own)]
        (port,) = free_ports(1)
        endpoint = start(client, "--api", port)
        service.children.append(endpoint)
        assert endpoint.stderr is not None
        while "speaks OpenAI's API" not in (line := endpoint.stderr.readline()):
            assert line, "the endpoint has ended"
        assert ask_endpoint(f"http://127.0.0.1:{port}") == want
        endpoint.kill()

        asking = [*client, "--question", QUESTIONS[0], "--no-stop-at-eos", "--state", str(tmp_path / "mine")]
        killed = start(asking)
        service.children.append(killed)
        assert killed.stderr is not None
        while "tokens of the client's document read" not in (line := killed.stderr.readline()):
            assert line, "the client has ended"
        killed.kill()
        resumed = start(asking, "--resume")
        service.children.append(resumed)
        text, noise = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, noise
        assert "resumed after" in noise and "of the client's document" in noise
        assert text.strip() == want.strip()
