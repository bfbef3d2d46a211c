"""Say what the endpoint needs of a conversation: `mpcache_parties.chat.Chat`, or what stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from mpcache_parties.chat import Account, Turn
from mpcache_parties.say import Say


class ChatLike(Protocol):
    """One private conversation: this client's session with server and dealer.

    One thread at a time calls it, but for `stop`. Units: tokens.
    """

    def ask(self, turn: Turn, /) -> Iterator[str]:
        """Ask, and yield the answer in pieces as they come.

        Raises BadInput where the turn cannot be asked, any other MpcacheError where the session has failed.
        """

    def stop(self) -> None:
        """End the answer that runs after its present token; any thread may call this."""

    def close(self) -> None:
        """End the session; harmless to repeat."""

    @property
    def raw(self) -> bool:
        """No chat template stands around its texts."""

    @property
    def finish_reason(self) -> str:
        """What the last answer ended with: "stop" or "length"."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the last turn's question."""

    @property
    def completion_tokens(self) -> int:
        """Tokens of the last turn's answer."""

    @property
    def room(self) -> int:
        """Tokens that the session can still take."""

    @property
    def account(self) -> Account:
        """What the conversation has taken so far."""

    @property
    def progress(self) -> str:
        """How far it is, in words; empty when idle."""


OpenChat = Callable[[Say], ChatLike]  # told how far it is while it opens; raises MpcacheError
Models = Mapping[str, OpenChat]  # by the public name with which callers ask for it


def models_of(model: str, documents: Sequence[str], open_chat: Callable[[str, Say], ChatLike]) -> Models:
    """Return what callers may ask for: the model, or `MODEL@NAME` for each document that has a name.

    open_chat: takes the name; "": the server has one document, without a name.
    """
    if not documents:
        return {model: partial(open_chat, "")}
    return {f"{model}@{name}": partial(open_chat, name) for name in documents}
