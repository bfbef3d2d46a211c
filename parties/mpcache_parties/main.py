"""`mpcache-party`: one of the three parties, as a process of its own."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mpcache.config import Settings, load_settings
from mpcache.console.inputs import read_question, read_text
from mpcache.console.signals import ignore_signals, stop_on_signals
from mpcache.demo import DEMO_DOCUMENT
from mpcache.errors import BadInput, MpcacheError, PortInUse, StateError
from mpcache.ledger import Ledger
from mpcache.model import demo_model_dir, load_model
from mpcache.policy import parse_policy
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration, number, size
from mpcache.sampling import Sampling
from mpcache_parties.handshake import NONE, PROTOCOL_VERSION, agree
from mpcache_parties.keys import keygen, pin
from mpcache_parties.network.grpc_link import Network, Say, cannot_take_part, connect_all
from mpcache_parties.network.tls import trust
from mpcache_parties.operations.logs import Log
from mpcache_parties.operations.metrics import operated
from mpcache_parties.operations.status import PartyStatus, SessionStatus
from mpcache_parties.prepare import prepare
from mpcache_parties.roles import Document, Question, ask, deal, serve
from mpcache_parties.serving import AT_ONCE, serve_all
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import Store
from mpcache_parties.state.tapes import TapeStore

TELL_S = 3.0  # how long a party that cannot take part tries to reach the others

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)


@dataclass
class Output:
    """What this party says: lines for people, or (`events`) JSON lines for the process that started it."""

    events: bool
    out: Any = field(default_factory=lambda: sys.stdout)
    log: Log = field(default_factory=lambda: Log(""))

    def event(self, kind: str, **values: Any) -> None:
        if self.events:
            print(json.dumps({"event": kind, **values}), file=self.out, flush=True)

    def say(self, text: str) -> None:
        self.log("note", text=text)
        if self.events:
            self.event("say", text=text)
        else:
            sys.stderr.write(text + "\n")  # whole, whichever thread it is
            sys.stderr.flush()

    def token(self, token: int, text: str) -> None:
        """token: its id, or -1 for text that was held back until the end."""
        if self.events:
            self.event("token", id=token, text=text)
        else:
            print(text, end="", file=self.out, flush=True)

    def error(self, error: MpcacheError) -> None:
        text = str(error)
        self.log("error", "error", name=type(error).__name__, text=error.for_peers, exit_code=error.exit_code)
        if self.events:
            self.event("error", name=type(error).__name__, text=text, exit_code=error.exit_code)
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)

    def report(self, report: Report) -> None:
        self.event("report", report=report.to_dict())
        self.log("end", text=closing_line(report))
        if not self.events:
            if report.rank == Rank.CLIENT:
                print(file=self.out, flush=True)
            print(closing_line(report), file=sys.stderr, flush=True)


def closing_line(report: Report) -> str:
    """One party's session in one line."""
    who = Rank(report.rank).label
    steps = len(report.phases) - 2  # without set-up and context
    offline = report.per_token("offline_sent") + report.per_token("offline_received")
    parts = [f"{who}: done: {steps} token{'s' * (steps != 1)}, {duration(report.per_token('ms'))} each"]
    if report.rank != Rank.DEALER:
        parts.append(f"{number(report.per_token('rounds'))} rounds, {size(report.per_token('sent'))} sent")
    parts.append(f"{size(offline)} {'sent' if report.rank == Rank.DEALER else 'from the dealer'}")
    return ", ".join(parts)


app.command()(keygen)
app.command()(pin)


@app.callback(invoke_without_command=True)
def party(
    command: typer.Context,
    rank: Annotated[
        int | None, typer.Option(min=0, max=2, help="0: server, 1: client, 2: dealer.  [required]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="What all parties agree on: a YAML file.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Server: a Hugging Face folder. [the demo model]")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="Server: the document, a text file. [the demo's]")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Client: the question. [the demo's]")] = None,
    question_file: Annotated[
        Path | None, typer.Option(help="Client: a file with the question, or - for stdin; unseen by `ps`.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="NAME[:key=value,...], as `mpcache policies` lists.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="fast, fast-bits, auto or stock.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Client: 0 is greedy. [0]")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Client: share of probability to draw from. [1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Client: seed of the draws. [0]")] = None,
    stop_at_eos: Annotated[
        bool, typer.Option(help="Client: end at the model's end token; the answer's length is public then.")
    ] = True,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Keep this party's part of the session here after each token, encrypted. "
            "With --serve: of the sessions whose client asks for it."
        ),
    ] = None,
    state_key: Annotated[
        Path | None, typer.Option(help="The key for it, mode 0600; made if there is none. [in --state]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the session in --state; all alike, but for who serves."),
    ] = False,
    offline_store: Annotated[
        Path | None, typer.Option(help="Server, client: use tapes from here in place of a dealer.")
    ] = None,
    prepare_tokens: Annotated[
        int | None, typer.Option("--prepare", help="Deal tapes for one answer of so many tokens, store them.")
    ] = None,
    connect_timeout: Annotated[float | None, typer.Option(help="Seconds to wait for the others.")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="Folder of this party's key and certificate: the links use TLS.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, whatever the addresses: for a network you trust.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Append a JSON line for each event, without secrets; - is stderr.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus to read.  [HOST: this machine alone]")
    ] = None,
    health: Annotated[
        str | None, typer.Option(help="[HOST:]PORT of gRPC's standard health service.  [likewise]")
    ] = None,
    serve_on: Annotated[
        bool,
        typer.Option("--serve", help="Server or dealer: serve one session after another until stopped."),
    ] = False,
    sessions: Annotated[
        int | None, typer.Option(min=1, max=64, help=f"With --serve: how many at once. [{AT_ONCE}]")
    ] = None,
    events: Annotated[
        bool,
        typer.Option("--events", help="JSON lines on stdout; ends when stdin closes: for a parent process."),
    ] = False,
) -> None:
    """Run one party until the answer is complete. Start all three, in any order.

    With --serve a server or a dealer stays, and keeps its model and document for the next client.
    Without flags: the demo model, document and question, over loopback.
    """
    if command.invoked_subcommand is not None:
        return
    if rank is None:
        raise typer.BadParameter("give --rank 0 (server), 1 (client) or 2 (dealer)", param_hint="--rank")
    me, voice = Rank(rank), Output(events)
    if events:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    stop_on_signals(me.label)
    torch.set_num_threads(1)  # three parties with a thread per core each would fight for the cores
    settings, shown, keeper = Settings(), ExitStack(), Checkpointer()
    try:
        voice.log = Log(me.label, log, log_level)
        settings = load_settings(
            config,
            {
                "public.policy": policy,
                "public.protocol": protocol,
                "public.max_new_tokens": max_new_tokens if prepare_tokens is None else prepare_tokens,
                "timeouts.connect_s": connect_timeout,
            },
        )
        trusted = trust(me, settings, identity, insecure)
        if insecure:
            voice.say(f"{me.label}: warning: --insecure: the links are neither encrypted nor authenticated")
        board = shown.enter_context(operated(PartyStatus(me, voice.log), metrics, health))
        voice.log("start", version=PROTOCOL_VERSION, tls=trusted.tls, values=settings.public.flat())
        try:
            _check_flags(me, {"model": (Rank.SERVER, model), "context": (Rank.SERVER, context),
                              "question": (Rank.CLIENT, question),
                              "question-file": (Rank.CLIENT, question_file),
                              "temperature": (Rank.CLIENT, temperature),
                              "top-p": (Rank.CLIENT, top_p), "seed": (Rank.CLIENT, seed)})  # fmt: skip
            _check_serving(me, serve_on, sessions, resume, offline_store)
            parse_policy(settings.public.policy)
            sampling = Sampling(temperature or 0.0, 1.0 if top_p is None else top_p, seed or 0)
            if events and str(question_file) == "-":
                raise BadInput("--events and --question-file -: both want stdin")
            keeper = _keeper(me, state, state_key, resume)
            tapes = _tapes(me, offline_store, prepare_tokens is not None, keeper)
            own = _own(me, model, context, question, question_file, sampling, stop_at_eos)
            if serve_on:
                board.be_ready(True)
                at_once = sessions or AT_ONCE
                one = partial(_serve_one, me, settings, own, voice, board, keeper.store, at_once)
                serve_all(me, settings, trusted, at_once, one, voice.say)
            ledger = Ledger()
            watch = shown.enter_context(board.session(ledger))
            board.be_ready(True)
            dealt = offline_store is not None and prepare_tokens is None
            peers = (Rank.SERVER, Rank.CLIENT) if dealt else tuple(Rank)
            network = connect_all(me, settings, ledger, voice.say, trust=trusted, peers=peers)
        except (BadInput, PortInUse, StateError) as error:
            voice.error(error)
            seconds = min(TELL_S, settings.timeouts.connect_s)
            cannot_take_part(me, settings, trusted, error.for_peers, seconds)
            raise typer.Exit(error.exit_code) from None
        with network:
            if prepare_tokens is not None:
                watch.reached("hello")
                agree(network.links, me, _said(settings, keeper, "prepare"))
                prepare(me, network.links, settings.public, own, tapes, voice.say)
                return
            voice.report(_run(me, network, settings, own, voice.say, voice, watch, keeper, tapes))
    except MpcacheError as error:
        voice.error(error)
        if (last := keeper.last) is not None:
            whom = "it" if keeper.alone else "all parties"
            voice.say(f"{me.label}: kept {last_token(last)}; start {whom} again with --resume to go on")
        raise typer.Exit(error.exit_code) from None
    finally:
        shown.__exit__(*sys.exc_info())


def _keeper(me: Rank, state: Path | None, state_key: Path | None, resume: bool) -> Checkpointer:
    """What --state, --state-key and --resume ask for. Raises BadInput or StateError."""
    if state is None and (resume or state_key is not None):
        raise BadInput(
            f"--{'resume' if resume else 'state-key'} needs --state DIR, where the session is kept"
        )
    keeper = Checkpointer(None if state is None else Store(state, me, state_key), resume)
    keeper.check()
    return keeper


def _tapes(me: Rank, folder: Path | None, preparing: bool, keeper: Checkpointer) -> TapeStore | None:
    """What --offline-store and --prepare ask for. Raises BadInput or StateError."""
    if me is Rank.DEALER:
        if folder is not None:
            raise BadInput("--offline-store belongs to server and client; the dealer takes --prepare alone")
        return None
    if folder is None:
        if preparing:
            raise BadInput("--prepare needs --offline-store DIR, where the tapes go")
        return None
    if keeper.mode != NONE:
        raise BadInput("--offline-store with --state: an answer from prepared tapes cannot be resumed")
    return TapeStore(folder, me)


def last_token(step: int) -> str:
    return f"the session up to token {step}" if step else "the session up to its context"


def _check_flags(me: Rank, flags: dict[str, tuple[Rank, object]]) -> None:
    """A document given to the client is a mistake that should not pass in silence."""
    for name, (owner, value) in flags.items():
        if value is not None and owner is not me:
            raise BadInput(
                f"--{name} belongs to the {owner.label} (--rank {int(owner)}), this is the {me.label}"
            )


def _check_serving(
    me: Rank, serving: bool, sessions: int | None, resume: bool, offline_store: Path | None
) -> None:
    if serving and me is Rank.CLIENT:
        raise BadInput("--serve belongs to the server and the dealer (--rank 0, 2), this is the client")
    if serving and resume:
        raise BadInput("--resume is said by the client where others --serve; give --serve --state alone here")
    if serving and offline_store is not None:
        raise BadInput("--offline-store is for one session, --serve has many; give one of them")
    if sessions is not None and not serving:
        raise BadInput("--sessions is how many sessions --serve takes at once; give --serve, too")


def _own(
    me: Rank,
    model: Path | None,
    context: Path | None,
    question: str | None,
    question_file: Path | None,
    sampling: Sampling,
    stop_at_eos: bool,
) -> Document | Question | None:
    """What this party brings, read and checked before it connects. Raises BadInput."""
    match me:
        case Rank.SERVER:
            text = read_text(context or DEMO_DOCUMENT)
            loaded = load_model(model or demo_model_dir())
            tokens = loaded.tokenizer.encode(text, bos=True)
            allowed = loaded.shape.max_positions
            if len(tokens) > allowed:
                raise BadInput(
                    f"the context has {len(tokens)} tokens, the model allows {allowed}; shorten it"
                )
            return Document(loaded, tokens, "cuda" if torch.cuda.is_available() else "cpu")
        case Rank.CLIENT:
            return Question(read_question(question, question_file), sampling, stop_at_eos)
        case _:
            return None


def _serve_one(
    me: Rank,
    settings: Settings,
    own: Document | Question | None,
    voice: Output,
    board: PartyStatus,
    store: Store | None,
    at_once: int,
    network: Network,
    say: Say,
) -> None:
    """One of many sessions, on its own thread; afterwards its files are free for whoever resumes it."""
    patience = settings.timeouts.reconnect_s  # by then a client that is lost is known to be
    keeper = Checkpointer(store, serving=at_once, patience=patience)
    with closing(keeper), board.session(network.ledger) as watch:
        try:
            network.wait()
            report = _run(me, network, settings, own, say, voice, watch, keeper, None)
        except MpcacheError:
            if (last := keeper.last) is not None:
                say(f"kept {last_token(last)}; its client can go on with --resume")
            raise
    voice.event("report", report=report.to_dict())
    say(closing_line(report))


def _run(
    me: Rank,
    network: Network,
    settings: Settings,
    own: Document | Question | None,
    say: Say,
    voice: Output,
    watch: SessionStatus,
    keeper: Checkpointer,
    tapes: TapeStore | None,
) -> Report:
    """One session on links that are connected."""
    links, ledger, public = network.links, network.ledger, settings.public
    watch.reached("hello")
    others = agree(links, me, _said(settings, keeper, "live" if tapes is None else "prepared"))
    keeper.heard({peer: hello.public["state"] for peer, hello in others.items()})
    match own:
        case Document():
            report = serve(links, ledger, public, own, say, watch, keeper, tapes)
        case Question():
            report = ask(links, ledger, public, own, say, voice.token, watch, keeper, tapes)
        case _:
            report = deal(links, ledger, public, say, watch, keeper)
    watch.reached("close")
    return report


def _said(settings: Settings, keeper: Checkpointer, tapes: str) -> dict[str, str]:
    """All that the parties must have in common before they begin."""
    return settings.public.flat() | {"state": keeper.mode, "tapes": tapes}


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone, so are we."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), 15)  # in order, if possible
    time.sleep(5)
    os._exit(143)


def main() -> None:
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except MpcacheError as error:  # told to stop while another error was told
        code = error.exit_code
    finally:
        ignore_signals()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is closed by now. The interpreter's own end would wait for gRPC's threads, which may wait for it.
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
