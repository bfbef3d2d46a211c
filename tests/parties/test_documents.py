"""A server of several documents: a client names one, all compare it, and the dealer need not hear it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from mpcache.config import PublicConfig, Settings
from mpcache.errors import BadInput, Mismatch, PeerFailed
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.transport.frames import FrameLink
from mpcache_parties.handshake import AS_CLIENT, NO_NAME, NOT_TOLD
from mpcache_parties.packing import make_pack
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.private_inputs import Document, Documents, Question
from mpcache_parties.process import PartyProcess
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.say import quiet
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.setups import DealerSetups, ServerSetups
from tests.support.links import context_of, plain_ids, together
from tests.support.session import QUESTION

S, C, D = Rank
PUBLIC = PublicConfig(policy="snapkv:cap=12", max_new_tokens=2)
HIDDEN = PUBLIC.model_copy(update={"hide_document": True})
Said = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture(scope="module")
def documents(model: Model) -> Documents:
    """Two of the same length."""
    tokens = context_of(model, 41)
    packed = {
        name: make_pack(Document(model, some), PUBLIC, quiet).context
        for name, some in (("a", tokens[:40]), ("b", tokens[1:]))
    }
    return Documents({name: Document(model, [], packed=each, name=name) for name, each in packed.items()})


def process(rank: Rank, public: PublicConfig, own: Any, document: str) -> PartyProcess:
    settings, nothing = Settings(public=public), cast(Any, None)
    return PartyProcess(rank, settings, nothing, nothing, nothing, own=own, document=document)


def met(
    public: PublicConfig, own: Document | Documents, named: str, heard: Said | None = None,
    setups: tuple[ServerSetups, DealerSetups] | None = None, run: bool = False,
) -> dict[Rank, Any]:  # fmt: skip
    """Let three parties say Hello; run: and go through the session. Each one's name for the document."""
    keeps = (ServerSetups(fresh_documents=public.hide_document), DealerSetups()) if setups is None else setups
    mine = AS_CLIENT if isinstance(own, Documents) else NO_NAME
    processes = {
        S: process(S, public, own, mine),
        C: process(C, public, Question(QUESTION, stop_at_eos=False), named),
        D: process(D, public, None, AS_CLIENT),
    }

    def job(rank: Rank) -> Any:
        def part(links: dict[Rank, FrameLink], ledger: Ledger) -> Any:
            if heard is not None and rank is not D:
                listen(links[D], heard)
            _, name, mine = processes[rank].meet(links, processes[rank].greeting(Checkpointer()))
            if not run:
                return name if rank is not S else (name, mine)
            resources = SessionResources(links, ledger, public, document=name)
            if rank is D:
                return deal(replace(resources, setups=keeps[1]))
            part: Any = mine
            return serve(replace(resources, setups=keeps[0]), part) if rank is S else ask(resources, part)

        return part

    return together({rank: job(rank) for rank in Rank})


def listen(link: FrameLink, heard: Said) -> None:
    """Note all words that go to the dealer over this link."""
    say, greet = link.send_facts, link.send_hello

    def facts(step: str, told: Mapping[str, Any]) -> None:
        heard.append((step, dict(told)))
        say(step, told)

    def hello(mine: Any) -> None:
        heard.append(("hello", dict(mine.public)))
        greet(mine)

    cast(Any, link).send_facts, cast(Any, link).send_hello = facts, hello


def test_all_hear_the_name_and_the_server_takes_that_document(documents: Documents) -> None:
    ends = met(PUBLIC, documents, "b")
    assert ends == {S: ("b", documents.named["b"]), C: "b", D: "b"}
    one = documents.named["a"]
    assert met(PUBLIC, one, NO_NAME) == {S: (NO_NAME, one), C: NO_NAME, D: NO_NAME}


@pytest.mark.parametrize(
    ("named", "words"),
    [("c", "the document is 'c' at client; the server has a, b"), (NO_NAME, "is not named at client")],
)
def test_a_name_that_the_server_lacks_ends_it(documents: Documents, named: str, words: str) -> None:
    end = met(PUBLIC, documents, named)[S]
    assert isinstance(end, Mismatch) and words in str(end)


def test_a_server_of_one_document_takes_no_name(documents: Documents) -> None:
    ends = met(PUBLIC, documents.named["a"], "a")
    assert any(
        isinstance(end, Mismatch | PeerFailed) and "document is none at server, a at client" in str(end)
        for end in ends.values()
    )


@pytest.mark.parametrize("name", ["", "a b", "../x", AS_CLIENT, "x" * 99])
def test_a_client_that_names_no_name_is_refused(documents: Documents, name: str) -> None:
    assert isinstance(met(PUBLIC, documents, name)[S], Mismatch | PeerFailed)


def test_the_named_document_is_answered_from(documents: Documents, model: Model) -> None:
    tokens = context_of(model, 41)
    for name, some in (("a", tokens[:40]), ("b", tokens[1:])):
        ends = met(PUBLIC, documents, name, run=True)
        assert isinstance(ends[C], Report), ends
        assert ends[C].token_ids == plain_ids(model, PUBLIC, some, QUESTION)


def test_a_hidden_name_does_not_reach_the_dealer(documents: Documents) -> None:
    """Of two documents of the same sizes it hears the same, but for names that are drawn anew each time."""

    def said(public: PublicConfig, name: str) -> Said:
        heard: Said = []
        ends = met(public, documents, name, heard, (ServerSetups(bytes_folder, public.hide_document),
                   dealer), run=True)  # fmt: skip
        assert all(isinstance(end, Report) for end in ends.values()), ends
        drawn = ("session", "identifier", "family", "digest")
        return sorted(
            ((step, {k: v for k, v in told.items() if k not in drawn}) for step, told in heard), key=repr
        )

    bytes_folder, dealer = None, DealerSetups()
    first, again = said(HIDDEN, "a"), said(HIDDEN, "b")
    assert first == again and ("hello" in {step for step, _ in first})
    assert {told["document"] for step, told in first if step == "hello"} == {NOT_TOLD}
    assert said(PUBLIC, "a") != said(PUBLIC, "b")  # it can see: a name that is told


@pytest.mark.parametrize("named", ["wanted", "no name", NO_NAME])
def test_a_hidden_name_that_is_refused_does_not_reach_the_dealer(documents: Documents, named: str) -> None:
    """Nor do the server's: an error is told to all."""
    served: tuple[Document | Documents, ...] = (documents,)
    if named != NO_NAME:
        served = (documents, documents.named["a"])  # of one without a name
    for own in served:
        ends = met(HIDDEN, own, named)
        told = [end.for_peers for end in ends.values() if isinstance(end, Mismatch | PeerFailed)]
        assert told and all("document" in text and "a, b" not in text for text in told)
        assert named == NO_NAME or not any(named in text for text in told)
    assert named == NO_NAME or named in str(met(PUBLIC, documents, named)[S])  # it can see: one that is told


def test_a_hidden_document_is_sent_under_another_name_each_time(documents: Documents) -> None:
    server, dealer = ServerSetups(fresh_documents=True), DealerSetups()
    names = []
    for _ in range(2):
        heard: Said = []
        met(HIDDEN, documents, "a", heard, (server, dealer), run=True)
        said = (str(told["identifier"]) for _, told in heard if "identifier" in told)
        names.append(list(dict.fromkeys(said)))  # server and client say the same
    (weights, first), (same, second) = names
    assert weights == same and first != second
    options = PartyOptions(S, document=("a=x", "b=y"))
    setups = options.setups(HIDDEN)
    assert isinstance(setups, ServerSetups) and setups.fresh_documents
    assert not cast(Any, options.setups(PUBLIC)).fresh_documents


def test_flags_of_a_document_belong_where_they_do() -> None:
    for options, words in (
        (PartyOptions(D, document=("a",)), "--document belongs to server and client"),
        (PartyOptions(C, document=("a", "b")), "a client gives the public name of one document"),
        (PartyOptions(C, document=("a/b",)), "a client gives the public name"),
        (PartyOptions(C, document=("a", "a")), "a client gives the public name of one document"),
        (PartyOptions(S, document=("x",), context=cast(Any, "y")), "--context is a text, --document"),
        (PartyOptions(S, pack_key=cast(Any, "y")), "--pack-key opens a pack; give --document"),
        (PartyOptions(C, pack_key=cast(Any, "y")), "--pack-key belongs to the server"),
    ):
        with pytest.raises(BadInput, match=words):
            options.check()
    assert PartyOptions(C, document=("a", "b")).named_documents() == ("a", "b")
    for given in (("a", "a"), ("a", "b/c")):
        with pytest.raises(BadInput, match="each once"):
            PartyOptions(C, document=given).named_documents()
