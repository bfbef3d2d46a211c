"""Check that a session fits: the model's positions, the policy's plan, the protocol's longest row.

Every party makes these checks, on public facts alone, before anything secret is shared. The document's
owner also checks what it alone sees of it: scores and values (`check_document`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig, Settings, with_overrides
from mpcache.engines.registry import check_protocol
from mpcache.errors import BadInput, OutOfRange, PolicyError
from mpcache.model import ModelShape, demo_model_dir, find_model
from mpcache.policy import BoundPolicy, LeakClass, Policy, ReadingPolicy, parse_policy
from mpcache.policy.curve import has_curve
from mpcache.policy.layer_view import OwnersContext
from mpcache.protocols.ranges import LARGEST_RANK, LARGEST_SCORE, LONGEST_ATTENDED, largest_value
from mpcache_kernels import Backend


def bind_policy(
    shape: ModelShape, public: PublicConfig, context: int, question: int, new_tokens: int | None = None,
    private: int = 0,
) -> BoundPolicy:  # fmt: skip
    """Check a session's limits, and return its policy with the plan for this context.

    context, question: lengths in tokens.  new_tokens: of the answer, at most; None: as many as are agreed.
    private: of the client's document.
    Raises BadInput or PolicyError.
    """
    new_tokens = public.max_new_tokens if new_tokens is None else new_tokens
    _check_positions(shape, context, question, new_tokens, private)
    bound = _bind(shape, public, context)
    _check_private(bound, shape, public, private)
    _check_attended(bound, public.protocol, private + question + new_tokens)
    return bound


def bind_conversation(
    shape: ModelShape, public: PublicConfig, context: int, private: int = 0
) -> tuple[BoundPolicy, int]:
    """Check a conversation's limits; return its policy, and its room: the tokens that all its turns may take.

    context, private: the server's document and the client's, in tokens. The room is what was agreed, or
    less: what the model and the protocol hold.
    Raises BadInput or PolicyError.
    """
    _check_positions(shape, context, question=1, new_tokens=1, private=private)
    bound = _bind(shape, public, context)
    room = min(public.conversation_tokens, shape.max_positions - context - private)
    if public.protocol != "stock":
        room = min(room, LONGEST_ATTENDED - bound.plan.attended - private)
    _check_private(bound, shape, public, private)
    _check_attended(bound, public.protocol, after=private + 2)
    return bound, room


def _bind(shape: ModelShape, public: PublicConfig, context: int) -> BoundPolicy:
    policy = parse_policy(public.policy)
    if policy.plan_is_public and policy.leak in (LeakClass.COUNT, LeakClass.MODEL_COUNT):
        raise PolicyError(
            f"policy {policy.spec}: gives counts that are decided later, by the model or the document; leave "
            "one of them out"
        )
    bound = policy.bind(context, shape)
    bound.check(public.protocol)
    if public.length_grid > 1:
        check_padding(shape, policy)
    check_protocol(public.protocol)
    return bound


def check_padding(shape: ModelShape, policy: Policy) -> None:
    """Check that questions can be padded. Raises BadInput or PolicyError."""
    if shape.positions != "rope":
        raise BadInput(
            f"--pad needs rotary positions, and those of this model are {shape.positions}; leave it out"
        )
    if not policy.skips_padding:
        raise PolicyError(
            f"policy {policy.spec}: padding would change what it drops or chooses; leave --pad out, or use "
            "full, snapkv or compact"
        )


def with_default_policy(
    settings: Settings, model: Path | str | None, private: bool = False, document: object = None,
    note: Callable[[str], None] = lambda text: None,
) -> Settings:  # fmt: skip
    """Take a policy by what there is, where nobody has named one.

    It is `compact` for a model that has a curve, but not where a document of the client's own is evicted on
    shares: heads that keep different numbers take no part in that. Else it is `full` for such a document:
    nobody has seen how much of this model's recall the config's selection keeps, and --private-policy evicts.
    model: --model; None: the demo's.  private: the client brings a document.  document: the server's,
    if there is one.  note: told where a curve is missing for it.
    """
    if "policy" in settings.public.model_fields_set:
        return settings
    evicted = private and settings.public.private_policy != "full"
    if not evicted and has_curve(demo_model_dir() if model is None else find_model(model)):
        return with_overrides(settings, {"public.policy": "compact"})
    if private:
        return with_overrides(settings, {"public.policy": "full"})
    if document is not None:
        note(
            f"note: this model has no curve, so the policy is {settings.public.policy}, which may lose most "
            "of a document; `mpcache calibrate` makes one, for compact; --policy full loses nothing"
        )
    return settings


def _check_positions(
    shape: ModelShape, context: int, question: int, new_tokens: int, private: int = 0
) -> None:
    if context < 1:
        raise BadInput("the context is empty; it needs at least one token")
    if question < 1:
        raise BadInput("the question is empty; it needs at least one token")
    total = context + private + question + new_tokens
    if total > shape.max_positions:
        own = f"the client's document ({private}), " if private else ""
        raise BadInput(
            f"context ({context} tokens), {own}question ({question}) and answer (up to {new_tokens}) "
            f"make {total} tokens, the model allows {shape.max_positions}; shorten "
            f"{'a document' if private else 'the context'} or lower --max-new-tokens"
        )


def _check_private(bound: BoundPolicy, shape: ModelShape, public: PublicConfig, tokens: int) -> None:
    """Check that a document of the client's can be evicted, beside the policy. Raises PolicyError."""
    eviction = parse_policy(public.private_policy).on_shares(tokens, shape) if tokens else None
    if eviction is None:
        return
    if public.protocol == ProtocolName.STOCK:
        raise PolicyError(
            f"policy {public.private_policy}: protocol stock evicts no document on shares; give another "
            "--protocol, or --private-policy full"
        )
    ReadingPolicy.of(bound, eviction)


def _check_attended(bound: BoundPolicy, protocol: str, after: int) -> None:
    """Check the longest row of softmax; after: tokens that come after the context."""
    attended = bound.plan.attended + after
    if protocol != "stock" and attended > LONGEST_ATTENDED:
        raise PolicyError(
            f"policy {bound.spec}: a query may attend to {attended} tokens of context, question and "
            f"answer; protocol {protocol} holds {LONGEST_ATTENDED}: give it smaller budgets, or "
            "shorten the context"
        )


def largest_score_held(policy: BoundPolicy, shape: ModelShape) -> float:
    """Return what the attention scores must stay below in size; scores are held as 7/8 of themselves.

    The biases of kept keys take their room.
    """
    held = 8 / 7 * min(LARGEST_SCORE, LARGEST_RANK / policy.policy.heads_summed(shape))
    return held - policy.policy.largest_bias


def check_document(prefilled: OwnersContext, policy: BoundPolicy, shape: ModelShape, room: int) -> None:
    """Check at the document's owner, in the clear, what the protocols of `fast` hold of it.

    prefilled: its scores exact from `largest_score_held` on.  room: tokens that questions and answers take.
    Raises OutOfRange.
    """
    held = largest_score_held(policy, shape)
    for i, score in enumerate(prefilled.largest_scores):
        if not score < held:
            raise OutOfRange(
                f"server: layer {i}: attention scores of the document reach {score:.4g}; protocol fast "
                f"holds less than {held:.4g} with policy {policy.spec}: the answer would be wrong; "
                "use another model or policy"
            )
    _check_values(prefilled.largest_values, policy, room)


def check_fitted(prefilled: OwnersContext, policy: BoundPolicy, kernels: Backend, room: int) -> None:
    """Check likewise the values that a policy has made of the document's. Raises OutOfRange."""
    if policy.policy.largest_bias:
        _check_values(policy.largest_values(prefilled, kernels), policy, room)


def _check_values(sizes: Sequence[float], policy: BoundPolicy, more: int) -> None:
    """Check the largest value of each layer. more: tokens that come after the context."""
    attended = policy.plan.attended + more
    most = largest_value(attended)
    for i, size in enumerate(sizes):
        if not size < most:
            raise OutOfRange(
                f"server: layer {i}: values of the document reach {size:.4g}; protocol fast holds "
                f"less than {most:.4g} with {attended} attended tokens: the answer would be wrong; "
                "use another model"
            )
