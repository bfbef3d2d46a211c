"""A server and a dealer that stay, as processes, and clients that come to them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcache.config import PublicConfig, Settings
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache_parties.handshake import NO_NAME, agree
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network
from mpcache_parties.private_inputs import Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask
from mpcache_parties.state.checkpoint import Checkpointer
from tests.support.links import free_settings, plain_ids
from tests.support.processes import PARTY, SOON_S, Process, errors_of, start, started, write_config

S, C, D = Rank
DOCUMENT = "and the number of the gate of the city is in the book"
QUESTIONS = ("the gate of", "a city and", "number")
TOKENS = 4


def said(public: PublicConfig, keeper: Checkpointer | None = None) -> dict[str, str]:
    """What a client says in HELLO, without `--offline-store`."""
    return public.flat() | {"state": (keeper or Checkpointer()).mode, "tapes": "live", "document": NO_NAME}


def plain(model: Model, public: PublicConfig, question: str) -> list[int]:
    context = model.tokenizer.encode(DOCUMENT, bos=True)
    return plain_ids(model, public, context, question)


@dataclass
class Service:
    """The two that stay. state: where they keep sessions; {rank}: what each has printed since it began."""

    settings: Settings
    config: Path
    flags: dict[Rank, list[object]]
    children: list[Process]
    state: Path | None = None
    parties: dict[Rank, Process] = field(default_factory=dict)
    noise: dict[Rank, list[str]] = field(default_factory=dict)

    @property
    def server(self) -> Process:
        return self.parties[S]

    @property
    def dealer(self) -> Process:
        return self.parties[D]

    def start(self, rank: Rank) -> None:
        """Again, if it has ended."""
        child = start(PARTY, "--rank", int(rank), *self.flags[rank])
        self.children.append(child)
        self.parties[rank], self.noise[rank] = child, (lines := list[str]())

        def read() -> None:
            assert child.stderr is not None
            for line in child.stderr:
                lines.append(line)

        threading.Thread(target=read, daemon=True).start()

    def kill(self, rank: Rank) -> None:
        """kill -9"""
        self.parties[rank].kill()
        self.parties[rank].wait()

    def ask(
        self,
        question: str,
        keeper: Checkpointer | None = None,
        on_token: Callable[[int, str], None] = lambda token, text: None,
        on_links: Callable[[Network], None] = lambda network: None,
    ) -> Report:
        """A client, in this process."""
        keeper, public = keeper or Checkpointer(), self.settings.public
        with contextlib.closing(keeper), connect_all(C, self.settings, Ledger()) as network:
            others = agree(network.links, C, said(public, keeper))
            keeper.heard({peer: hello.public["state"] for peer, hello in others.items()})
            on_links(network)
            own = Question(question, stop_at_eos=False)
            links, ledger = network.links, network.ledger
            resources = SessionResources(links, ledger, public, on_token=on_token, checkpointer=keeper)
            return ask(resources, own)

    def seen(self, rank: Rank, words: str, times: int = 1) -> None:
        """Wait until lines with these words have been printed."""
        limit = time.monotonic() + 90
        while sum(words in line for line in self.noise[rank]) < times:
            assert time.monotonic() < limit, self.noise[rank]
            time.sleep(0.05)

    def stop(self) -> None:
        """Both end in order when they are told to."""
        for child in self.parties.values():
            child.send_signal(signal.SIGTERM)
        for rank, child in self.parties.items():
            assert child.wait(timeout=SOON_S) == 143
            self.seen(rank, "stopped by SIGTERM")
            assert errors_of("".join(self.noise[rank])) == [f"error: {rank.label}: stopped by SIGTERM"]


@contextlib.contextmanager
def serving(
    model: Model,
    tmp_path: Path,
    tokens: int = TOKENS,
    sessions: int = 3,
    reconnect_s: float = 2,
    state: Path | None = None,
    **more: Any,
) -> Iterator[Service]:
    """more: fields of the public config."""
    public = PublicConfig(policy="full", max_new_tokens=tokens, **more)
    settings = free_settings(reconnect_s=reconnect_s)
    settings = settings.model_copy(update={"public": public})
    config = write_config(settings, tmp_path / "config.yaml")
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    flags = ["--config", config, "--serve", "--sessions", sessions]
    flags += [] if state is None else ["--state", state]
    own = {D: flags, S: [*flags, "--model", model.path, "--context", document]}
    with started() as children:
        service = Service(settings, config, own, children, state)
        for rank in own:
            service.start(rank)
        for rank in own:
            service.seen(rank, "serving at")
        yield service
