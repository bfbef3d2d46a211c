"""A conversation for programs: the lines and events of the client's process, and the parties as processes."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

import pytest

import mpcache
from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig, Settings
from mpcache.limits import bind_conversation
from mpcache.model import demo_model_dir, load_model
from mpcache.rank import Rank
from mpcache.report.account import Finish, TurnReport
from mpcache.sampling import Sampling
from mpcache_parties import chat as chat_module
from mpcache_parties import piped_conversation
from mpcache_parties.chat import Chat, Turn
from mpcache_parties.launch import PartyFailed
from mpcache_parties.local_parties import LocalParties
from mpcache_parties.operations.output import Output
from mpcache_parties.piped_conversation import END_LINE, ENOUGH_LINE, PipedConversation, ask_line
from mpcache_parties.private_inputs import Question, TurnRecord
from tests.support.paths import ROOT

TEXT = "The code of the red gate is 4921. The code of the blue gate is 7035.\n"


class Pipe:
    """A conversation whose stdin a test writes."""

    def __init__(self, kept: bool = False) -> None:
        reader, writer = os.pipe()
        self.stdin = os.fdopen(writer, "wb", buffering=0)
        self.out = io.StringIO()
        stdin = cast(BinaryIO, os.fdopen(reader, "rb"))
        self.conversation = PipedConversation(Output(events=True, out=self.out), stdin, kept)

    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    ended = threading.Event()  # in place of the end of this process
    monkeypatch.setattr(piped_conversation, "_end_this_process", lambda patience: ended.set())
    pipe = Pipe()
    yield pipe
    pipe.stdin.close()
    assert ended.wait(10)


def test_questions_come_as_lines_and_end_with_stdin(pipe: Pipe) -> None:
    pipe.stdin.write(ask_line("one") + ask_line("two", new_tokens=3, temperature=0.5, seed=7))
    pipe.stdin.close()
    first, second = pipe.conversation.questions(lambda: None)
    assert (first.text, first.sampling, first.new_tokens) == ("one", Sampling(), None)
    assert (second.text, second.sampling, second.new_tokens) == ("two", Sampling(0.5, seed=7), 3)


BAD = {
    b"not JSON\n": "the line: invalid JSON",
    b'{"ask": " "}\n': "the question is empty",
    b"{}\n": "the question is empty",
    b'{"ask": "x", "new_tokens": 0}\n': "new_tokens: input should be greater than or equal to 1",
    b'{"ask": "x", "temperature": -1}\n': "--temperature is -1",
    b'{"ask": "x", "image": 1}\n': "image: extra inputs are not permitted",
    b'{"ask": 3}\n': "ask: input should be a valid string",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_asks_nothing_is_refused_and_the_next_is_heard(line: bytes, pipe: Pipe) -> None:
    pipe.stdin.write(line + ask_line("a question"))
    assert next(pipe.conversation.questions(lambda: None)).text == "a question"
    (event,) = pipe.events()
    assert event["event"] == "refused" and re.search(BAD[line], str(event["text"]))


def test_a_stop_ends_the_answer_that_was_asked_for_before_it(pipe: Pipe) -> None:
    questions = pipe.conversation.questions(lambda: None)
    pipe.stdin.write(ask_line("one"))
    next(questions)
    assert not pipe.conversation.stopped()
    pipe.stdin.write(ENOUGH_LINE + ask_line("two"))
    next(questions)
    assert not pipe.conversation.stopped()  # it came before the second question
    pipe.stdin.write(ENOUGH_LINE)
    limit = time.monotonic() + 10
    while not pipe.conversation.stopped():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("ended", [True, False])
def test_a_conversation_that_is_kept_ends_where_it_is_said_so(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is suspended: the questions do not end, the process does, at once."""
    patience: list[float] = []
    monkeypatch.setattr(piped_conversation, "_end_this_process", patience.append)
    pipe = Pipe(kept=True)
    pipe.stdin.write(END_LINE * ended)
    pipe.stdin.close()

    def look() -> None:
        if patience:
            raise KeyboardInterrupt  # the process has ended

    if ended:
        assert not list(pipe.conversation.questions(lambda: None))
        assert pipe.conversation.over()
    else:
        with pytest.raises(KeyboardInterrupt):
            next(pipe.conversation.questions(look))
        assert patience == [0.0] and not pipe.conversation.over()


def test_what_was_said_is_told_when_it_opens(pipe: Pipe) -> None:
    """The interrupted answer can be stopped like one that was asked for now."""
    report = TurnReport(1, "a", [1], Finish.LENGTH, 2, 90, 1.0, 1.0, 1, 1, 1, 1, 1, question="q")
    complete = TurnRecord(Question("q"), [5, 6], 1, 1, [1], None, report)
    records = [complete, TurnRecord(Question("r"), [7], 4, 4)]
    pipe.conversation.opened(90, records, raw=True)
    (event,) = pipe.events()
    said = {"room": 90, "turns": [asdict(report)], "unfinished": "r", "raw": True}
    assert event == {"event": "opened", **said}
    assert not pipe.conversation.stopped()
    pipe.stdin.write(ENOUGH_LINE)
    limit = time.monotonic() + 10
    while not pipe.conversation.stopped():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_session_that_fails_is_noticed_while_nothing_is_asked(pipe: Pipe) -> None:
    def look() -> None:
        raise RuntimeError("the session has failed")

    with pytest.raises(RuntimeError):
        next(pipe.conversation.questions(look))


def test_a_name_that_the_package_does_not_have() -> None:
    assert not hasattr(mpcache, "nothing")
    assert mpcache.Chat is Chat


# ------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def parties() -> Iterator[LocalParties]:
    settings = Settings(public=PublicConfig(policy="full", max_new_tokens=4))
    with LocalParties(settings, text=TEXT, at_once=2) as there:
        yield there


def expected(questions: list[str]) -> list[str]:
    model, public = load_model(demo_model_dir()), PublicConfig(policy="full", max_new_tokens=4)
    encode = model.tokenizer.encode
    context = encode(TEXT, bos=True)
    bound, _ = bind_conversation(model.shape, public, len(context))
    plain, texts = PlainConversation(model, bound, context), list[str]()
    pending: list[int] = []
    for question in questions:
        pending = list(plain.ask(pending + encode(question, bos=False), 4, Sampling(), ()))[-1:]
        texts.append(plain.result.text)
    return texts


@pytest.mark.slow
@pytest.mark.processes
def test_two_conversations_at_once(parties: LocalParties) -> None:
    questions = ["The code of the red gate is", " and the code of the blue gate is"]
    with parties.chat() as one, parties.chat() as two:
        answers = [["".join(chat.ask(question)) for chat in (one, two)] for question in questions]
        with pytest.raises(mpcache.BadInput, match="the question is empty"):
            "".join(one.ask(" "))
        assert one.account.turns == 2 and one.account.to_server > 1000 and one.account.dealt > 1000
        assert one.room == two.room == one.turns[-1].room
    assert answers == [[text] * 2 for text in expected(questions)]


@pytest.mark.slow
@pytest.mark.processes
def test_who_leaves_an_answer_can_go_on(parties: LocalParties) -> None:
    with parties.chat() as chat:
        for _ in chat.ask("The code of the red gate is"):
            break
        assert len(chat.turns) == 1 and 1 <= len(chat.turns[0].token_ids) < 4
        accounts = [chat.account for _ in chat.ask(Turn(" and", max_new_tokens=2))]
        assert accounts[-1].turns == 1 and accounts[-1].ms > chat.turns[0].ms  # of an answer that runs
        assert chat.turns[0].rounds < accounts[-1].rounds < chat.account.rounds
        assert len(chat.turns[1].token_ids) == 2 and chat.finish_reason == "length"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("victim", [Rank.SERVER, Rank.DEALER])
def test_a_party_that_dies_between_turns_ends_the_conversation(victim: Rank) -> None:
    settings = Settings(public=PublicConfig(policy="full", max_new_tokens=2))
    with LocalParties(settings, text=TEXT) as there, there.chat() as chat:
        "".join(chat.ask("The code of the red gate is"))
        there._children[victim].kill()
        begin = time.monotonic()
        with pytest.raises(PartyFailed, match=victim.label):
            while True:
                "".join(chat.ask(" and"))
                time.sleep(0.1)
        assert time.monotonic() - begin < 30


@pytest.mark.slow
@pytest.mark.processes
def test_a_server_that_cannot_start_says_why() -> None:
    with (
        LocalParties(Settings(), "/no/such/model", text=TEXT) as there,
        pytest.raises(PartyFailed, match="/no/such/model"),
        there.chat(),
    ):
        pass


@pytest.mark.slow
@pytest.mark.processes
def test_the_code_of_the_page_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The listings of docs/python.md; two of them with local parties' config, identity and state."""
    page = (ROOT / "docs/python.md").read_text()
    remote, here, resumed = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(here, "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    settings = Settings(public=PublicConfig(max_new_tokens=24))
    with LocalParties(settings, text=TEXT, state=tmp_path) as there:
        flags = dict(zip(there._own[Rank.CLIENT][::2], there._own[Rank.CLIENT][1::2], strict=True))
        connect = chat_module.connect

        def connect_here(*config: str, state: str | None = None, resume: bool = False, **more: str) -> Chat:
            kept = None if state is None else tmp_path
            return connect(flags["--config"], flags["--identity"], state=kept, resume=resume)

        monkeypatch.setattr(chat_module, "connect", connect_here)
        exec(compile(remote, "docs/python.md", "exec"), {})
        assert "Account(turns=2" in capsys.readouterr().out
        kept = connect_here(state="kept")
        answer = kept.ask("The code of the red gate is")  # an answer that nobody holds is stopped, and whole
        next(answer)
        kept.close(keep=True)
        exec(compile(resumed, "docs/python.md", "exec"), {"mpcache": mpcache})
        assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.processes
def test_masks_that_are_kept_serve_another_run(tmp_path: Path) -> None:
    files, texts = list[set[str]](), list[str]()
    for _ in range(2):
        with mpcache.local(document=TEXT, max_new_tokens=2, setup_dir=tmp_path) as chat:
            texts.append("".join(chat.ask("The code of the red gate is")))
        files.append({file.name for file in (tmp_path / "dealer").glob("*.masks")})
    assert files[0] == files[1] and len(files[0]) == 2  # weights and document, under their names of before
    assert texts[0] == texts[1]


def test_a_local_conversation_takes_the_commands_default_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compact` for the demo model, which has a curve, unless a policy is named."""
    taken: list[str] = []

    def parties(settings: Settings, *rest: object) -> object:
        taken.append(settings.public.policy)
        raise PartyFailed("seen")

    monkeypatch.setattr("mpcache_parties.local_parties.LocalParties", parties)
    for policy in (None, "full"):
        with pytest.raises(PartyFailed, match="seen"), mpcache.local(policy=policy):
            pass
    assert taken == ["compact", "full"]
