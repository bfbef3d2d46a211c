"""A server and a dealer on this machine, for conversations of this machine's clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from mpcache.config import Settings, load_settings
from mpcache.console.inputs import read_text
from mpcache.limits import with_default_policy
from mpcache.rank import Rank
from mpcache_parties.chat import Chat, open_chat, text_given
from mpcache_parties.launch import (
    Child,
    Event,
    document_flags,
    end_parties,
    first_cause,
    free_addresses,
    private_folder,
    setup_flags,
    start_party,
    state_flags,
    write_session,
)
from mpcache_parties.operations.output import EventKind
from mpcache_parties.packing import OpenedPack, with_pack_settings
from mpcache_parties.placement import on_cores_of
from mpcache_parties.say import Say, quiet
from mpcache_parties.state.packs import is_pack

AT_ONCE = 4  # conversations with local parties


class LocalParties:
    """Server and dealer as processes of this machine, for as many conversations as they serve at once."""

    def __init__(
        self, settings: Settings, model: Path | str | None = None, text: str | None = None,
        at_once: int = AT_ONCE, say: Say = quiet, setup_dir: Path | None = None,
        state: Path | str | None = None, packed: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Start both.

        model: as `mpcache-party` takes it; None: the demo's.  text: the server's document.
        setup_dir: where both keep what is masked, for other runs; None: in memory.  state: the folder where
        they keep conversations of clients that ask for it.  packed: in place of a text, the server's flags
        for documents that were packed.
        """
        self._settings = settings.model_copy(update={"addresses": free_addresses()})
        self._say, self._children = say, dict[Rank, Child]()
        self._events: SimpleQueue[tuple[Rank, Event]] = SimpleQueue()
        self._errors: dict[Rank, dict[str, Any]] = {}
        self._folder = private_folder()
        folder = self._folder.__enter__()
        try:
            self._own = write_session(self._settings, {} if text is None else {Rank.SERVER: text}, folder)
            serving = ["--serve", "--sessions", str(at_once), *state_flags(state)]
            named = [] if model is None else ["--model", str(model)]
            kept = setup_flags(setup_dir)
            for rank, more in ((Rank.SERVER, [*named, *packed]), (Rank.DEALER, [])):
                flags = [*self._own[rank], *serving, *kept.get(rank, ()), *more]
                with on_cores_of(rank):
                    self._children[rank] = start_party(rank, flags, self._events)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalParties:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat(
        self, say: Say | None = None, state: Path | str | None = None, resume: bool = False,
        document: str = "", private: str | None = None,
    ) -> Chat:  # fmt: skip
        """Open a conversation, or resume one. Raises PartyFailed.

        say: told how far it is, in place of the parties'.  state, resume: as of `connect`.  document: the
        public name of one of several.  private: the client's own document, which neither of the others sees.
        """
        flags = [*self._own[Rank.CLIENT], *document_flags(document), *state_flags(state, resume)]
        return open_chat(flags, say or self._say, private, self._watch)

    def close(self) -> None:
        """End both."""
        end_parties(self._children)
        self._folder.__exit__(None, None, None)

    def _watch(self) -> None:
        """Raise PartyFailed if one of them has ended."""
        gone = False
        with suppress(Empty):
            while True:
                rank, event = self._events.get_nowait()
                match event:
                    case {"event": EventKind.SAY, "text": str(text)}:
                        self._say(text)
                    case dict(found) if found["event"] == EventKind.ERROR:
                        self._errors[rank] = found
                    case None:
                        gone = True
        if gone or self._errors:
            raise first_cause(self._children, {}, self._errors)


@contextmanager
def local_chat(
    model: Path | str | None = None,
    document: Path | str | None = None,
    *,
    private_context: Path | str | None = None,
    policy: str | None = None,
    private_policy: str | None = None,
    max_new_tokens: int | None = None,
    config: Path | str | None = None,
    setup_dir: Path | str | None = None,
    say: Say = quiet,
    state: Path | str | None = None,
    resume: bool = False,
    pack_key: Path | str | None = None,
) -> Iterator[Chat]:
    """Open a conversation with a server and a dealer of its own, all processes of this machine.

    Parameters
    ----------
    model
        As `mpcache generate --model` takes it; None: the demo model.
    document
        The server's: a text, or the Path of a text file or of a pack (`mpcache pack`). None: with the demo
        model its own, else none.
    private_context
        The client's own, likewise, which nobody else sees.
    policy, private_policy, max_new_tokens
        In place of the config's. Where neither names a policy a model that has a curve takes `compact`.
    config
        A YAML file of public settings; its addresses are not used.
    setup_dir
        A folder where the masked weights and document are kept for other runs; None: each masks them anew.
    say
        Gets a line now and then about how far the set-up is.
    state
        A folder where all three keep the conversation while it lasts.
    resume
        Go on with the one that is kept there; all else as when it was begun.
    pack_key
        The file of the key that the pack is sealed with.

    Raises ConfigError, BadInput, or PartyFailed where no session comes about.

    """
    overrides = {"policy": policy, "private_policy": private_policy, "max_new_tokens": max_new_tokens}
    settings = load_settings(config, {f"public.{name}": value for name, value in overrides.items()})
    own = text_given(private_context)
    kept = None if setup_dir is None else Path(setup_dir)
    packed, text = None, document
    if isinstance(document, Path):
        packed = OpenedPack.read(str(document), pack_key, None) if is_pack(document) else None
        text = None if packed is not None else read_text(document)
    assert not isinstance(text, Path)
    settings = with_default_policy(with_pack_settings(settings, packed), model, own is not None)
    flags = () if packed is None else packed.flags()
    with (
        LocalParties(settings, model, text, 1, say, kept, state, flags) as parties,
        parties.chat(state=state, resume=resume, private=own) as chat,
    ):
        yield chat
