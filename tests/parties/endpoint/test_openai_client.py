"""The `openai` package talks with the endpoint over HTTP; the conversations behind it are scripted."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

from mpcache.errors import PeerTimeout
from mpcache_parties.endpoint.app import Endpoint
from mpcache_parties.endpoint.chat_like import models_of
from tests.support.endpoint import listening
from tests.support.scripted_chat import Script

openai = pytest.importorskip("openai")

MODEL = "demo"
Ask = Callable[..., Any]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def endpoint(script: Script) -> Endpoint:
    return Endpoint({MODEL: script.open}, limit=2, queue=1)


@pytest.fixture
def address(script: Script, endpoint: Endpoint) -> Iterator[str]:
    with listening(endpoint) as at:
        yield at
        script.go.set()
    assert all(chat.closed for chat in script.opened)


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
def ask(client: Any) -> Ask:
    def create(*texts: str, **more: Any) -> Any:
        """Ask with messages that are the user's and the assistant's in turn."""
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
        ]
        return client.chat.completions.create(**{"model": MODEL, "messages": messages, **more})

    return create


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def texts(stream: Any) -> list[str]:
    return [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]


def test_an_answer_comes_as_a_whole_with_what_it_took(ask: Ask) -> None:
    whole = ask("two words")
    assert whole.choices[0].message.content == "Heard 1: two words"
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (2, 3, 5)
    assert whole.mpcache["account"]["rounds"] == 3 * 138
    assert whole.mpcache["room"] == 1000 - 5


def test_an_answer_streams_piece_by_piece(ask: Ask) -> None:
    chunks = list(ask("two words", stream=True, stream_options={"include_usage": True}))
    assert texts(chunks) == ["Heard 1:", " two", " words"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 5
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_without_include_usage_no_chunk_has_it(ask: Ask) -> None:
    assert all(c.usage is None and c.choices for c in ask("words", stream=True))


def test_a_request_goes_on_with_the_conversation_that_it_continues(ask: Ask, script: Script) -> None:
    first = ask("one").choices[0].message.content
    second = ask("one", f"{first}\n", "two").choices[0].message.content  # clients take off or add blanks
    assert second == "Heard 2: two"
    other = ask("another").choices[0].message.content
    assert other == "Heard 1: another"
    third = ask("one", first, "two", second, "three").choices[0].message.content
    assert third == "Heard 3: three"
    assert len(script.opened) == 2


def test_turns_that_no_open_conversation_knows_are_told_as_a_text(ask: Ask, script: Script) -> None:
    heard = ask("one").choices[0].message.content
    for question, answer in (("One", heard), ("one", "something else")):
        ask(question, answer, "two")
        assert script.opened[-1].turns[-1].text == f"User: {question}\n\nAssistant: {answer}\n\nUser: two"
    assert len(script.opened) == 3 and len(script.opened[0].turns) == 1


def test_the_callers_system_message_stands_before_its_first(client: Any, script: Script) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message
    assert script.opened[0].turns[0].text == "Be brief.\n\nhello"
    again = [*messages, answer.model_dump(), {"role": "user", "content": "more"}]
    client.chat.completions.create(model=MODEL, messages=again)
    assert script.opened[0].turns[1].text == "more"


def test_what_an_answer_may_be_reaches_the_conversation(ask: Ask, script: Script) -> None:
    whole = ask("a b c d", max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=7)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 3
    turn = script.opened[0].turns[0]
    assert (turn.max_new_tokens, turn.temperature, turn.top_p, turn.seed) == (3, 0.5, 0.9, 7)


def test_draws_differ_where_no_seed_is_given(ask: Ask, script: Script) -> None:
    ask("a", temperature=1)
    ask("b", temperature=1)
    ask("c")
    seeds = [turn.seed for chat in script.opened for turn in chat.turns]
    assert None in seeds and len(set(seeds)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_before_it(ask: Ask, script: Script, stream: bool) -> None:
    script.pace_s = 0.01
    answer = ask("some words end here and go on", stop=["no", "d her"], stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(texts(chunks)) == "Heard 1: some words en"
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == "Heard 1: some words en"
    assert ask("some words end here and go on", "Heard 1: some words en", "next").choices[0].message.content


def test_two_callers_are_answered_at_once_and_a_third_waits_and_is_told_its_place(
    ask: Ask, script: Script, address: str
) -> None:
    script.go.clear()
    with ThreadPoolExecutor(3) as callers:
        two = [callers.submit(ask, f"caller {n}") for n in range(2)]
        until(lambda: len(script.opened) == 2 and all(chat.turns for chat in script.opened))
        third = Stream(address, "third")
        assert third.head["x-mpcache-place"] == "1"
        assert third.line().startswith(": place 1 in the queue")
        with pytest.raises(openai.RateLimitError) as full:
            ask("fourth")
        assert full.value.code == "queue_full" and 1 <= int(full.value.response.headers["retry-after"]) <= 10
        script.go.set()
        assert {each.result().choices[0].message.content for each in two} == {
            "Heard 1: caller 0", "Heard 1: caller 1"
        }  # fmt: skip
        assert third.rest().endswith("[DONE]\n\n")
    assert len(script.opened) == 3 and sum(chat.closed for chat in script.opened) == 1  # the oldest made room


class Stream:
    """A raw stream, which can be left in the middle."""

    def __init__(self, address: str, text: str) -> None:
        self._connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
        self._connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self._answer = self._connection.getresponse()
        self.head = {name.lower(): value for name, value in self._answer.getheaders()}

    def line(self) -> str:
        return self._answer.readline().decode()

    def rest(self) -> str:
        text = self._answer.read().decode()
        self.leave()
        return text

    def leave(self) -> None:
        self._answer.close()
        self._connection.close()


def test_a_caller_who_leaves_stops_the_answer_and_may_go_on_from_what_it_heard(
    ask: Ask, script: Script, address: str, endpoint: Endpoint
) -> None:
    script.pace_s = 0.05
    stream = Stream(address, "many " * 200)
    heard = ""
    while heard.count("many") < 2:
        line = stream.line()
        if line.startswith("data:"):
            heard += json.loads(line[5:])["choices"][0]["delta"].get("content", "")
    stream.leave()
    (chat,) = script.opened
    until(lambda: chat.account.turns == 1)
    assert chat.completion_tokens < 100
    until(lambda: not endpoint.pool.open[0].busy)
    assert ask("many " * 200, heard, "go on").choices[0].message.content == "Heard 2: go on"


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_before_the_first_word_leaves_nothing(
    ask: Ask, script: Script, address: str, endpoint: Endpoint, stream: bool
) -> None:
    script.go.clear()
    leave = Stream(address, "nobody hears this").leave if stream else quiet_caller(address).close
    until(lambda: bool(script.opened and script.opened[0].turns))
    leave()
    until(lambda: not endpoint.pool.open and script.opened[0].closed)
    script.go.set()
    assert ask("hello").choices[0].message.content == "Heard 1: hello"


def quiet_caller(address: str) -> socket.socket:
    """Ask for a whole answer, and read nothing."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "nor this"}]}).encode()
    caller = socket.create_connection((host, int(port)), 10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return caller


def test_a_caller_who_leaves_the_queue_makes_room_in_it(
    ask: Ask, script: Script, address: str, endpoint: Endpoint
) -> None:
    script.go.clear()
    running = [Stream(address, f"runs {n}") for n in range(2)]
    waiting = Stream(address, "waits")
    until(lambda: endpoint.pool.waiting == 1)
    waiting.leave()
    until(lambda: endpoint.pool.waiting == 0)
    script.go.set()
    assert all(stream.rest().endswith("[DONE]\n\n") for stream in running)


def test_a_session_that_dies_in_the_middle_is_one_error_in_the_stream(ask: Ask, script: Script) -> None:
    script.die_after = 2
    heard = []
    with pytest.raises(openai.APIError, match="the connection has ended") as caught:
        for piece in ask("a b c", stream=True):
            heard.append(piece)
    assert texts(heard) == ["Heard 1:", " a"] and caught.value.code == "session_failed"
    script.die_after = None
    assert ask("a b c").choices[0].message.content == "Heard 1: a b c"
    assert len(script.opened) == 2 and script.opened[0].closed


def test_what_fails_at_once_has_its_own_status(ask: Ask, script: Script) -> None:
    script.refuse_open = PeerTimeout("client: server did not come within 60 s")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="did not come") as late:
            ask("hello", stream=stream)
        assert late.value.status_code == 504
    script.refuse_open = None
    script.die_after = 0
    with pytest.raises(openai.InternalServerError) as dead:
        ask("hello")
    assert dead.value.status_code == 503 and dead.value.type == "server_error"


def test_a_full_conversation_says_so_and_the_next_request_begins_a_new_one(ask: Ask, script: Script) -> None:
    script.room = 12
    with pytest.raises(openai.BadRequestError, match="room for 12"):
        ask("word " * 20)
    first = ask("a b c").choices[0].message.content  # the same session: nothing was asked in it
    with pytest.raises(openai.BadRequestError, match="room for 5"):
        ask("a b c", first, "d e f g h i")
    assert ask("a").choices[0].message.content == "Heard 1: a"
    assert len(script.opened) == 2 and script.opened[0].closed


def test_a_text_is_continued_as_a_whole_and_as_a_stream(client: Any, script: Script) -> None:
    whole = client.completions.create(model=MODEL, prompt=["two words"], temperature=0.5, stop="zzz")
    assert (whole.object, whole.choices[0].text) == ("text_completion", "Heard 1: two words")
    assert (whole.choices[0].finish_reason, whole.usage.total_tokens) == ("stop", 5)
    assert whole.mpcache["room"] == 1000 - 5 and whole.id.startswith("cmpl-")
    (turn,) = script.opened[0].turns
    assert (turn.max_new_tokens, turn.temperature, turn.stop) == (16, 0.5, ("zzz",))
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="two words", max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(pieces) == "Heard 1: two"  # a text begins a session of its own
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_refused_where_a_template_frames_the_session_which_serves_others(
    client: Any, ask: Ask, script: Script, stream: bool
) -> None:
    script.raw = False
    with pytest.raises(openai.APIError, match="let the parties start with --raw"):
        for _ in client.completions.create(model=MODEL, prompt="words", stream=stream):
            pass
    assert ask("words").choices[0].message.content == "Heard 1: words" and len(script.opened) == 1


def test_an_idle_conversation_is_closed_after_a_time(script: Script) -> None:
    endpoint = Endpoint({MODEL: script.open}, limit=2, idle_s=0.05)
    with listening(endpoint) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "hello"}]
        client.chat.completions.create(model=MODEL, messages=messages)
        until(lambda: script.opened[0].closed and not endpoint.pool.open)


def test_a_running_answer_is_stopped_by_its_id(client: Any, ask: Ask, script: Script) -> None:
    script.pace_s = 0.05
    stream = ask("many " * 200, stream=True)
    first = next(stream)
    assert client.post("/mpcache/stop", body={"id": first.id}, cast_to=object) == {"stopped": True}
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "stop" and len(rest) < 50
    with pytest.raises(openai.NotFoundError):
        client.post("/mpcache/stop", body={"id": first.id}, cast_to=object)


def test_a_slow_setup_and_a_slow_question_are_told_in_the_stream(ask: Ask, script: Script) -> None:
    script.setup_s, script.pace_s = 1.2, 0.4
    about = [(c.model_extra or {}).get("mpcache", {}) for c in ask("x", stream=True)]
    told = [each.get("progress") for each in about]
    assert "set-up 50 %" in told and "question: layer 1 of 2" in told


def test_models_and_status_say_what_there_is(client: Any, ask: Ask) -> None:
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask("hello", model="another")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    ask("hello")
    status = client.get("/mpcache/status", cast_to=object)
    assert (status["limit"], status["waiting"]) == (2, 0)
    (conversation,) = status["conversations"]
    assert conversation["account"]["turns"] == 1 and not conversation["busy"]


def test_several_documents_are_models_with_conversations_of_their_own() -> None:
    scripts = {name: Script() for name in ("rules", "prices")}
    models = models_of("mpcache", list(scripts), lambda name, say: scripts[name].open(say))
    with (
        listening(Endpoint(models, limit=1)) as at,
        openai.OpenAI(base_url=f"{at}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        assert [each.id for each in client.models.list()] == ["mpcache@rules", "mpcache@prices"]

        def say(name: str) -> Any:
            messages = [{"role": "user", "content": f"about {name}"}]
            return client.chat.completions.create(model=f"mpcache@{name}", messages=messages)

        for name in ("rules", "prices", "prices"):  # one place: what is open for another makes room
            assert say(name).model == f"mpcache@{name}"
        with ThreadPoolExecutor(2) as callers:
            assert [each.model for each in callers.map(say, scripts)] == [
                f"mpcache@{name}" for name in scripts
            ]
        with pytest.raises(openai.NotFoundError, match="ask for 'mpcache@rules' or 'mpcache@prices'") as no:
            say("none")
    assert no.value.code == "model_not_found"
    for name, script in scripts.items():
        asked = {turn.text for chat in script.opened for turn in chat.turns}
        assert asked == {f"about {name}"} and all(chat.closed for chat in script.opened)


def test_the_end_of_the_endpoint_ends_its_streams(script: Script) -> None:
    script.pace_s = 0.05
    with listening(Endpoint({MODEL: script.open}, limit=1)) as address:
        running, waiting = Stream(address, "many " * 500), Stream(address, "waits")
        running.line()
        begun = time.monotonic()
    assert time.monotonic() - begun < 3
    assert running.rest().endswith("[DONE]\n\n")
    assert "the endpoint ends" in waiting.rest()
    assert script.opened[0].closed
