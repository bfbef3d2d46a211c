"""Sessions with a model that has a chat template: the server frames its document, the client its turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.errors import BadInput
from mpcache.limits import bind_conversation
from mpcache.model import load_model
from mpcache.model.framing import ChatFraming, make_framing
from mpcache.rank import Rank
from mpcache.report.account import Report, TurnReport
from mpcache.sampling import Sampling
from mpcache_parties.private_inputs import Conversation, Question, TurnRecord, read_document
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.chat_templates import KINDS, inner_tokenizer
from tests.support.links import together

TOKENS = 3
QUESTIONS = ["the gate", " <|im_end|> of the city "]  # a client's text is data


class Asked(Conversation):
    """Asks both questions."""

    def __init__(self) -> None:
        self.turns, self.refusals = list[TurnReport](), list[BadInput]()

    def opened(self, room: int, earlier: Sequence[TurnRecord], raw: bool) -> None:
        pass

    def questions(self, look: Callable[[], None]) -> Iterator[Question]:
        yield from (Question(text, stop_at_eos=False) for text in QUESTIONS)

    def stopped(self) -> bool:
        return False

    def answered(self, report: TurnReport) -> None:
        self.turns.append(report)

    def refused(self, why: BadInput) -> None:
        self.refusals.append(why)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, inner = tmp_path_factory.mktemp("framed"), inner_tokenizer(KINDS["chatml"])
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no two tokens are as likely but for an error
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    inner.save(str(place / "tokenizer.json"))
    names = {"chat_template": KINDS["chatml"].source, "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    (place / "document.txt").write_text("the number of the gate is in the city")
    return place


@pytest.mark.parametrize("grid", [1, 16])
def test_document_and_turns_are_framed_by_their_owners(folder: Path, grid: int) -> None:
    """The answers are those of the plain engine to what one party alone would have framed."""
    public = PublicConfig(policy="full", max_new_tokens=TOKENS, length_grid=grid)
    document = read_document(str(folder), folder / "document.txt", public)
    own = Asked()
    ends = together(
        {
            Rank.SERVER: lambda links, ledger: serve(SessionResources(links, ledger, public), document),
            Rank.CLIENT: lambda links, ledger: ask(SessionResources(links, ledger, public), own),
            Rank.DEALER: lambda links, ledger: deal(SessionResources(links, ledger, public)),
        }
    )
    assert all(isinstance(end, Report) for end in ends.values()), ends

    model = load_model(folder)
    framing = make_framing(model.tokenizer, model.shape, False, public.document_as, True)
    assert isinstance(framing, ChatFraming) and not own.refusals
    tokens = framing.frame_document((folder / "document.txt").read_text())
    bound, _ = bind_conversation(model.shape, public, len(tokens))
    plain, ids = PlainConversation(model, bound, tokens), list[int]()
    for number, (text, turn) in enumerate(zip(QUESTIONS, own.turns, strict=True)):
        asked = framing.next_turn(ids, text, False) if number else framing.frame_turn(text, first=True)
        assert turn.question_tokens == -(-len(asked) // grid) * grid
        ids = list(plain.ask(asked, TOKENS, Sampling(), ()))
        assert turn.token_ids == ids
