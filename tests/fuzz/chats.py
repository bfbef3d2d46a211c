"""Damaged conversations: what a caller sends to the endpoint, and chat templates that a server sends."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpcache.choices import DocumentAs
from mpcache.errors import BadInput
from mpcache.ledger import Ledger
from mpcache.model.chat_template import ChatTemplate
from mpcache.model.framing import ChatFraming
from mpcache.transport.local import local_pair
from mpcache_parties.endpoint.completions import CompletionRequest, question_of, read_request
from mpcache_parties.endpoint.refusals import Refusal
from mpcache_parties.endpoint.text_completions import read_text_request
from mpcache_parties.public_texts import receive_template
from tests.fuzz.mutate import damaged
from tests.support.chat_templates import KINDS, template_and_tokenizer

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Tor."},
    {"role": "user", "content": [{"type": "text", "text": "And the gate?"}]},
]
_BODIES = (
    {"model": "m", "messages": _MESSAGES},
    {
        "model": "m", "messages": _MESSAGES[1:2], "stream": True, "stream_options": {"include_usage": True},
        "stop": ["."], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 1, "tools": [],
    },
)  # fmt: skip


_TEXTS = (
    {"model": "m", "prompt": ["The gate"], "echo": False, "stop": ".", "max_tokens": 5, "stream": True},
)


def chats(bytes_of: Any, json_of: Any, made: Any) -> None:
    """Add the targets."""

    def reads(read: Callable[[bytes, str], CompletionRequest]) -> Callable[[bytes], None]:
        def request(data: bytes) -> None:
            try:
                question_of(read(data, "m").messages)
            except Refusal as refused:  # of one line, as every error here
                raise BadInput(str(refused)) from None

        return request

    json_of("a request to the endpoint", 8, reads(read_request), _BODIES)
    json_of("a text to be continued at the endpoint", 2, reads(read_text_request), _TEXTS)

    template, tokenizer, shape = template_and_tokenizer(KINDS["chatml"])
    sent = template.to_bytes()

    def received(data: bytes) -> None:
        sender, link = local_pair(Ledger(), Ledger(), timeout=0.01)
        if data:
            sender.send("facts/template", [torch.frombuffer(bytearray(data), dtype=torch.uint8)])
        taken = receive_template(link, {"template_bytes": len(data)})
        if taken is not None:
            ChatTemplate.from_bytes(taken.numpy().tobytes())

    bytes_of("chat template from the server", 4, received, [sent])

    sources = [KINDS[name].source.encode() for name in ("chatml", "llama3", "gemma")]

    def framed(data: bytes) -> None:
        """A whole use of it, in the process of its own that renders it."""
        source = data.decode("utf-8", "replace")
        framing = ChatFraming(ChatTemplate(source, template.tokens), tokenizer, shape, DocumentAs.SYSTEM)
        framing.frame_document("The gate.")
        framing.frame_turn("Who?", True)

    made("chat template", 1, framed, _damages(sources), sources[0])


def _damages(seeds: Sequence[bytes]) -> Any:
    def make(rng: random.Random) -> bytes:
        return damaged(rng, rng.choice(seeds), seeds)

    return make
