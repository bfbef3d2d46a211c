"""Mask the server's weights and its document, for the session that asks first, or before any does.

What is masked outlives the session (`mpcache.runtime.standing`). A server that stays makes the masks when it
starts (`mask_ahead`); who connects meanwhile is told how far that is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mpcache.answer import TimedSession, bind_to_document
from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.engines.registry import engine
from mpcache.errors import MpcacheError, told_as
from mpcache.ledger import Ledger
from mpcache.limits import largest_score_held
from mpcache.model import Weights
from mpcache.model.prefill import Prefill, prefill
from mpcache.policy.layer_view import OwnersContext
from mpcache.rank import Rank
from mpcache.report.units import duration, size
from mpcache.runtime.party import Party
from mpcache.runtime.program import Opening, Request
from mpcache.runtime.standing import OwnersMasks
from mpcache.session import WeightsElsewhere
from mpcache_kernels import Backend
from mpcache_parties.facts import facts_of, facts_of_model
from mpcache_parties.kernel_choice import choose_kernels
from mpcache_parties.private_inputs import Document
from mpcache_parties.say import Say
from mpcache_parties.sharding import Shards
from mpcache_parties.state.setups import Made, ServerSetups

SAY_EVERY_S = 2.0
WHAT = {"setup": "weights", "context": "document"}


class Progress:
    """Says how far a transfer is: bytes, share, and an estimate; not more often than every SAY_EVERY_S."""

    def __init__(self, say: Say, what: str) -> None:
        self._say, self._what = say, what
        self._start = self._said = 0.0  # of the first word
        self._before = 0

    def at(self, done: int, total: int) -> bool:
        """Take note of how far it is; returns whether that was said."""
        now = time.monotonic()
        if not self._start:
            self._start = self._said = now
            self._before = done
        if now - self._said < SAY_EVERY_S or not self._before < done < total:
            return False
        self._said = now
        left = (now - self._start) * (total - done) / (done - self._before)
        share = 100 * done // total
        self._say(
            f"{self._what}: {size(done)} of {size(total)} ({share} %), about {duration(1000 * left)} left"
        )
        return True


def masking_progress(say: Say, phase: str) -> Progress:
    """Return what says how far the masking is."""
    return Progress(say, f"server: masking the {WHAT[phase]}")


class Masking:
    """Masks weights and documents at the server, or finds them masked by an earlier session of this process.

    watch: told the phase, bytes done, and of how many.
    """

    def __init__(
        self, setups: ServerSetups, session: TimedSession, watch: Callable[[str, int, int], object],
        shards: Shards | None = None,
    ) -> None:  # fmt: skip
        self._setups, self._session, self._watch, self._shards = setups, session, watch, shards
        self._bits: int = getattr(session.ops, "bits", 0)

    def weights(self, own: Document) -> Made:
        """Return the model's masked weights."""
        session = self._session
        key = f"weights {own.model.digest} {self._bits}"

        def make(masks: OwnersMasks) -> Any:
            weights: Weights | WeightsElsewhere = own.model.weights
            if self._shards is not None:
                weights = self._shards.weights(own.model, self._bits)
            self._masked(masks, lambda: session.setup(weights))
            if self._shards is not None:
                self._shards.say_settled()
            return session.operands

        return self._setups.made(key, make, False, partial(self._told, "setup"))

    def prefilled(self, own: Document) -> Prefill:
        """Return the pass over the document, as an earlier session of this process made it, or anew."""
        policy = self._session.policy
        window, held = policy.window, largest_score_held(policy, self._session.shape)
        key = repr((own.model.digest, own.digest, own.device, window, held))
        return self._setups.prefilled(
            key,
            lambda: prefill(own.model, own.tokens, own.device, window=window, exact_from=held, logits=False),
        )

    def context(self, own: Document, known: OwnersContext, kernels: Backend) -> Made:
        """Return the masked cache of the document."""
        session = self._session
        plan = session.policy.plan.to_dict()
        said = repr((own.digest, session.policy.spec, plan, self._bits))
        key = f"document {hashlib.sha256(said.encode()).hexdigest()}"

        def make(masks: OwnersMasks) -> Any:
            self._masked(masks, lambda: session.context(known, kernels))
            return session.cache

        return self._setups.made(key, make, self._setups.fresh_documents, partial(self._told, "context"))

    def _masked(self, masks: OwnersMasks, run: Callable[[], None]) -> None:
        self._session.party.standing = masks
        try:
            run()
        finally:
            self._session.party.standing = None

    def _told(self, phase: str, done: int, of: int) -> None:
        self._watch(phase, done // 2, of // 2)  # two passes over the same bytes


class _Alone(Party):
    """A server without a session: masking opens nothing and draws nothing."""

    rank = Rank.SERVER

    def __init__(self) -> None:
        self.ledger = Ledger()

    def begin(self, phase: str) -> None:
        pass

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        raise RuntimeError(f"masking opens something at {step}")

    def draw(self, request: Request, step: str) -> list[Any]:
        raise RuntimeError(f"masking draws something at {step}")


def mask_ahead(
    owns: Sequence[Document], public: PublicConfig, setups: ServerSetups, say: Say,
    shards: Shards | None = None,
) -> None:  # fmt: skip
    """Mask weights and documents before the first session, which then finds them. What fails is said.

    Nothing happens where each session masks anew: with `stock` all of it, with fresh documents those.
    """
    if public.protocol == ProtocolName.STOCK:
        return
    torch.set_num_threads(1)  # counted per thread
    start = time.perf_counter()
    try:
        for own in owns:
            _mask(own, public.model_copy(update={"protocol": ProtocolName.FAST}), setups, say, shards)
    except (MpcacheError, OSError) as error:  # each session will meet it, and end with it
        say(f"server: nothing is masked ahead: {told_as(error)}")
        return
    documents = "document" if len(owns) == 1 else f"{len(owns)} documents"
    say(f"server: ready: weights and {documents} masked in {duration(1000 * (time.perf_counter() - start))}")


def _mask(own: Document, public: PublicConfig, setups: ServerSetups, say: Say, shards: Shards | None) -> None:
    asked = {"question_tokens": 0, "new_tokens": public.max_new_tokens, "private_tokens": 0}
    facts = facts_of({"model": facts_of_model(own, public), "question": asked}, public)
    ops = engine(facts.protocol, Rank.SERVER, public.fraction_bits)
    session = TimedSession(ops, _Alone(), facts.shape, facts.policy)
    ways = {phase: masking_progress(say, phase) for phase in WHAT}
    masking = Masking(setups, session, lambda phase, done, of: ways[phase].at(done, of), shards)
    masking.weights(own)
    known, kernels = own.packed or masking.prefilled(own), choose_kernels(public.kernels, own.device)
    session.policy, _ = bind_to_document(facts.policy, facts.shape, known, kernels)
    if not setups.fresh_documents:
        masking.context(own, known, kernels)
