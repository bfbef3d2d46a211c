"""Whole sessions of the real parties on the needle's model, in one process, with all that they see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from mpcache.config import PublicConfig
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache_parties.private_inputs import Question
from tests.support.needle import Secret
from tests.support.record import LayerView, recording
from tests.support.session import run_session
from tests.support.uniformity import Bytes

SELECTS = ":n_keep=1.0,coarse=4,fine=4,sink=0,recent=0,coarse_keep=1,fine_keep=1,share=none"
STEPS = ("context", "question", "decode1")
LOGITS = "logits for the client"
MEANT = {
    LOGITS,
    "whether all was in range",
}  # the opened values that are meant to be in the clear, at the client

Views = dict[Rank, LayerView]


def sessions(
    model: Model, secrets: Iterable[Secret], policy: str, protocol: str = "fast"
) -> Iterator[tuple[Views, Report]]:
    """What each party saw, and the client's report."""
    public = PublicConfig(policy=policy, protocol=protocol, max_new_tokens=2)  # type: ignore[arg-type]
    for secret in secrets:
        with recording() as views:
            reports = run_session(public, model, secret.document(), Question(secret.text, stop_at_eos=False))
        for report in reports.values():
            if not isinstance(report, Report):
                raise report
        client = reports[Rank.CLIENT]
        assert isinstance(client, Report)
        yield views, client


def by_reason(views: Iterable[LayerView], received: bool) -> dict[tuple[str, str, int], Bytes]:
    """Opened values (or the shares that came in for them) of all views, by reason, place and width.

    CrypTen opens masked bits as whole words of value 0 or 1: those come packed, 8 to a byte.
    """
    found: dict[tuple[str, str, int], list[Bytes]] = defaultdict(list)
    for view in views:
        for seen in view.opened:
            values = seen.received if received else seen.values
            if values is None:
                continue
            place, width = seen.step.partition("/")[2], seen.width  # the same in every phase
            single = seen.why == "masked by CrypTen" and not (seen.values[:, 0] > 1).any()
            if single and not seen.values[:, 1:].any():
                n = len(values) // 8 * 8
                values = np.packbits(values[:n, 0] & 1).reshape(-1, 1)
                place, width = f"{place}, bits", 1
            found[seen.why, place, width].append(values)
    return {key: np.concatenate(values) for key, values in found.items()}
