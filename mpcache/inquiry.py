"""What `generate` and `compare` ask: texts, tokens, and how both engines answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpcache.answer import PlainAnswer, plain_answer
from mpcache.choices import POLICY_AUTO, ChatForm
from mpcache.config import PublicConfig, Settings
from mpcache.console import terminal
from mpcache.console.inputs import check_stdin, read_context, read_question, read_text
from mpcache.console.options import (
    read_stops,
)
from mpcache.cost.planner import with_planned_policy
from mpcache.cost.reading import reading_plan
from mpcache.limits import bind_policy
from mpcache.model import ModelShape, demo_model_dir, find_model, load_model, load_shape, load_tokenizer
from mpcache.model.framing import Framing, make_framing
from mpcache.padding import padded_length
from mpcache.policy import BoundPolicy
from mpcache.rank import Rank
from mpcache.report.account import summary
from mpcache.sampling import Sampling
from mpcache_parties.launch import run_parties, setup_flags
from mpcache_parties.packing import OpenedPack, check_pack, check_weights
from mpcache_parties.state.packs import bind_packed


@dataclass(frozen=True)
class Inquiry:
    """What is asked of whom. context, own, question: token ids, with what frames the texts.

    own: the client's document.

    named: --model; None: the demo's.  packed: the document, where it was packed: then context is empty.
    """

    named: str | None
    model: Path
    context_text: str | None
    private_text: str | None
    question_text: str
    shape: ModelShape
    framing: Framing
    context: list[int]
    own: list[int]
    question: list[int]
    sampling: Sampling
    stop_at_eos: bool
    stop_texts: tuple[str, ...]
    packed: OpenedPack | None = None

    @staticmethod
    def read(
        model: str | None,
        context: Path | None,
        packed: OpenedPack | None,
        private_context: Path | None,
        question: str | None,
        question_file: Path | None,
        sampling: Sampling,
        stop_at_eos: bool,
        stop: Sequence[str] | None,
        public: PublicConfig,
    ) -> Inquiry:
        """Read everything but the weights; raises BadInput before any process is started."""
        check_stdin(context, private_context, question_file)
        question_text = read_question(question, question_file)
        path = demo_model_dir() if model is None else find_model(model)
        shape, tokenizer = load_shape(path), load_tokenizer(path)
        stops = read_stops(stop, stop_at_eos)
        text = read_context(model, context) if packed is None else None  # once: it may be a pipe
        written = text is not None if packed is None else packed.pack.written
        framing = make_framing(tokenizer, shape, public.chat is ChatForm.RAW, public.document_as, written)
        document: list[int] = []
        if packed is None:
            document = framing.frame_document(text)
        else:
            check_pack(packed.pack, packed.file, tokenizer, public)
            bind_packed(packed.pack.context, shape, packed.file)
        private = None if private_context is None else read_text(private_context)
        own = [] if private is None else framing.frame_private(private)
        asked = framing.frame_turn(question_text, True, private)
        return Inquiry(
            model, path, text, private, question_text, shape, framing, document, own, asked, sampling,
            stop_at_eos, stops, packed,
        )  # fmt: skip

    def bind(self, public: PublicConfig) -> BoundPolicy:
        self.sampling.check(public.reveal)
        length = len(self.context)
        if self.packed is not None:
            check_pack(self.packed.pack, self.packed.file, self.framing.tokenizer, public)
            length = self.packed.pack.context.length
        asked, own = (padded_length(len(part), public.length_grid) for part in (self.question, self.own))
        return bind_policy(self.shape, public, length, asked, private=own)

    def planned(self, settings: Settings) -> Settings:
        """Put what policy `auto` stands for here into settings, and say it."""
        if settings.public.policy != POLICY_AUTO:
            return settings
        model, packed = load_model(self.model), "" if self.packed is None else self.packed.pack.context.spec
        settings, why = with_planned_policy(settings, model, len(self.context), len(self.question), packed)
        terminal.say(why)
        return settings

    def private(
        self,
        settings: Settings,
        say: Callable[[str], None],
        on_token: Callable[[int, str], None],
        every: Sequence[str] = (),
        setup_dir: Path | None = None,
    ) -> dict[Rank, Any]:
        """Run three processes, and return their reports. every: flags that all of them get."""
        sampling = self.sampling
        flags = {
            Rank.SERVER: [
                *([] if self.named is None else ["--model", str(self.model)]),
                *([] if self.packed is None else self.packed.flags()),
            ],
            Rank.CLIENT: [
                f"--temperature={sampling.temperature}",
                f"--top-p={sampling.top_p}",
                f"--seed={sampling.seed}",
                "--stop-at-eos" if self.stop_at_eos else "--no-stop-at-eos",
                *(f"--stop={text}" for text in self.stop_texts),
            ],
        }
        kept = setup_flags(setup_dir)
        flags = {rank: [*flags.get(rank, ()), *kept.get(rank, ()), *every] for rank in Rank}
        texts = {Rank.CLIENT: self.question_text}
        if self.context_text is not None:
            texts[Rank.SERVER] = self.context_text
        return run_parties(settings, flags, texts, say, on_token, self.private_text)

    def compared(self, public: PublicConfig, leakage: str, reports: dict[Rank, Any]) -> dict[str, Any]:
        """Answer in plaintext, too; return what both took, as `summary` does."""
        plain = self.plain(public)
        run = summary(public.policy, leakage, reports, plain, plain.text)
        return run | {"length_grid": public.length_grid}

    def plain(self, public: PublicConfig) -> PlainAnswer:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stops = self.framing.end_tokens if self.stop_at_eos else ()
        limit, model = public.max_new_tokens, load_model(self.model)
        if self.packed is not None:
            check_weights(self.packed.pack, self.packed.file, model.digest)
        context = self.context if self.packed is None else self.packed.pack.context
        length = len(self.context) if self.packed is None else self.packed.pack.context.length
        own = padded_length(len(self.own), public.length_grid)
        reading = reading_plan(self.shape, public, length, own, public.protocol)
        return plain_answer(
            model, self.bind(public), context, self.question, limit, self.sampling, stops, device,
            self.stop_texts, public.length_grid, self.own, reading,
        )  # fmt: skip
