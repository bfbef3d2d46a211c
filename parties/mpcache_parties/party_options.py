"""Hold a party's command line as values, and check what goes together before anything is read."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig, Settings, load_settings
from mpcache.console.inputs import check_stdin, read_question, read_text
from mpcache.console.options import chat_overrides, public_overrides, read_stops
from mpcache.errors import BadInput
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache.transport.address import HostPort
from mpcache_parties.handshake import DOCUMENT_NAME, NO_NAME, KeepMode
from mpcache_parties.operations.output import Output
from mpcache_parties.packing import packed_documents
from mpcache_parties.piped_conversation import PipedConversation
from mpcache_parties.private_inputs import DeclaredTurns, PrivateInput, Question, read_document
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.packs import PackLock
from mpcache_parties.state.setups import DealerSetups, ServerSetups, Setups
from mpcache_parties.state.spool import is_url
from mpcache_parties.state.store import Store
from mpcache_parties.state.tapes import TapeStore


@dataclass(frozen=True)
class PartyOptions:
    """The flags of `mpcache-party` as given; None: left out. Its `--help` says what each is for."""

    me: Rank
    config: Path | None = None
    model: str | None = None
    context: Path | None = None
    document: tuple[str, ...] = ()
    pack_key: Path | None = None
    pack_passphrase: Path | None = None
    question: str | None = None
    question_file: Path | None = None
    policy: str | None = None
    private_policy: str | None = None
    protocol: str | None = None
    network: str | None = None
    max_new_tokens: int | None = None
    reveal: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_at_eos: bool = True
    stop: tuple[str, ...] = ()
    raw: bool = False
    document_as: str | None = None
    pad: int | None = None
    state: Path | None = None
    state_key: Path | None = None
    resume: bool = False
    setup_dir: Path | None = None
    fresh_document: bool = False
    offline_store: str | None = None
    prepare_tokens: int | None = None
    turns: str | None = None
    connect_timeout: float | None = None
    identity: Path | None = None
    insecure: bool = False
    log: Path | None = None
    log_level: str = "info"
    metrics: str | None = None
    health: str | None = None
    listen: str | None = None
    serve: bool = False
    sessions: int | None = None
    events: bool = False
    conversation: bool = False
    ray: str | None = None
    ray_actors: int | None = None
    batches: int | None = None

    @property
    def preparing(self) -> bool:
        """Whether tapes are prepared, in place of a session."""
        return self.prepare_tokens is not None

    def settings(self) -> Settings:
        """Return the config with the flags that go before it. Raises BadInput."""
        if self.listen is not None:
            if self.me is Rank.CLIENT:
                raise BadInput(
                    "--listen belongs to the server and the dealer (--rank 0, 2), this is the client"
                )
            try:
                HostPort.parse(self.listen)
            except ValueError as wrong:
                raise BadInput(f"--listen is {self.listen!r}: {wrong}") from None
        tokens = self.prepare_tokens if self.preparing else self.max_new_tokens
        return load_settings(
            self.config,
            public_overrides(self.policy, self.protocol, self.network, tokens, self.reveal)
            | chat_overrides(self.raw, self.document_as, self.pad, self.private_policy)
            | {"timeouts.connect_s": self.connect_timeout, "addresses.bind": self.listen},
        )

    def check(self) -> None:
        """Check that the flags belong to this rank, and those of `--serve` to each other. Raises BadInput."""
        self._check_owners()
        self._check_document()
        self._check_serving()
        self._check_conversation()
        if self.ray_actors is not None and self.ray is None:
            raise BadInput("--ray-actors is how many actors --ray starts; give --ray, too")
        if self.batches is not None and (self.me is not Rank.DEALER or not self.preparing):
            raise BadInput("--batches is how many the dealer (--rank 2) deals with --prepare")
        if self.turns is not None:
            self._declared()

    def _declared(self) -> DeclaredTurns:
        """Read --turns. Raises BadInput."""
        if not self.preparing or self.question is not None or self.question_file is not None:
            raise BadInput("--turns goes with --prepare, in place of a question: 14,9,9 are three turns")
        words = (self.turns or "").split(",")
        if not all(word.isascii() and word.isdigit() and 0 < int(word) < 100_000 for word in words):
            raise BadInput(f"--turns is {self.turns!r}; give each question's tokens, as in 14,9,9")
        return DeclaredTurns(tuple(map(int, words)))

    def _check_owners(self) -> None:
        """Refuse another rank's flags: a document given to the client should not pass in silence."""
        owned = {
            "model": (Rank.SERVER, self.model),
            "pack-key": (Rank.SERVER, self.pack_key),
            "pack-passphrase": (Rank.SERVER, self.pack_passphrase),
            "question": (Rank.CLIENT, self.question),
            "question-file": (Rank.CLIENT, self.question_file),
            "turns": (Rank.CLIENT, self.turns),
            "temperature": (Rank.CLIENT, self.temperature),
            "top-p": (Rank.CLIENT, self.top_p),
            "seed": (Rank.CLIENT, self.seed),
            "stop": (Rank.CLIENT, self.stop or None),
        }
        if self.context is not None and self.me is Rank.DEALER:
            raise BadInput("--context belongs to the server or the client (--rank 0, 1), this is the dealer")
        for name, (owner, value) in owned.items():
            if value is not None and owner is not self.me:
                whose = f"the {owner.label} (--rank {int(owner)})"
                raise BadInput(f"--{name} belongs to {whose}, this is the {self.me.label}")

    def _check_document(self) -> None:
        """Check what a server's --document goes with, and that a client's is one name. Raises BadInput."""
        if self.me is Rank.DEALER and self.document:
            raise BadInput("--document belongs to server and client (--rank 0, 1), this is the dealer")
        if self.me is Rank.CLIENT:
            self.named_document()
            return
        if self.document and self.context is not None:
            raise BadInput("--context is a text, --document is one that was packed; give one of them")
        if not self.document and self.lock.kind:
            raise BadInput(f"--pack-{self.lock.kind} opens a pack; give --document FILE, too")

    @property
    def lock(self) -> PackLock:
        """What the server's packs are sealed with."""
        return PackLock(self.pack_key, self.pack_passphrase)

    def named_document(self) -> str:
        """Return the name of the document that this client asks about. Raises BadInput."""
        if len(self.document) > 1:
            raise BadInput(
                f"--document {' '.join(self.document)!r:.80}: a client gives the public name of one "
                "document, and with --api of each that its callers may ask for"
            )
        return self.named_documents()[0] if self.document else NO_NAME

    def named_documents(self) -> tuple[str, ...]:
        """Return the names of documents that this client's callers may ask about. Raises BadInput."""
        for name in self.document:
            if not DOCUMENT_NAME.fullmatch(name) or self.document.count(name) > 1:
                raise BadInput(
                    f"--document {name!r:.80}: a client gives the public name of a document, each once"
                )
        return self.document

    def _check_serving(self) -> None:
        if self.serve and self.me is Rank.CLIENT:
            raise BadInput("--serve belongs to the server and the dealer (--rank 0, 2), this is the client")
        if self.serve and self.resume:
            raise BadInput(
                "--resume is said by the client where others --serve; give --serve --state alone here"
            )
        if self.serve and self.offline_store is not None:
            raise BadInput("--offline-store is for one session, --serve has many; give one of them")
        if self.sessions is not None and not self.serve:
            raise BadInput("--sessions is how many sessions --serve takes at once; give --serve, too")

    def check_sharding(self, public: PublicConfig) -> None:
        """Check what --ray goes with. Raises BadInput."""
        if self.preparing and self.me is not Rank.DEALER:
            raise BadInput("--ray with --prepare belongs to the dealer (--rank 2): it has the work")
        if self.preparing:
            return
        if self.offline_store is not None:
            raise BadInput("--ray holds masks that outlive a session, --offline-store has its own; give one")
        if public.protocol == ProtocolName.STOCK:
            raise BadInput("--ray holds what protocol fast multiplies by; --protocol stock does not use it")
        if self.me is Rank.DEALER and self.setup_dir is not None:
            raise BadInput(
                "--setup-dir keeps in one file what --ray spreads over machines; give one of them: with "
                "--serve the dealer's actors keep it as long as the dealer lives"
            )

    def _check_conversation(self) -> None:
        """Refuse what a conversation cannot have. Raises BadInput."""
        if not self.conversation:
            return
        if self.me is not Rank.CLIENT:
            raise BadInput(f"--conversation belongs to the client (--rank 1), this is the {self.me.label}")
        if not self.events:
            raise BadInput("--conversation takes questions from a parent process; give --events, too")
        one = {
            "question": self.question, "question-file": self.question_file, "prepare": self.prepare_tokens,
        }  # fmt: skip
        for name, value in one.items():
            if value is not None:
                raise BadInput(f"--{name} is for a session of one question, not for a --conversation")

    def sampling(self) -> Sampling:
        """Return how the client chooses tokens.

        Raises BadInput: a value out of its range, or two flags that want stdin.
        """
        top_p = 1.0 if self.top_p is None else self.top_p
        found = Sampling(self.temperature or 0.0, top_p, self.seed or 0)
        for flag, file in (("question-file", self.question_file), ("context", self.context)):
            if self.events and str(file) == "-":
                raise BadInput(f"--events and --{flag} -: both want stdin")
        return found

    def checkpointer(self) -> Checkpointer:
        """Return what --state, --state-key and --resume ask for. Raises BadInput or StateError."""
        if self.state is None and (self.resume or self.state_key is not None):
            flag = "resume" if self.resume else "state-key"
            raise BadInput(f"--{flag} needs --state DIR, where the session is kept")
        store = None if self.state is None else Store(self.state, self.me, self.state_key)
        checkpointer = Checkpointer(store, self.resume)
        checkpointer.check()
        return checkpointer

    def tapes(self, mode: KeepMode) -> TapeStore | None:
        """Return what --offline-store and --prepare ask for; mode: of keeping the session.

        Raises BadInput or StateError.
        """
        if self.me is Rank.DEALER:
            if self.offline_store is not None and (self.ray is None or not self.preparing):
                raise BadInput(
                    "--offline-store belongs to server and client; the dealer takes --prepare alone, or with "
                    "--ray a folder or a URL that its workers deal into"
                )
            return None
        if self.offline_store is None:
            if self.preparing:
                raise BadInput("--prepare needs --offline-store DIR, where the tapes go")
            return None
        if mode is not KeepMode.NONE:
            raise BadInput("--offline-store with --state: an answer from prepared tapes cannot be resumed")
        if is_url(self.offline_store):
            raise BadInput(
                f"--offline-store takes a URL at the dealer alone; a {self.me.label} keeps its tapes in a "
                "folder: each is used once, by a lock and a claim on the disk, which no URL promises"
            )
        return TapeStore(Path(self.offline_store), self.me)

    def setups(self, public: PublicConfig) -> Setups:
        """Return what --setup-dir and --fresh-document ask for. Raises BadInput or StateError."""
        if self.setup_dir is not None and (self.preparing or self.offline_store is not None):
            raise BadInput(
                "--setup-dir with prepared tapes: these are dealt for masks of their own, which go; "
                "leave --setup-dir out"
            )
        if self.me is Rank.SERVER:
            fresh = self.fresh_document or public.hide_document
            return ServerSetups(self.setup_dir, fresh, documents=len(self.document))
        if self.fresh_document:
            raise BadInput(f"--fresh-document belongs to the server (--rank 0), this is the {self.me.label}")
        if self.me is Rank.DEALER:
            return DealerSetups(self.setup_dir)
        if self.setup_dir is not None:
            raise BadInput(
                "--setup-dir belongs to server and dealer; the client gets a seed and keeps nothing"
            )
        return None

    def private_input(self, sampling: Sampling, public: PublicConfig, output: Output) -> PrivateInput:
        """Read and check what this party brings, before it connects. Raises BadInput."""
        match self.me:
            case Rank.SERVER if self.document:
                return packed_documents(self.model, self.document, self.lock, public)
            case Rank.SERVER:
                return read_document(self.model, self.context, public)
            case Rank.CLIENT:
                check_stdin(self.context, self.question_file)
                document = None if self.context is None else read_text(self.context)
                if self.turns is not None:
                    return replace(self._declared(), document=document)
                if self.conversation:
                    return PipedConversation(output, sys.stdin.buffer, self.state is not None, document)
                text = read_question(self.question, self.question_file)
                stops = read_stops(self.stop, self.stop_at_eos)
                return Question(text, sampling, self.stop_at_eos, stops, document=document)
            case _:
                return None
