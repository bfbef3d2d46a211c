"""The model's public texts at the client: tokenizer and chat template, as the server sends them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from mpcache.choices import ChatForm, DocumentAs
from mpcache.config import PublicConfig
from mpcache.errors import Desync, ModelError
from mpcache.model.chat_template import ChatTemplate
from mpcache.model.framing import Framing, make_framing
from mpcache.model.shape import ModelShape
from mpcache.model.tokenizer import LibraryError, Tokenizer, parse_tokenizer
from mpcache.transport.link import Link, bytes_of

TOKENIZER_BYTES = 64 << 20  # the largest tokenizer.json that a client takes
TEMPLATE_BYTES = 4 << 20  # the largest chat template


def receive_tokenizer(server: Link, facts: Mapping[str, Any]) -> torch.Tensor:
    """Receive the bytes of the model's tokenizer, which is public: the client needs no model folder.

    Raises Desync on a length that is none, or too large.
    """
    length = count_in(facts, "tokenizer_bytes")
    if not 0 < length <= TOKENIZER_BYTES:
        raise Desync(
            f"Desync: the server's tokenizer has {length} bytes; at most {TOKENIZER_BYTES} are taken"
        )
    (data,) = server.recv("facts/tokenizer", [(torch.uint8, (length,))])
    return data


def receive_template(server: Link, facts: Mapping[str, Any]) -> torch.Tensor | None:
    """Receive the bytes of the model's chat template, or nothing where it has none. Raises Desync."""
    length = count_in(facts, "template_bytes")
    if length > TEMPLATE_BYTES:
        raise Desync(
            f"Desync: the server's chat template has {length} bytes; at most {TEMPLATE_BYTES} are taken"
        )
    if not length:
        return None
    (data,) = server.recv("facts/template", [(torch.uint8, (length,))])
    return data


def framing_of(told: Mapping[str, Any], shape: ModelShape, public: PublicConfig) -> Framing:
    """Return how the client frames its questions; told: as `agreed_facts` returns it. Raises ModelError."""
    tokenizer, template = bytes_of(told["tokenizer"]), told.get("template")
    frame = b"" if template is None else bytes_of(template)
    return _frame_once(
        tokenizer, frame, shape, public.chat, public.document_as, told["model"].get("document") is True
    )


# The client frames for the question's length, and again, facts told, for the question itself.
@lru_cache(maxsize=1)
def _frame_once(
    tokenizer: bytes,
    template: bytes,
    shape: ModelShape,
    chat: ChatForm,
    document_as: DocumentAs,
    document: bool,
) -> Framing:
    known = read_tokenizer(tokenizer, shape)
    known.chat_template = ChatTemplate.from_bytes(template) if template else None
    return make_framing(known, shape, chat is ChatForm.RAW, document_as, document)


def text_digest(data: torch.Tensor | None) -> str:
    """Return the SHA-256 of a text's bytes, in hex; `none` where there is none."""
    return "none" if data is None else hashlib.sha256(bytes_of(data)).hexdigest()


def read_tokenizer(content: bytes, shape: ModelShape) -> Tokenizer:
    """Return the tokenizer in these bytes. Raises ModelError."""
    try:
        inner = parse_tokenizer(content)
    except LibraryError as error:
        raise ModelError(
            "the server's tokenizer cannot be read; is its model complete?", private=False
        ) from error
    return Tokenizer(inner, shape.vocab, shape.bos_id, content)


def count_in(facts: Mapping[str, Any], name: str) -> int:
    """Return a fact that is a whole number from 0. Raises Desync."""
    value = facts.get(name)
    if type(value) is not int or value < 0:
        raise Desync(f"Desync: the fact {name} is {value!r:.60}, not a count; is it the same version?")
    return value
