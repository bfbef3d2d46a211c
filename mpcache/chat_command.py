"""`mpcache chat`: a private conversation at a prompt, with parties of this machine or with others."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from mpcache.config import load_settings
from mpcache.console import terminal
from mpcache.console.inputs import read_text
from mpcache.console.options import (
    ConfigOption,
    ContextOption,
    DocumentAsOption,
    DocumentOption,
    JsonOption,
    ModelOption,
    NetworkOption,
    NewTokensOption,
    PackKeyOption,
    PackPassphraseOption,
    PadOption,
    PolicyOption,
    PrivateContextOption,
    PrivatePolicyOption,
    ProtocolOption,
    RawOption,
    ResumeOption,
    RevealOption,
    SeedOption,
    SetupDirOption,
    StateOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    chat_overrides,
    public_overrides,
    read_stops,
)
from mpcache.console.streamed import StreamedText
from mpcache.errors import BadInput
from mpcache.limits import with_default_policy
from mpcache.report.account import TurnReport
from mpcache.report.units import duration, number, size
from mpcache.sampling import Sampling
from mpcache_parties.chat import Chat, Turn, connect
from mpcache_parties.local_parties import LocalParties
from mpcache_parties.packing import OpenedPack, with_pack_settings
from mpcache_parties.say import quiet

PROMPT = "> "
SHORT_ROOM = 3  # answers of the present length: then the user is told how much room is left


def chat_here(
    model: ModelOption = None,
    context: ContextOption = None,
    private_context: PrivateContextOption = None,
    private_policy: PrivatePolicyOption = None,
    document: DocumentOption = None,
    pack_key: PackKeyOption = None,
    pack_passphrase: PackPassphraseOption = None,
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
    pad: PadOption = None,
    setup_dir: SetupDirOption = None,
    state: StateOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask one question after another, privately. Ctrl-D ends; Ctrl-C stops an answer.

    Where stdin is no terminal each of its lines is a question. With --identity, --document is the public
    name of one of the server's. With --state a conversation outlives a kill of any process; --resume goes on
    with it, and it is forgotten when it ends by Ctrl-D.
    """
    if resume and state is None:
        raise BadInput("--resume needs --state DIR, where the conversation is kept")
    Sampling(temperature, top_p, seed)  # checked before anything starts
    stops = read_stops(stop, True)
    overrides = public_overrides(policy, protocol, network, max_new_tokens, reveal)
    overrides |= chat_overrides(raw, document_as, pad, private_policy)
    with ExitStack() as opened:
        own = None if private_context is None else read_text(private_context)  # once: it may be a pipe
        packed = None
        if identity is None:
            packed = OpenedPack.read(document, pack_key, pack_passphrase, context)
        elif pack_key is not None or pack_passphrase is not None:
            raise BadInput("--identity asks parties that run elsewhere: the server alone opens its packs")
        named = document or "" if identity is not None else ""
        kept = KeptState(setup_dir, state, resume)
        talk = _open(opened, model, context, own, config, identity, overrides, packed, named, kept)

        def ask(question: str) -> None:
            turn = Turn(question, None, stops, temperature, top_p, seed)
            _hear(talk, talk.ask(turn), as_json)

        _go_on(talk, as_json)
        _converse(ask, as_json)
        _close(talk, as_json)


class KeptState(NamedTuple):
    """What outlives this run, and where."""

    setup_dir: Path | None
    state: Path | None
    resume: bool


def _open(
    opened: ExitStack,
    model: str | None,
    context: Path | None,
    private: str | None,
    config: Path | None,
    identity: Path | None,
    overrides: dict[str, Any],
    packed: OpenedPack | None,
    named: str,
    kept: KeptState,
) -> Chat:
    """Open a conversation, with parties that run elsewhere or with this machine's; `opened` closes both."""
    with terminal.progress("starting the parties ...") as (say, hush):
        if identity is not None:
            given = [
                name
                for name, value in {
                    "--model": model,
                    "--context": context,
                    "--setup-dir": kept.setup_dir,
                }.items()
                if value
            ]
            given += [name for name, value in overrides.items() if value is not None]
            if given or config is None:
                raise BadInput(
                    "--identity asks parties that run elsewhere: give --config, and nothing of theirs"
                )
            talk = connect(
                config, identity, say, state=kept.state, resume=kept.resume, document=named,
                private_context=private,
            )  # fmt: skip
        else:
            settings = with_pack_settings(load_settings(config, overrides), packed)
            settings = with_default_policy(settings, model, private is not None, context, terminal.say)
            text = None if context is None else read_text(context)  # once: it may be a pipe
            flags = () if packed is None else packed.flags()
            parties = LocalParties(settings, model, text, 1, say, kept.setup_dir, kept.state, flags)
            talk = opened.enter_context(parties).chat(state=kept.state, resume=kept.resume, private=private)
        hush()
    return opened.enter_context(talk)


def _go_on(talk: Chat, as_json: bool) -> None:
    """Show what was said before the conversation was interrupted, and go on with its last answer."""
    if not as_json:
        for turn in talk.turns:
            _write(f"{PROMPT}{turn.question}\n{turn.text}\n")
        if talk.unfinished is not None:
            _write(f"{PROMPT}{talk.unfinished}\n")
    if talk.unfinished is not None:
        _hear(talk, talk.go_on(), as_json)


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


def _hear(talk: Chat, pieces: Iterator[str], as_json: bool) -> None:
    """Show an answer as it comes, and what it took."""
    with _interrupts(talk.stop), terminal.progress("asking ...") as (say, hush), StreamedText() as text:
        talk.on_progress = say if terminal.err.is_terminal else quiet
        for piece in pieces:
            if as_json or not piece:
                continue
            if not text.began:
                hush()
                talk.on_progress = text.note
            text.write(piece)
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
