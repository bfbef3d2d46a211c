"""`mpcache chat`: a private conversation at a prompt, with parties of this machine or with others."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.config import load_settings
from mpcache.console import terminal
from mpcache.console.inputs import read_text
from mpcache.console.options import (
    ConfigOption,
    ContextOption,
    DocumentAsOption,
    JsonOption,
    ModelOption,
    NetworkOption,
    NewTokensOption,
    PolicyOption,
    PrivateContextOption,
    PrivatePolicyOption,
    ProtocolOption,
    RawOption,
    RevealOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    chat_overrides,
    public_overrides,
    read_stops,
)
from mpcache.errors import BadInput
from mpcache.limits import with_default_policy
from mpcache.report.account import TurnReport
from mpcache.report.units import duration, number, size
from mpcache.sampling import Sampling
from mpcache_parties.chat import Chat, LocalParties, Turn, connect
from mpcache_parties.say import quiet

PROMPT = "> "
SHORT_ROOM = 3  # answers of the present length: then the user is told how much room is left


def chat_here(
    model: ModelOption = None,
    context: ContextOption = None,
    private_context: PrivateContextOption = None,
    private_policy: PrivatePolicyOption = None,
    config: ConfigOption = None,
    identity: Annotated[
        Path | None,
        typer.Option(help="Folder of the client's key: ask the parties that run at --config's addresses."),
    ] = None,
    policy: PolicyOption = None,
    protocol: ProtocolOption = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    reveal: RevealOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask one question after another, privately. Ctrl-D ends; Ctrl-C stops an answer.

    Where stdin is no terminal each of its lines is a question.
    """
    Sampling(temperature, top_p, seed)  # checked before anything starts
    stops = read_stops(stop, True)
    overrides = public_overrides(policy, protocol, network, max_new_tokens, reveal)
    overrides |= chat_overrides(raw, document_as, private_policy)
    with ExitStack() as opened:
        own = None if private_context is None else read_text(private_context)  # once: it may be a pipe
        talk = _open(opened, model, context, own, config, identity, overrides)

        def ask(question: str) -> None:
            turn = Turn(question, None, stops, temperature, top_p, seed)
            _ask(talk, turn, as_json)

        _converse(ask, as_json)
        _close(talk, as_json)


def _open(
    opened: ExitStack,
    model: str | None,
    context: Path | None,
    private: str | None,
    config: Path | None,
    identity: Path | None,
    overrides: dict[str, Any],
) -> Chat:
    """Open a conversation, with parties that run elsewhere or with this machine's; `opened` closes both."""
    with terminal.progress("starting the parties ...") as (say, hush):
        if identity is not None:
            given = [name for name, value in {"--model": model, "--context": context}.items() if value]
            given += [name for name, value in overrides.items() if value is not None]
            if given or config is None:
                raise BadInput(
                    "--identity asks parties that run elsewhere: give --config, and nothing of theirs"
                )
            talk = connect(config, identity, say, private)
        else:
            settings = with_default_policy(load_settings(config, overrides), model)
            text = None if context is None else read_text(context)  # once: it may be a pipe
            talk = opened.enter_context(LocalParties(settings, model, text, at_once=1, say=say)).chat(
                document=private
            )
        hush()
    return opened.enter_context(talk)


def _converse(ask: Callable[[str], None], as_json: bool) -> None:
    """Ask what is typed, until there is no more."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - lines can be edited then
    while True:
        try:
            question = input(PROMPT if typed and not as_json else "")
        except EOFError:
            return
        if not question.strip():
            continue
        if not typed and not as_json:
            _write(f"{PROMPT}{question}\n")
        try:
            ask(question)
        except BadInput as why:  # it was not asked: another may be
            terminal.say(f"error: {why}")


def _ask(talk: Chat, turn: Turn, as_json: bool) -> None:
    """Ask, and show the answer as it comes, and what it took."""
    with _interrupts(talk.stop), terminal.progress("asking ...") as (say, hush):
        waiting = True
        talk.on_progress = say if terminal.err.is_terminal else quiet
        for piece in talk.ask(turn):
            if as_json or not piece:
                continue
            if waiting:
                hush()
                waiting = False
            _write(piece)
    if not as_json:
        _write("\n")
        terminal.say(cost_of(talk.turns[-1]))
        if talk.room < SHORT_ROOM * len(talk.turns[-1].token_ids):
            terminal.say(f"room for {talk.room} more tokens of questions and answers; then begin a new chat")


def cost_of(turn: TurnReport) -> str:
    """Return what a turn took, in one line."""
    tokens = len(turn.token_ids)
    return (
        f"  [{tokens} token{'s' * (tokens != 1)} in {duration(turn.ms)}, {number(turn.rounds)} rounds, "
        f"{size(turn.sent)} sent, {size(turn.received)} received, "
        f"{size(turn.offline_received)} from the dealer]"
    )


def _close(talk: Chat, as_json: bool) -> None:
    account = talk.account
    if as_json:
        turns: list[dict[str, Any]] = [asdict(turn) for turn in talk.turns]
        print(json.dumps({"turns": turns, "account": asdict(account), "room": talk.room}))
    elif account.turns:
        terminal.say(
            f"{account.turns} answers: {number(account.rounds)} rounds; the server has received "
            f"{size(account.to_server)} of noise, the dealer {size(account.to_dealer)} of sizes"
        )


@contextmanager
def _interrupts(act: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C do this instead of ending the program."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
