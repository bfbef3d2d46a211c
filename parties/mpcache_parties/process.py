"""Run a party as a process, in one of three modes: one session, one session after another, or tapes.

    flags -> settings -> identity -> own input -> connect -> mode

An error of its own input is told to the parties that wait for this one; every error ends in one line and
an exit code.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NoReturn

import torch

from mpcache.answer import left_range
from mpcache.choices import POLICY_AUTO
from mpcache.config import Settings
from mpcache.console.signals import stop_on_signals
from mpcache.console.streams import own_stdout
from mpcache.errors import BadInput, MpcacheError, PortInUse, StateError, told_as
from mpcache.ledger import Ledger
from mpcache.phases import ChunkPlace
from mpcache.policy import parse_policy
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.transport.link import Hello, Links
from mpcache_parties.answer_pace import LayerPace, Told, answer_said
from mpcache_parties.farm import Farm
from mpcache_parties.handshake import (
    AS_CLIENT,
    DOCUMENT,
    NO_NAME,
    NOT_TOLD,
    PROTOCOL_VERSION,
    Greeting,
    TapeMode,
)
from mpcache_parties.masking import mask_ahead
from mpcache_parties.network.connect import cannot_take_part, connect_all
from mpcache_parties.network.session_network import Network
from mpcache_parties.network.tls import Trust, trust
from mpcache_parties.operations.exposure import exposed
from mpcache_parties.operations.logs import Log
from mpcache_parties.operations.output import EventKind, Output, closing_line
from mpcache_parties.operations.status import PartyStatus, SessionPhase, SessionStatus
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.prepare import prepare
from mpcache_parties.private_inputs import Conversation, Document, Documents, PrivateInput, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.say import Say
from mpcache_parties.serving import AT_ONCE, serve_all
from mpcache_parties.sharding import Shards
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.setups import ServerSetups, Setups
from mpcache_parties.state.tapes import TapeStore

# How long a thread that computes keeps the interpreter from gRPC's threads, which wait for it at each round
# anyway: with Python's own 5 ms a token takes 3 to 5 % more CPU time.
SWITCH_S = 0.03
END_S = 5.0  # for a process whose parent is gone to end in order


@dataclass
class PartyProcess:
    """One party on this machine: what all its sessions share.

    The first five are there from the start; the others once its own input has been checked.
    """

    me: Rank
    settings: Settings
    trust: Trust
    output: Output
    status: PartyStatus
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
    tapes: TapeStore | None = None
    tape_mode: TapeMode = TapeMode.LIVE
    setups: Setups = None
    own: PrivateInput = None
    shards: Shards | None = None
    farm: Farm | None = None
    batches: int = 1
    document: str = AS_CLIENT  # its public name, where this party has one to name

    def read_inputs(self, options: PartyOptions) -> None:
        """Check the flags and read what they name. Raises BadInput or StateError."""
        options.check()
        if self.settings.public.policy != POLICY_AUTO:
            parse_policy(self.settings.public.policy)
        sampling = options.sampling()
        self.checkpointer = options.checkpointer()
        self.tapes = options.tapes(self.checkpointer.mode)
        if options.preparing:
            self.tape_mode = TapeMode.PREPARING
        elif self.tapes is not None:
            self.tape_mode = TapeMode.PREPARED
        self.setups = options.setups(self.settings.public)
        if options.ray is not None:
            options.check_sharding(self.settings.public)
            if options.preparing:
                self.farm = Farm.open(options.ray, options.offline_store)
            else:
                self.shards = Shards.open(options.ray, options.ray_actors, self.me, self.output.say)
        self.batches = options.batches or 1
        self.own = options.private_input(sampling, self.settings.public, self.output)
        if self.me is Rank.CLIENT:
            self.document = options.named_document()
        elif isinstance(self.own, Document):
            self.document = NO_NAME

    def close(self) -> None:
        """End what runs on a cluster."""
        for there in (self.shards, self.farm):
            if there is not None:
                there.close()

    def resources(
        self, network: Network, status: SessionStatus, checkpointer: Checkpointer, say: Say
    ) -> SessionResources:
        """Return what a session on this network stands on."""
        return SessionResources(
            network.links, network.ledger, self.settings.public, say, self.output.token, status,
            checkpointer, self.tapes, self.settings.timeouts.idle_s, self.setups,
            shards=self.shards,
        )  # fmt: skip

    def greeting(self, checkpointer: Checkpointer) -> Greeting:
        """Return what is said to each peer of a session: all that the parties must have in common."""
        modes = {"state": checkpointer.mode.value, "tapes": self.tape_mode.value, DOCUMENT: self.document}
        hidden = {DOCUMENT: NOT_TOLD} if self.settings.public.hide_document else {}
        return Greeting(self.me, self.settings.public.flat() | modes, {Rank.DEALER: hidden})

    def meet(self, links: Links, greeting: Greeting) -> tuple[dict[Rank, Hello], str, PrivateInput]:
        """Hear what all say at HELLO.

        Returns what the others said, the public name of the session's document, and what this party brings
        to it. Raises Mismatch: it has no such document.
        """
        others = greeting.agree(links)
        name = others[Rank.CLIENT].public[DOCUMENT] if self.me is not Rank.CLIENT else self.document
        hidden = self.settings.public.hide_document
        own = self.own.of(name, hidden) if isinstance(self.own, Documents) else self.own
        return others, NOT_TOLD if hidden else name, own


def run_party(options: PartyOptions) -> None:
    """Run one party until its part is done. Raises SystemExit with an error's exit code, once it is told."""
    if options.events and not options.conversation:  # else it is read from
        threading.Thread(target=_end_with_parent, daemon=True).start()
    output, process = Output(options.events, own_stdout("utf-8") if options.events else None), None
    with ExitStack() as shown:
        try:
            stop_on_signals(options.me.label)
            torch.set_num_threads(1)  # three parties with a thread per core each would fight for the cores
            sys.setswitchinterval(SWITCH_S)
            process = _open_process(options, output, shown)
            _take_part(process, options, shown)
        except (MpcacheError, OSError) as error:
            output.error(told := told_as(error))
            if process is not None:
                _say_how_to_resume(process)
            raise SystemExit(told.exit_code) from None
        finally:
            if process is not None:
                process.close()


def _open_process(options: PartyOptions, output: Output, shown: ExitStack) -> PartyProcess:
    """Read settings and identity, and show the party's status. Raises BadInput or PortInUse."""
    me = options.me
    output.log = Log(me.label, options.log, options.log_level)
    settings = options.settings()
    trusted = trust(me, settings, options.identity, options.insecure)
    if options.insecure:
        output.say(f"{me.label}: warning: --insecure: the links are neither encrypted nor authenticated")
    for warning in trusted.warnings():
        output.say(f"{me.label}: warning: {warning}")
    status = shown.enter_context(exposed(PartyStatus(me, output.log), options.metrics, options.health))
    output.log("start", version=PROTOCOL_VERSION, tls=trusted.tls, values=settings.public.flat())
    return PartyProcess(me, settings, trusted, output, status)


def _take_part(process: PartyProcess, options: PartyOptions, shown: ExitStack) -> None:
    """Read this party's input, connect, and go through its mode; `shown` holds the session's status."""
    try:
        process.read_inputs(options)
        if options.serve:
            serve_sessions(process, options.sessions or AT_ONCE)
        ledger = Ledger()
        status = shown.enter_context(process.status.session(ledger))
        greeting = process.greeting(process.checkpointer)
        network = _connect(process, ledger, greeting)
    except (BadInput, PortInUse, StateError, OSError) as error:
        process.output.error(told := told_as(error))
        _tell_the_others(process, told)
        raise SystemExit(told.exit_code) from None
    with network:
        if process.tape_mode is TapeMode.PREPARING:
            prepare_tapes(process, network, status, greeting)
        else:
            run_one_session(process, network, status, greeting)


def _connect(process: PartyProcess, ledger: Ledger, greeting: Greeting) -> Network:
    """Connect with the parties that take part: with tapes from a store, the dealer does not."""
    process.status.be_ready(True)
    dealt = process.tape_mode is TapeMode.PREPARED
    peers = (Rank.SERVER, Rank.CLIENT) if dealt else tuple(Rank)
    say = process.output.say
    return connect_all(process.me, process.settings, ledger, say, peers, process.trust, greeting)


# ------------------------------------------------------------------------------------------- modes


def run_one_session(
    process: PartyProcess, network: Network, status: SessionStatus, greeting: Greeting
) -> None:
    """Mode: one session, and its account at the end."""
    resources = process.resources(network, status, process.checkpointer, process.output.say)
    if isinstance(process.own, Conversation):
        status.on_layer = LayerPace(_layer_events(process.output, status))
    elif isinstance(process.own, Question):
        tokens = process.own.limit(process.settings.public.max_new_tokens)
        status.on_layer = LayerPace(answer_said(process.output.say, tokens))
    report = _run_session(process, resources, greeting)
    process.output.report(report)
    if report.in_range is False and not process.output.events:  # else who reads the events tells it
        network.close()
        raise left_range(len(report.token_ids))


TRAFFIC_EVERY_S = 1.0


def _layer_events(output: Output, status: SessionStatus) -> Told:
    """Return what tells each layer, and now and then what the session has taken: summing it takes a while."""
    said = 0.0

    def tell(phase: str, layer: int, layers: int, left_ms: float | None) -> None:
        nonlocal said
        more = {}
        if layer == 0 or time.monotonic() > said + TRAFFIC_EVERY_S:
            more, said = {"traffic": asdict(status.so_far(phase))}, time.monotonic()
        output.event(EventKind.LAYER, phase=phase, layer=layer, layers=layers, left_ms=left_ms, **more)

    return tell


def serve_sessions(process: PartyProcess, at_once: int) -> NoReturn:
    """Mode `--serve`: sessions until this process is told to stop, `at_once` of them at the same time."""
    process.status.be_ready(True)
    own, setups, say = process.own, process.setups, process.output.say
    owns = [own] if isinstance(own, Document) else []
    if isinstance(own, Documents):
        owns = list(own.named.values())
    if owns and isinstance(setups, ServerSetups):
        ahead = (owns, process.settings.public, setups, say, process.shards)
        threading.Thread(target=mask_ahead, args=ahead, daemon=True).start()
    serve_one = partial(_serve_one, process, at_once)
    refused = process.status.refuse
    serve_all(process.me, process.settings, process.trust, at_once, serve_one, say, refused)


def prepare_tapes(process: PartyProcess, network: Network, status: SessionStatus, greeting: Greeting) -> None:
    """Mode `--prepare`: the dealer's part of a later session, dealt and stored."""
    status.reached(SessionPhase.HELLO)
    resources = process.resources(network, status, process.checkpointer, process.output.say)
    _, name, own = process.meet(network.links, greeting)
    prepare(process.me, replace(resources, document=name), own, process.batches, process.farm)


def _serve_one(process: PartyProcess, at_once: int, network: Network, say: Say) -> None:
    """One of many sessions, on its own thread; afterwards its files are free for the client to resume it."""
    patience = process.settings.timeouts.reconnect_s  # by then a client that is lost is known to be
    checkpointer = Checkpointer(process.checkpointer.store, serving=at_once, patience=patience)
    with closing(checkpointer), process.status.session(network.ledger) as status:
        try:
            greeting = process.greeting(checkpointer)
            network.wait(greeting.look)
            report = _run_session(process, process.resources(network, status, checkpointer, say), greeting)
        except (MpcacheError, OSError):
            if (last := checkpointer.last) is not None:
                say(f"kept {_up_to(last)}; its client can go on with --resume")
            raise
    process.output.event(EventKind.REPORT, report=report.to_dict())
    say(closing_line(report))


def _run_session(process: PartyProcess, resources: SessionResources, greeting: Greeting) -> Report:
    """One session on links that are connected."""
    status, checkpointer = resources.status, resources.checkpointer
    status.reached(SessionPhase.HELLO)
    others, name, own = process.meet(resources.links, greeting)
    resources = replace(resources, document=name)
    checkpointer.heard({peer: hello.public["state"] for peer, hello in others.items()})
    match own:
        case Document() as document:
            report = serve(resources, document)
        case Question() | Conversation() as questions:
            report = ask(resources, questions)
        case _:
            report = deal(resources)
    status.reached(SessionPhase.CLOSE)
    return report


# --------------------------------------------------------------------------------------------- end


def _tell_the_others(process: PartyProcess, error: MpcacheError) -> None:
    cannot_take_part(process.me, process.settings, process.trust, error.for_peers)


def _say_how_to_resume(process: PartyProcess) -> None:
    if (last := process.checkpointer.last) is not None:
        whom = "it" if process.checkpointer.alone else "all parties"
        process.output.say(
            f"{process.me.label}: kept {_up_to(last)}; start {whom} again with --resume to go on"
        )


def _up_to(place: ChunkPlace) -> str:
    if not place.turn:
        return f"the session up to {place.reached}"
    turn = f" of turn {place.turn}" if place.turn > 1 else ""
    return f"the session up to token {place.step}{turn}" if place.step else "the session up to its context"


def _end_with_parent() -> None:
    """End with the parent, which holds the other end of stdin."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), 15)  # in order, if possible
    time.sleep(END_S)
    os._exit(143)
