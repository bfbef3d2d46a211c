"""Ask a model that chats the same questions in plaintext and privately, and count the answers that agree.

    python tools/private_answers.py --model MODEL [--policy SPEC ...] [--answers 20] [--real 2]
    python tools/private_answers.py --model MODEL --private-policy SPEC [--private-policy SPEC ...]

Documents and questions are those of `mpcache eval`. Each document's questions make one conversation. With
--private-policy the document is the client's own, read on shares and evicted so: the page of the clinic that
comes with mpcache, asked five things in each conversation. The
first `--real` answers of a policy come from three processes; the others from the debug engine, which computes
what they do in plain fixed point and refuses a value beyond its range. Prints a JSON line for each answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product

import torch

from mpcache.answer import PlainConversation, answer, bind_to_document
from mpcache.choices import DocumentAs, ProtocolName
from mpcache.config import PublicConfig, Settings
from mpcache.cost.reading import reading_plan
from mpcache.demo import DEMO
from mpcache.engines.checked import CheckedOps, Ranges
from mpcache.evaluate.chat_tasks import CHAT_TASKS
from mpcache.evaluate.tasks import TaskTurn
from mpcache.limits import bind_conversation
from mpcache.model import Model, load_model
from mpcache.model.framing import Framing, make_framing
from mpcache.model.prefill import prefill
from mpcache.policy import BoundPolicy, ReadingPlan
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_kernels import backend
from mpcache_parties.local_parties import LocalParties
from mpcache_parties.say import quiet

SEED, ASKED = 11, 5  # of the documents; questions of each
CLINIC = (
    "Who is the director of the clinic?", "How many beds does the clinic have?",
    "When was the clinic founded?", "What is the address of the clinic?",
    "What is the telephone number of the clinic?",
    "When is the clinic open?", "On which day is the clinic closed?",
    "How many doctors does the clinic have?",
    "How many nurses does the clinic have?",
    "Who is the head nurse?", "When may visitors come?", "What does parking cost?",
    "On which floor is the cafeteria?",
    "On which floor is the pharmacy?", "What is in the garden?",
    "How long does the first examination take?", "What do new patients bring?", "Who founded the clinic?",
    "What should nobody do after an operation?", "What kind of hospital is the clinic?",
)  # fmt: skip


class CheckedConversation:
    """A conversation on the debug engine, as `PlainConversation` is one in plaintext."""

    def __init__(
        self, model: Model, public: PublicConfig, policy: BoundPolicy, context: list[int], own: list[int],
        reading: ReadingPlan,
    ) -> None:  # fmt: skip
        kernels = backend("cpu")
        known = prefill(model, context, window=policy.window)
        policy, _ = bind_to_document(policy, model.shape, known, kernels)
        self._session = Session(CheckedOps(public.fraction_bits), Ranges(), model.shape, policy)
        self._session.setup(model.weights)
        self._session.context(known, kernels)
        with torch.no_grad():
            for _ in self._session.read_document(reading, own):
                pass

    def ask(self, question: list[int], limit: int, stops: frozenset[int]) -> list[int]:
        """Return an answer's token ids. Raises OutOfRange."""
        with torch.no_grad():
            found = list(answer(self._session, question, limit, Sampling().chooser(), stops))
        self._session.next_turn()
        return found


def documents(framing: Framing, context: int, private: bool) -> Iterator[tuple[str, list[str]]]:
    """Make documents and the questions of each, without end. private: the page of the clinic."""
    clinic = (DEMO / "clinic.txt").read_text(encoding="utf-8")
    while private:
        for first in range(0, len(CLINIC), ASKED):
            yield clinic, [*CLINIC[first : first + ASKED]]
    i = 0
    while True:
        turns: list[TaskTurn] = []
        text = ""
        for name in ("facts", "passkey"):
            sample = CHAT_TASKS[name].sample(
                i, SEED, lambda piece: len(framing.tokenizer.encode(piece, bos=False)), context
            )
            text, turns = sample.context, turns + list(sample.turns)
        yield text, [turn.question for turn in turns][:ASKED]
        i += 1


def compare(model: Model, framing: Framing, public: PublicConfig, args: argparse.Namespace) -> int:
    """Ask until there are as many answers as wanted; return how many agree."""
    asked = agree = 0
    stops, limit, is_own = framing.end_tokens, public.max_new_tokens, bool(args.private_policy)
    for text, questions in documents(framing, args.context, is_own):
        if asked >= args.answers:
            return agree
        context = framing.frame_document(None if is_own else text)
        own = framing.frame_private(text) if is_own else []
        policy, _ = bind_conversation(model.shape, public, len(context), len(own))
        reading = reading_plan(model.shape, public, len(context), len(own), ProtocolName.FAST)
        plain = PlainConversation(model, policy, context, private=own, reading=reading)
        left = args.answers - asked
        real = asked < args.real
        questions = questions[: min(left, args.real - asked) if real else left]
        if real:
            private = _private(model, public, text, questions, is_own)
        else:
            checked = CheckedConversation(model, public, policy, context, own, reading)
        before: list[int] = []
        for i, question in enumerate(questions):
            ended = bool(before) and before[-1] in stops
            first = framing.frame_turn(question, True, text if is_own else None)
            ids = framing.next_turn(before, question, ended) if i else first
            list(plain.ask(ids, limit, Sampling(), stops))
            mine = plain.result.ids
            same = (
                plain.result.text.strip() == next(private).strip()
                if real
                else checked.ask(ids, limit, stops) == mine
            )
            asked, agree, before = asked + 1, agree + same, mine
            engine = "three processes" if real else "debug engine"
            line = {"policy": public.policy, "tokens": len(context), "engine": engine, "agree": same}
            if is_own:
                line |= {"private_policy": public.private_policy, "tokens": len(own), "kept": reading.kept}
            print(json.dumps(line | {"question": question, "answer": plain.result.text}), flush=True)
        if real:
            private.close()  # type: ignore[attr-defined]
    return agree


def _private(
    model: Model, public: PublicConfig, text: str, questions: list[str], is_own: bool
) -> Iterator[str]:
    """Answer the questions of one conversation by three processes."""
    server, client = (None, text) if is_own else (text, None)
    with (
        LocalParties(Settings(public=public), model.path, server, at_once=1, say=quiet) as parties,
        parties.chat(private=client) as chat,
    ):
        for question in questions:
            yield "".join(chat.ask(question))


def main() -> None:
    """Compare under every policy, and say how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--policy", action="append", help="again for more [compact at 10 and 20 %%]")
    parser.add_argument("--private-policy", action="append", help="the document is the client's own")
    parser.add_argument("--answers", type=int, default=20, help="of each policy")
    parser.add_argument("--real", type=int, default=2, help="of these, by three processes")
    parser.add_argument("--context", type=int, default=300, help="tokens of a document")
    parser.add_argument("--tokens", type=int, default=10, help="of an answer, at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model)
    own = args.private_policy or []
    framing = make_framing(model.tokenizer, model.shape, False, DocumentAs.SYSTEM, not own)
    failed = 0
    for spec, rule in product(
        args.policy or (["full"] if own else ["compact:keep=0.1", "compact"]), own or [""]
    ):
        public = PublicConfig(policy=spec, max_new_tokens=args.tokens, conversation_tokens=512)
        public = public.model_copy(update={"private_policy": rule or public.private_policy})
        agree = compare(model, framing, public, args)
        print(f"{spec} {rule}: {agree} of {args.answers} answers agree", flush=True)
        failed += agree < args.answers
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
