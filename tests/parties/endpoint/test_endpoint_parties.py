"""The endpoint before three real parties, with the demo model: what a caller reads is what they answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import mpcache
from mpcache.config import load_settings
from mpcache.rank import Rank
from mpcache_parties.endpoint.app import Endpoint
from mpcache_parties.local_parties import LocalParties
from tests.support.endpoint import listening

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, pytest.mark.processes]

TEXT = "The code of the red gate is 4921. The code of the old gate is 1177.\n"
QUESTION = "The code of the red gate is"


@pytest.fixture(scope="module")
def parties() -> Iterator[LocalParties]:
    settings = load_settings(None, {"public.policy": "full", "public.max_new_tokens": 24})
    with LocalParties(settings, text=TEXT, at_once=2) as running:
        yield running


@pytest.fixture
def endpoint(parties: LocalParties) -> Endpoint:
    return Endpoint({"demo": parties.chat}, limit=2)


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Any]:
    with (
        listening(endpoint) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as made,
    ):
        yield made


def ask(client: Any, *texts: str, **more: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return client.chat.completions.create(model="demo", messages=messages, **more)


def test_two_turns_are_those_of_a_conversation(
    client: Any, parties: LocalParties, endpoint: Endpoint
) -> None:
    first = ask(client, QUESTION, max_tokens=4)
    chunks = list(
        ask(client, QUESTION, first.choices[0].message.content, " of the old gate", max_tokens=4, stream=True)
    )
    second = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert first.usage.completion_tokens == 4 and first.choices[0].finish_reason == "length"
    (conversation,) = endpoint.pool.open
    assert conversation.chat.account.turns == 2
    with parties.chat() as chat:
        assert "".join(chat.ask(mpcache.Turn(QUESTION, max_new_tokens=4))) == first.choices[0].message.content
        assert "".join(chat.ask(mpcache.Turn(" of the old gate", max_new_tokens=4))) == second
        assert first.usage.prompt_tokens == chat.turns[0].question_tokens
        assert first.mpcache["account"]["sent"] == chat.turns[0].sent


def test_an_answer_that_is_left_or_stopped_leaves_the_conversation_usable(
    client: Any, endpoint: Endpoint
) -> None:
    stream = ask(client, QUESTION, stream=True)
    heard = ""
    for chunk in stream:
        heard += chunk.choices[0].delta.content or ""
        if len(heard) > 3:
            break
    stream.close()
    (conversation,) = endpoint.pool.open
    limit = time.monotonic() + 60
    while conversation.busy and time.monotonic() < limit:
        time.sleep(0.05)
    assert conversation.chat.account.turns == 1 and conversation.chat.completion_tokens < 24
    again = ask(client, QUESTION, heard, " and", stream=True)
    first = next(iter(again))
    client.post("/mpcache/stop", body={"id": first.id}, cast_to=object)
    assert list(again)[-1].choices[0].finish_reason == "stop"
    assert conversation.chat.account.turns == 2 and conversation.chat.completion_tokens < 24


def test_a_stop_text_ends_an_answer_before_it(client: Any) -> None:
    whole = ask(client, QUESTION, max_tokens=8).choices[0].message.content
    cut = ask(client, QUESTION, max_tokens=8, stop=[whole[3:5]])
    assert cut.choices[0].message.content == whole[: whole.find(whole[3:5])]
    assert cut.choices[0].finish_reason == "stop"


def test_a_question_that_does_not_fit_is_one_error(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="3002 tokens"):
        ask(client, "word " * 3000)


def test_a_server_that_dies_is_one_error_and_nothing_hangs(client: Any) -> None:
    settings = load_settings(None, {"public.policy": "full", "public.max_new_tokens": 24})
    with (
        LocalParties(settings, text=TEXT, at_once=1) as doomed,
        listening(Endpoint({"demo": doomed.chat}, 1)) as address,
    ):
        own, heard = client.with_options(base_url=f"{address}/v1"), ""
        with pytest.raises(openai.APIError) as lost:
            for chunk in ask(own, QUESTION, stream=True):
                heard += chunk.choices[0].delta.content or ""
                if heard:
                    doomed._children[Rank.SERVER].kill()
        assert heard and lost.value.code == "session_failed"
        with pytest.raises(openai.InternalServerError) as gone:
            ask(own, QUESTION)
        assert gone.value.status_code == 503
