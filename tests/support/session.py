"""A whole session of the three parties, as threads on local links."""

from __future__ import annotations

from mpcache.config import PublicConfig
from mpcache.errors import MpcacheError
from mpcache.model.loading import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.links import together

QUESTION = "the gate of"


def run_session(
    public: PublicConfig, model: Model, tokens: list[int], question: Question
) -> dict[Rank, Report | MpcacheError]:
    """Return what each party ended with: its report, or its error."""
    return together(
        {
            Rank.SERVER: lambda links, ledger: serve(
                SessionResources(links, ledger, public), Document(model, tokens)
            ),
            Rank.CLIENT: lambda links, ledger: ask(SessionResources(links, ledger, public), question),
            Rank.DEALER: lambda links, ledger: deal(SessionResources(links, ledger, public)),
        }
    )
