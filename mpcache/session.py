"""One private session, phase by phase, for any reading: setup, context, then turns of question and decode.

Between context and the first turn the client's document comes in, where there is one.

The same `Session` runs plain (`PlainOps`), at the computing parties, at the dealer and in the cost
reading; what differs is `ops` (the meaning of the operations), `party` (who answers), and which
secrets are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mpcache.cache import Cache
from mpcache.decode import Layer, Operands, range_verdict, read, step
from mpcache.model import LayerWeights, ModelShape, Weights
from mpcache.ops import AnyEngine, Ops
from mpcache.padding import pad_chunk
from mpcache.phases import DOCUMENT, EVICTION, ChunkPlace, is_private, part_name, private_phase
from mpcache.policy import BoundPolicy, ReadingPlan, ReadingPolicy
from mpcache.policy.layer_view import OwnersContext
from mpcache.protocols.ranges import OPERAND_RINGS
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, run, together
from mpcache_kernels import Backend


def _layer(w: LayerWeights) -> dict[str, torch.Tensor | None]:
    """Arrange a layer's matrices and biases as `decode.Layer` has them."""

    def join(*parts: torch.Tensor | None) -> torch.Tensor | None:
        there = [p for p in parts if p is not None]
        if there and there[0].is_meta:
            columns = sum(p.shape[-1] for p in there)
            return torch.empty(*there[0].shape[:-1], columns, device="meta")
        return torch.cat(there, -1) if there else None

    return {
        "qkv": join(w.wq, w.wk, w.wv), "qkv_bias": join(w.bq, w.bk, w.bv),
        "o": w.wo, "o_bias": w.bo,
        "up": join(w.w_gate, w.w_up), "up_bias": join(w.b_gate, w.b_up),
        "down": w.w_down, "down_bias": w.b_down,
    }  # fmt: skip


_LONGEST_PART = 64  # tokens of a question that go through the model at once

Mine = Callable[[str], Any]  # a tensor by its name, read when it is prepared


class WeightsElsewhere(ABC):
    """Weights whose matrices lie on other machines, as `RemoteMatrix`."""

    @abstractmethod
    def layer(self, number: int) -> Mine:
        """Return what gives a layer's tensors, by their names in `decode.Layer`."""

    @abstractmethod
    def vocabulary(self, name: str) -> Any:
        """Return what is outside the layers: embed, positions, lm_head, lm_bias."""


def arranged_layer(weights: Weights | WeightsElsewhere | None, number: int) -> Mine:
    """Return what gives a layer's tensors; one layer at a time, if they are stored."""
    if isinstance(weights, WeightsElsewhere):
        return weights.layer(number)
    return (lambda name: None) if weights is None else _layer(weights.layers[number]).get


def _vocabulary(weights: Weights | WeightsElsewhere | None) -> Mine:
    if isinstance(weights, WeightsElsewhere):
        return weights.vocabulary
    return lambda name: getattr(weights, name, None)


def load_operands(
    ops: Ops, shape: ModelShape, weights: Weights | WeightsElsewhere | None
) -> Program[Operands]:
    """Prepare weights as operands. weights: None at all but their owner."""
    blank = Weights.meta(shape)

    def one(name: str, mine: Mine, size: Sequence[int]) -> Program[Any]:
        if name not in OPERAND_RINGS:
            return ops.secret(mine(name), size, Rank.SERVER)
        return (yield from ops.prepare_own(mine(name), size, Rank.SERVER, OPERAND_RINGS[name]))

    def operands(mine: Mine, like: Mapping[str, torch.Tensor | None]) -> Program[dict[str, Any]]:
        there = {name: tensor.shape for name, tensor in like.items() if tensor is not None}
        names = list(there)
        kept = yield from together(*(one(name, mine, size) for name, size in there.items()))
        return dict.fromkeys(like) | dict(zip(names, kept, strict=True))

    layers = []
    for i, layer in enumerate(blank.layers):
        mine = arranged_layer(weights, i)
        layers.append(Layer(**(yield from at(f"layer{i}", operands(mine, _layer(layer))))))
    names = ("embed", "positions", "lm_head", "lm_bias")
    sizes = {name: getattr(blank, name) for name in names}
    rest = yield from at("vocabulary", operands(_vocabulary(weights), sizes))
    return Operands(shape, layers=tuple(layers), **rest)


def fill_cache(
    ops: Ops, shape: ModelShape, policy: BoundPolicy, context: OwnersContext | None, kernels: Backend | None
) -> Program[Cache]:
    """Make the cache of the evicted context. context, kernels: None at all but the document's owner."""
    layers = []
    for i in range(shape.layers):
        layers.append((yield from at(f"layer{i}", policy.fill(ops, shape, i, context, kernels))))
    return Cache(layers, policy.plan.context)


def parts_of(m: int) -> list[int]:
    """Split a question of m tokens evenly.

    A part scores its queries against all of its keys, half of which they may not see, and holds what it
    draws and opens at once; but it takes the rounds of a token.
    """
    parts = -(-m // _LONGEST_PART)
    return [(m + number) // parts for number in range(parts)]


class Session:
    """Phases of one session for one reading. `party` answers; None for the plain reading.

    reveal: what the client learns of a step, its "logits" or the likeliest "token" alone.
    grid: questions and the client's document are padded to its multiples (`mpcache.padding`); 1: nothing is.
    """

    def __init__(
        self, ops: AnyEngine, party: Any, shape: ModelShape, policy: BoundPolicy, reveal: str = "logits",
        grid: int = 1,
    ) -> None:  # fmt: skip
        self.ops, self.party, self.shape, self.policy, self.reveal = ops, party, shape, policy, reveal
        self.grid = grid
        self.operands: Operands
        self.cache: Cache
        self.place = ChunkPlace(1, 0)  # of the next chunk
        self._chunks = 0
        self.in_range: bool | None = None  # the last chunk's values, where that is learned

    def _run(self, phase: str, program: Program[Any]) -> Any:
        if self.party is None:
            return run(program, Nobody())
        self.party.begin(phase)
        # Nothing is differentiated; small operations are a sixth cheaper where torch knows it. What set-up
        # and context make lives longer, and is changed elsewhere.
        with torch.inference_mode(ChunkPlace.of(phase) is not None or is_private(phase)):
            return run(at(phase, program), self.party)

    @property
    def chunks(self) -> int:
        """How many chunks were taken in: of the client's document, its eviction as one, and of all turns.

        Of a turn these are its question, and its tokens but the last.
        """
        return self._chunks

    def restore(self, operands: Operands, cache: Cache, chunks: int, place: ChunkPlace) -> None:
        """Go on where another session of this reading stood. Masks yet to come are the party's own matter."""
        self.operands = operands
        self.rewind(cache, chunks, place)

    def rewind(self, cache: Cache, chunks: int, place: ChunkPlace) -> None:
        """Go back to a cache that this session had, and where it stood then."""
        self.cache, self._chunks, self.place = cache, chunks, place

    def next_turn(self) -> None:
        """Let the next chunk be another question."""
        self.place = ChunkPlace(self.place.turn + 1, 0)

    def setup(self, weights: Weights | WeightsElsewhere | None, known: Operands | None = None) -> None:
        """Prepare the weights; known: as they were for another session, of the same masks."""
        program = load_operands(self.ops, self.shape, weights) if known is None else local(known)
        self.operands = self._run("setup", program)

    def context(
        self, context: OwnersContext | None, kernels: Backend | None, known: Cache | None = None
    ) -> None:
        """Fill the cache; known: as it was for another session, of the same masks."""
        self.policy.check(self.ops.name)
        if not self.policy.plan_is_public:
            raise ValueError("the document has not decided this plan yet: see `Policy.plan_is_public`")
        program = fill_cache(self.ops, self.shape, self.policy, context, kernels)
        self.cache = self._run("context", program if known is None else local(known))

    def _one_hots(self, tokens: Sequence[int] | None, m: int) -> Any:
        hot = None
        if tokens is not None:
            hot = torch.nn.functional.one_hot(torch.tensor(tokens), self.shape.vocab)
        return self.ops.secret(hot, (m, self.shape.vocab), Rank.CLIENT, bits=0)

    def read_document(self, plan: ReadingPlan, tokens: Sequence[int] | None) -> Iterator[int]:
        """Take in the client's document, and evict what does not stay of it; or what of that is left to do.

        tokens: at the client; fewer than the plan's where its length is padded. Yields the tokens that are
        in, after each of its phases; to be heard to the end. Raises PolicyError.
        """
        reader = self.policy if plan.eviction is None else ReadingPolicy.of(self.policy, plan.eviction)
        if self.place.turn:
            self.place = DOCUMENT
        begun, done = self.place.step, 0
        for number, m in enumerate(plan.chunks, 1):
            if number > begun:
                taken = self._part(tokens, plan.tokens, done, m)
                self._go(private_phase(number), read(self.ops, self.operands, self.cache, reader, taken))
                yield done + m
            done += m
        if isinstance(reader, ReadingPolicy) and begun <= len(plan.chunks):
            self._go(EVICTION, reader.evict(self.ops, self.shape, self.cache))
            yield done
        self.place = ChunkPlace(1, 0)
        self.cache.begin_turns()

    def _go(self, phase: str, program: Program[None]) -> None:
        """Go through a phase of the client's document; the client learns whether it stayed in its ranges."""
        verdict = self._run(phase, self._judged(program))
        self.in_range = None if verdict is None else bool(verdict)
        self.place = ChunkPlace(0, self.place.step + 1)
        self._chunks += 1

    def _taken(self, tokens: Sequence[int] | None, m: int, like: int = 0) -> Any:
        if self.grid > 1:
            return pad_chunk(self.ops, self.shape, self.cache, tokens, m, like)
        return self._one_hots(tokens, m)

    def _judged(self, program: Program[None]) -> Program[torch.Tensor | None]:
        yield from program
        return (yield from at("guard", range_verdict(self.ops)))

    def chunk(self, tokens: Sequence[int] | None, m: int) -> torch.Tensor | None:
        """Take m tokens in; the next token's logits (vocab,), or its number (1,), where they are learned.

        tokens: where they are known; fewer than m where questions are padded.
        """
        phase = self.place.phase
        self.place = ChunkPlace(self.place.turn, self.place.step + 1)
        self._chunks += 1
        learned: torch.Tensor | None
        learned, verdict = self._run(phase, self._step(tokens, m))
        self.in_range = None if verdict is None else bool(verdict)
        return learned

    def _step(
        self, tokens: Sequence[int] | None, m: int
    ) -> Program[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Take m tokens in, a long question in parts, of which the last one answers."""
        *before, last = parts_of(m)
        done, parts = 0, len(before) + 1
        for number, size in enumerate(before, 1):
            taken, done = self._part(tokens, m, done, size), done + size
            program = read(self.ops, self.operands, self.cache, self.policy, taken)
            yield from at(part_name(number, parts), program)
        taken = self._part(tokens, m, done, last)
        answer = step(self.ops, self.operands, self.cache, self.policy, taken, self.reveal)
        return (yield from at(part_name(parts, parts), answer) if before else answer)

    def _part(self, tokens: Sequence[int] | None, m: int, done: int, size: int) -> Any:
        """Share `size` rows of m after the first `done`, before whose tokens padding stands."""
        if tokens is None:
            return self._taken(None, size)
        first, end = (max(0, place - (m - len(tokens))) for place in (done, done + size))
        return self._taken(tokens[first:end], size, tokens[0] if tokens else 0)


class Nobody:
    """The plain reading asks nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a plain program asked for {name}")
