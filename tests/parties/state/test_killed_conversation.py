"""Real parties, killed in the middle of a conversation: it goes on, and says what was said before."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig, Settings
from mpcache.limits import bind_conversation
from mpcache.model import demo_model_dir, load_model
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache_parties.chat import Chat
from mpcache_parties.launch import PartyFailed
from mpcache_parties.local_parties import LocalParties
from tests.support.processes import CLI, SOON_S, environment, started

pytestmark = [pytest.mark.processes, pytest.mark.slow]

S, C, D = Rank
TEXT = "The code of the red gate is 4921. The code of the blue gate is 7035.\n"
QUESTIONS = ["The code of the red gate is", " and the code of the blue gate is", " and that of the red one"]
SETTINGS = Settings(public=PublicConfig(policy="full", max_new_tokens=6))


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the plain engine answers, turn by turn."""
    model, public = load_model(demo_model_dir()), SETTINGS.public
    encode = model.tokenizer.encode
    context = encode(TEXT, bos=True)
    bound, _ = bind_conversation(model.shape, public, len(context))
    plain, texts, pending = PlainConversation(model, bound, context), list[str](), list[int]()
    for question in QUESTIONS:
        pending = list(plain.ask(pending + encode(question, bos=False), 6, Sampling(), ()))[-1:]
        texts.append(plain.result.text)
    return texts


def said(chat: Chat) -> list[str]:
    return [turn.text for turn in chat.turns]


def check_rest(chat: Chat, expected: Sequence[str]) -> None:
    """The second answer was interrupted; it and the third come as if nothing had happened."""
    assert said(chat) == [expected[0]] and chat.unfinished == QUESTIONS[1]
    with pytest.raises(Exception, match="an answer runs"):
        next(iter(chat.ask("too early")))
    assert "".join(chat.go_on()) == expected[1] and chat.unfinished is None
    assert "".join(chat.ask(QUESTIONS[2])) == expected[2]
    assert [turn.question for turn in chat.turns] == QUESTIONS
    assert chat.turns[1].rounds == chat.turns[2].rounds  # those before the kill, too


def check_gone(state: Path) -> None:
    assert sorted(f.name for f in state.glob("*/*")) == ["key"] * 3


@pytest.mark.parametrize("victims", [(S,), (D,), (S, C, D)], ids=["server", "dealer", "all"])
def test_parties_are_killed_in_the_second_answer(
    victims: tuple[Rank, ...], expected: list[str], tmp_path: Path
) -> None:
    with LocalParties(SETTINGS, text=TEXT, state=tmp_path) as there:
        chat = there.chat(state=tmp_path)
        assert "".join(chat.ask(QUESTIONS[0])) == expected[0]
        pieces = chat.ask(QUESTIONS[1])
        next(pieces)
        client = chat._child
        assert client is not None
        for victim in victims:
            (client if victim is C else there._children[victim]).kill()
        with pytest.raises(PartyFailed):
            for _ in pieces:
                pass
        chat.close(keep=True)
    with (
        LocalParties(SETTINGS, text=TEXT, state=tmp_path) as there,
        there.chat(state=tmp_path, resume=True) as chat,
    ):
        check_rest(chat, expected)
    check_gone(tmp_path)


def test_a_set_up_that_stays_serves_a_conversation_that_goes_on(expected: list[str], tmp_path: Path) -> None:
    """New processes of all three: no set-up is written anew, and no weight goes to anybody."""
    state, kept, lines = tmp_path / "state", tmp_path / "set-ups", list[str]()
    with LocalParties(SETTINGS, text=TEXT, setup_dir=kept, state=state) as there:
        chat = there.chat(state=state)
        assert "".join(chat.ask(QUESTIONS[0])) == expected[0]
        pieces = chat.ask(QUESTIONS[1])
        next(pieces)
        _kill(chat)
    contexts = [file.stat().st_size for file in state.glob("*/*/context.state")]
    held = {file: file.stat().st_ino for file in kept.rglob("*") if file.is_file()}
    assert len(contexts) == 3 and max(contexts) < max(file.stat().st_size for file in held)
    with (
        LocalParties(SETTINGS, text=TEXT, setup_dir=kept, state=state, say=lines.append) as there,
        there.chat(state=state, resume=True) as chat,
    ):
        check_rest(chat, expected)
    assert {file: file.stat().st_ino for file in kept.rglob("*") if file.is_file()} == held
    assert not any("sent to the dealer" in line for line in lines), lines
    check_gone(state)


def test_a_client_is_killed_where_the_others_serve(expected: list[str], tmp_path: Path) -> None:
    """They go on serving; the client alone is started again, twice."""
    with LocalParties(SETTINGS, text=TEXT, state=tmp_path) as there:
        chat = there.chat(state=tmp_path)
        assert "".join(chat.ask(QUESTIONS[0])) == expected[0]
        _kill(chat)  # between two turns
        chat = there.chat(state=tmp_path, resume=True)
        assert said(chat) == expected[:1] and chat.unfinished is None
        pieces = chat.ask(QUESTIONS[1])
        next(pieces)
        _kill(chat)
        with there.chat(state=tmp_path, resume=True) as chat:
            check_rest(chat, expected)
    check_gone(tmp_path)


def _kill(chat: Chat) -> None:
    assert chat._child is not None
    chat._child.kill()
    chat.close(keep=True)


def test_the_command_is_killed_and_shows_what_was_said(expected: list[str], tmp_path: Path) -> None:
    """kill -9 of `mpcache chat` itself: its processes suspend the session as their stdin closes."""
    document, state = tmp_path / "document.txt", tmp_path / "state"
    document.write_text(TEXT)
    flags = [
        *CLI, "chat", "--context", str(document), "--policy", "full", "--max-new-tokens", "6",
        "--state", str(state),
    ]  # fmt: skip

    def start(*more: str) -> subprocess.Popen[Any]:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        child = subprocess.Popen([*flags, *more], env=environment(), **pipes, text=True)
        children.append(child)
        return child

    with started() as children:
        child = start()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n".join(QUESTIONS[:2]) + "\n")
        child.stdin.flush()
        shown = ""
        while f"> {QUESTIONS[1]}\n" not in shown:
            shown += child.stdout.read(1)
        limit = time.monotonic() + 60
        while not any(int(f.stem) > 6 for f in (state / "client").glob("*/0*.state")):
            assert time.monotonic() < limit
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait(SOON_S)
        assert shown.startswith(f"> {QUESTIONS[0]}\n{expected[0]}\n")
        child = start("--resume")
        out, noise = child.communicate(f"{QUESTIONS[2]}\n", timeout=120)
        assert child.returncode == 0 and "error" not in noise, noise
    dialogue = "".join(f"> {q}\n{a}\n" for q, a in zip(QUESTIONS, expected, strict=True))
    assert out == dialogue
    check_gone(state)
