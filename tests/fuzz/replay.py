"""One party alone, with what its peers said in another session: whole, or damaged."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from mpcache.config import PublicConfig
from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.runtime.rng import SEED_BYTES
from mpcache.transport.local import LocalLink
from mpcache_parties import facts
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.state import setups
from mpcache_protos import party_pb2 as pb
from tests.support.record import recording
from tests.support.session import run_session

Conversation = dict[Rank, dict[Rank, list[bytes]]]  # what each party heard, from whom, frame by frame

PUBLIC = PublicConfig(policy="mpcache:n_keep=16,coarse=8,fine=4,sink=1,recent=2", max_new_tokens=3)
QUESTION = Question("the gate of", stop_at_eos=False)
TEXT = "and the number of the gate of the city is " * 4
WAIT_S = 0.05  # for a word that does not come
BYE = pb.Frame(bye=pb.Bye()).SerializeToString()


def converse(model: Model) -> Conversation:
    """A session of the three; all frames that arrived."""
    with recording() as views, same_masks():
        reports = run_session(PUBLIC, model, tokens(model), QUESTION)
    for report in reports.values():
        if isinstance(report, MpcacheError):
            raise report
    return {rank: {peer: views[rank].frames[peer] for peer in Rank if peer is not rank} for rank in Rank}


def tokens(model: Model) -> list[int]:
    return model.tokenizer.encode(TEXT, bos=True)[:24]


class Deaf(LocalLink):
    """A link whose other end only talks."""

    def _carry(self, data: bytes) -> None:
        pass

    _post = _carry


def same_masks() -> Any:
    """Let each server of a test draw one master key: its peers compare what follows from it."""
    return patch.object(setups, "fresh_seed", lambda: bytes(SEED_BYTES))


def session_of(heard: Conversation) -> str:
    """Return the name that the server drew for the recorded session: its peers compare it."""
    for data in heard[Rank.CLIENT][Rank.SERVER]:
        frame = pb.Frame.FromString(data)
        if frame.WhichOneof("kind") == "facts" and frame.facts.step == "facts/model":
            return str(json.loads(frame.facts.json)["session"])
    raise AssertionError("the server told no facts")


def replay(
    model: Model, heard: Conversation, rank: Rank, said: dict[Rank, list[bytes]]
) -> BaseException | None:
    """The party's error, or None if it came to its end."""
    ledger = Ledger()
    links: dict[Rank, Any] = {}
    for peer, frames in said.items():
        links[peer] = link = Deaf(rank, peer, ledger, WAIT_S)
        # A peer ends its part after this party's: here all that it said is there before this party begins.
        last = [data for data in frames[-1:] if data == BYE]
        for data in frames[: len(frames) - len(last)]:
            if not link.arrived(data):
                break
    resources = SessionResources(links, ledger, PUBLIC)
    try:
        with same_masks():
            _play(model, heard, rank, resources)
    except Exception as error:
        return error
    return None


def _play(model: Model, heard: Conversation, rank: Rank, resources: SessionResources) -> None:
    match rank:
        case Rank.SERVER:
            with patch.object(facts, "secrets", SimpleNamespace(token_hex=lambda n: session_of(heard))):
                serve(resources, Document(model, tokens(model)))
        case Rank.CLIENT:
            ask(resources, QUESTION)
        case _:
            deal(resources)
