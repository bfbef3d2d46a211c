"""Choose a policy by cost and measured quality: what `--policy auto` and `mpcache audit --tune` do.

Of the settings whose measured quality holds the one is taken that makes an answer of the agreed length
quickest on this network. It follows from the model's quality file and public sizes; the server, who has that
file, tells the others what it picked, and all of them compare the policy and its plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpcache.choices import POLICY_AUTO, ProtocolName, Reveal
from mpcache.config import PublicConfig, Settings, with_overrides
from mpcache.cost.choose import AUTO, pick
from mpcache.cost.pricing import price
from mpcache.cost.quality_file import FULL, Quality, quality_of
from mpcache.cost.rates import answer_ms
from mpcache.errors import PolicyError
from mpcache.model import Model, ModelShape
from mpcache.policy import LeakClass, Policy, parse_policy
from mpcache.policy.curve import curve_of
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.units import duration
from mpcache.transport.network import NO_NETWORK, Profile, parse_network

AT_LEAST = 0.95  # of the full cache's answers, in every task
REVEALED = (LeakClass.NONE, LeakClass.MODEL_COUNT)  # what `auto` may reveal beyond public sizes
FAR = 2  # times as long as the documents that quality was measured on: then it is said


@dataclass(frozen=True)
class Situation:
    """What a choice is made for: a model, lengths in tokens, and how the parties speak."""

    shape: ModelShape
    context: int
    question: int
    tokens: int
    network: Profile
    protocol: str = ProtocolName.FAST
    bits: int = 16
    reveal: Reveal = Reveal.LOGITS

    @staticmethod
    def of(shape: ModelShape, public: PublicConfig, context: int, question: int) -> Situation:
        """Take what was agreed on."""
        network = parse_network(public.network) or NO_NETWORK
        return Situation(
            shape, context, question, public.max_new_tokens, network, public.protocol, public.fraction_bits,
            public.reveal,
        )  # fmt: skip

    def ms(self, policy: Policy) -> float:
        """Return how long an answer takes with a policy. Raises PolicyError."""
        bound, protocol = policy.bind(self.context, self.shape), self.protocol
        if protocol == AUTO:
            network = None if self.network is NO_NETWORK else self.network
            protocol = pick(
                self.shape, bound, self.context, self.question, self.tokens, network, self.bits, self.reveal
            ).protocol
        cost = price(
            self.shape, bound, self.context, self.question, protocol, bits=self.bits, reveal=self.reveal
        )
        return answer_ms(cost, self.network, self.tokens)


@dataclass(frozen=True)
class WeighedPolicy:
    """A setting that was weighed.

    spec: the policy, set to this context.  percent: its budget.  least: the smallest share of the full
    cache's answers in any task, and that task.  asked: answers it was measured by.  ms: of an answer; None
    where its quality does not hold, or does at a smaller budget.
    """

    spec: str
    percent: float
    least: float
    task: str
    asked: int
    ms: float | None


@dataclass(frozen=True)
class PolicyChoice:
    """spec: what was picked.  why: in words.  weighed: all settings, quickest first."""

    spec: str
    why: str
    weighed: Sequence[WeighedPolicy] = ()


def tune(
    quality: Quality, where: Situation, at_least: float = AT_LEAST, model: Model | None = None
) -> PolicyChoice:
    """Pick the quickest policy that keeps `at_least` of the full cache's answers in every task.

    model: whose curve a policy may need; None: it is taken to have one. Of one policy the smallest budget is
    weighed that holds. Settings that reveal more than `REVEALED` are left out.  Raises PolicyError.
    """
    full_ms = where.ms(parse_policy(FULL))
    weighed = [WeighedPolicy(FULL, FULL_PERCENT, 1.0, "", quality.asked((FULL, FULL_PERCENT)), full_ms)]
    held: set[str] = set()
    for setting, tasks in sorted(quality.kept().items(), key=lambda item: item[0][1]):
        spec, percent = setting
        task = min(tasks, key=tasks.__getitem__)
        ms = None
        try:
            policy = parse_policy(spec).at_percent(percent, where.context, where.shape)
            if policy.in_the_clear or policy.leak not in REVEALED:
                continue
            if model is not None and not policy.plan_is_public:
                policy.count_from_model(model, where.context)
            if tasks[task] >= at_least and spec not in held:
                ms = where.ms(policy)
                held.add(spec)
        except PolicyError:  # it does not fit this context, or needs a curve
            continue
        weighed.append(WeighedPolicy(policy.spec, percent, tasks[task], task, quality.asked(setting), ms))
    weighed.sort(key=lambda each: (each.ms is None, each.ms or 0.0, -each.least))
    best = weighed[0]
    return PolicyChoice(best.spec, _why(best, weighed, full_ms, quality, where, at_least), weighed)


def _why(
    best: WeighedPolicy, weighed: Sequence[WeighedPolicy], full_ms: float, quality: Quality,
    where: Situation, at_least: float,
) -> str:  # fmt: skip
    holding = sum(each.ms is not None for each in weighed)
    assert best.ms is not None
    text = (
        f"picked policy {best.spec} of {len(weighed)} settings, with {holding} policies that keep "
        f"{100 * at_least:.0f} % of the answers: {duration(best.ms)} an answer of {where.tokens} tokens on "
        f"network {where.network.name} by the model, {duration(full_ms)} with full"
    )
    if quality.context and where.context > FAR * quality.context:
        text += f"; its quality was measured on documents of {quality.context} tokens"
    return text


def choose_policy(
    model: Model, public: PublicConfig, context: int, question: int, packed: str = ""
) -> PolicyChoice:
    """Pick what `auto` stands for; the default where nothing was measured of this model.

    context, question: lengths in tokens.  packed: the policy that the document was packed with, which alone
    can serve it.  Raises BadInput or PolicyError.
    """
    if packed:
        if (leak := parse_policy(packed).leak) not in REVEALED:
            raise PolicyError(
                f"policy auto: the document was packed with {packed}, which reveals more than auto may "
                f"({leak}); name that policy"
            )
        return PolicyChoice(packed, f"picked policy {packed}, that of the pack")
    quality = quality_of(model.path, model.digest)
    if quality is None:
        spec = PublicConfig().policy if curve_of(model) is None else "compact"
        return PolicyChoice(spec, f"picked policy {spec}, the default: no quality was measured of this model")
    return tune(quality, Situation.of(model.shape, public, context, question), AT_LEAST, model)


def with_planned_policy(
    settings: Settings, model: Model, context: int, question: int, packed: str = ""
) -> tuple[Settings, str]:
    """Put what `auto` stands for into settings; the second: why, or nothing where a policy was named."""
    if settings.public.policy != POLICY_AUTO:
        return settings, ""
    choice = choose_policy(model, settings.public, context, question, packed)
    return with_overrides(settings, {"public.policy": choice.spec}), choice.why
