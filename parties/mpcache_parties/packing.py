"""Pack a document, and serve one that was packed: what a session agrees on must be what it was packed for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mpcache.answer import bind_to_document
from mpcache.choices import POLICY_AUTO, ChatForm, DocumentAs
from mpcache.config import PublicConfig, Settings, with_overrides
from mpcache.errors import BadInput, TextError
from mpcache.limits import bind_conversation, check_document, check_fitted, largest_score_held
from mpcache.model import demo_model_dir, find_model, load_model, load_shape, load_tokenizer
from mpcache.model.framing import make_framing
from mpcache.model.prefill import prefill
from mpcache.model.reread import reread
from mpcache.model.tokenizer import Tokenizer
from mpcache.policy import parse_policy
from mpcache.policy.layer_view import PackedContext
from mpcache.report.units import duration
from mpcache_parties.handshake import DOCUMENT_NAME, NO_NAME
from mpcache_parties.kernel_choice import choose_kernels
from mpcache_parties.private_inputs import Document, Documents
from mpcache_parties.say import Say
from mpcache_parties.state.packs import Pack, PackFacts, PackLock, bind_packed, read_pack

SHORTEST_ROOM = 2  # tokens of a question and its answer: a session checks its own
SECOND_READING = 1.3  # times as long as the first, as measured (docs/log.md)
RAW = "raw"  # PackFacts.framing: there is no template around the document


def make_pack(own: Document, public: PublicConfig, say: Say) -> Pack:
    """Read a document, evict, and fit what stays; `say` hears how far it is.

    Raises BadInput, or OutOfRange: what protocol fast does not hold.
    """
    model, policy = own.model, parse_policy(public.policy)
    bound, _ = bind_conversation(model.shape, public, own.length)
    bound.check_packs()
    bound.count_from_model(model)  # a model without a curve is told before its document is read
    kernels, held = choose_kernels(public.kernels, own.device), largest_score_held(bound, model.shape)
    say(f"reading {own.length} tokens ...")
    start = time.perf_counter()
    known = prefill(model, own.tokens, own.device, window=bound.window, exact_from=held)
    check_document(known, bound, model.shape, SHORTEST_ROOM)
    if policy.rereads:
        took = 1000 * (time.perf_counter() - start)
        say(f"reading them a second time, about {duration(SECOND_READING * took)} ...")
        reread(known)
    say("choosing what stays ...")
    bound, counts = bind_to_document(bound, model.shape, known, kernels)
    layers, start, count = [], time.perf_counter(), model.shape.layers
    for i in range(count):
        layers.append(tuple(kept.to("cpu") for kept in bound.retained(known, i, kernels)))
        left = 1000 * (time.perf_counter() - start) / (i + 1) * (count - i - 1)
        say(f"layer {i + 1} of {count} packed" + (f", about {duration(left)} left" if left else ""))
    check_fitted(known, bound, kernels, SHORTEST_ROOM)
    packed = PackedContext(
        own.length, policy.spec, tuple(counts), tuple(layers), known.largest_scores, known.largest_values
    )
    facts = PackFacts(
        model.digest, model.tokenizer.digest, *_framed(model.tokenizer, public), kernels.name, _release()
    )
    return Pack(facts, packed, own.written)


def packed_documents(
    model: str | None, given: Sequence[str], lock: PackLock, public: PublicConfig
) -> Document | Documents:
    """Open packs as the server's documents, with its model.

    given: one FILE, or NAME=FILE of each. Raises BadInput: one does not fit the session.
    """
    files = _named_files(given)
    path = demo_model_dir() if model is None else find_model(model)
    tokenizer, shape = load_tokenizer(path), load_shape(path)
    packs = {}
    for name, file in files.items():
        packs[name] = pack = read_pack(file, lock)
        check_pack(pack, file, tokenizer, public)
        bind_packed(pack.context, shape, file)
    # Last: it takes minutes where a model is large. Set-up takes one layer after another.
    loaded = load_model(path, keep=False)
    raw, found = public.chat is ChatForm.RAW, {}
    template = None if raw else tokenizer.chat_template
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, pack in packs.items():
        check_weights(pack, files[name], loaded.digest)
        note = make_framing(tokenizer, shape, raw, public.document_as, pack.written).note
        context = pack.context.to(device)
        found[name] = Document(loaded, [], device, template, pack.written, note, context)
    return found[""] if "" in found else Documents(found)


def _named_files(given: Sequence[str]) -> dict[str, Path]:
    """Read what --document was given at a server: one file, or names of several. Raises BadInput."""
    if len(given) == 1 and not _named(given[0]):
        return {"": Path(given[0])}
    files: dict[str, Path] = {}
    for each in given:
        name, _, file = each.partition("=")
        if not _named(each) or not file:
            raise BadInput(
                f"--document {each!r}: give one FILE, or NAME=FILE for each of several; a name is public, of "
                "up to 64 letters, digits, dots and dashes"
            )
        if name in files:
            raise BadInput(f"--document {name}=...: the name comes twice")
        if name == NO_NAME:
            raise BadInput(
                f"--document {name}=...: a client that names no document says {name}; take another"
            )
        files[name] = Path(file)
    return files


def _named(given: str) -> bool:
    name, found, _ = given.partition("=")
    return bool(found) and DOCUMENT_NAME.fullmatch(name) is not None


def check_weights(pack: Pack, file: Path, digest: str) -> None:
    """Check that a pack is of the model of this digest. Raises TextError."""
    if digest != pack.facts.model_digest:
        raise _foreign(file)


def check_pack(pack: Pack, file: Path, tokenizer: Tokenizer, public: PublicConfig) -> None:
    """Check that a pack is of this tokenizer, and of what the parties agree on. Raises TextError."""
    if tokenizer.digest != pack.facts.tokenizer_digest:
        raise _foreign(file)
    digest, framing = _framed(tokenizer, public)
    if framing != pack.facts.framing:
        flags = {
            RAW: "--raw",
            "system": "a chat template, --document-as system",
            "user": "--document-as user",
        }
        theirs = flags.get(pack.facts.framing, "another framing")
        raise TextError(f"{file}: was packed with {theirs}; the session has {flags[framing]}: pack it anew")
    if digest != pack.facts.template_digest:
        raise TextError(f"{file}: was packed with another chat template than the model has; pack it anew")
    if public.policy != POLICY_AUTO and parse_policy(public.policy).spec != pack.context.spec:
        raise TextError(
            f"{file}: was packed for policy {pack.context.spec:.200}; the session has {public.policy}: give "
            "--policy, or pack the document anew"
        )


@dataclass(frozen=True)
class OpenedPack:
    """A pack that was read for a command, and where it is.

    others: further ones of the same server, by public name, which it reads itself.  name: this one's, if any.
    """

    file: Path
    lock: PackLock
    pack: Pack
    name: str = ""
    others: Mapping[str, Path] = field(default_factory=dict)

    @staticmethod
    def read(
        given: str | None, key: Path | str | None, passphrase: Path | None, context: object = None
    ) -> OpenedPack | None:
        """Read what --document was given, if anything was. Raises BadInput."""
        lock = PackLock(None if key is None else Path(key), passphrase)
        lock.check()
        if given is None:
            if lock.kind:
                raise BadInput(f"--pack-{lock.kind} opens a pack; give --document FILE.pack, too")
            return None
        if context is not None:
            raise BadInput("--context is a text, --document is one that was packed; give one of them")
        return OpenedPack(Path(given), lock, read_pack(Path(given), lock))

    @staticmethod
    def read_several(
        given: Sequence[str], key: Path | str | None, passphrase: Path | None, context: object = None
    ) -> OpenedPack | None:
        """Read the first of what --document was given: one FILE, or NAME=FILE of each. Raises BadInput."""
        files = _named_files(given) if given else {}
        name = next(iter(files), "")
        first = OpenedPack.read(str(files.pop(name)) if files else None, key, passphrase, context)
        return None if first is None else replace(first, name=name, others=files)

    @property
    def names(self) -> tuple[str, ...]:
        """The public names; none of a single one."""
        return (self.name, *self.others) if self.name else ()

    def flags(self) -> list[str]:
        """Return them as the server's flags."""
        named = f"{self.name}=" if self.name else ""
        flags = ["--document", f"{named}{self.file.absolute()}", *self.lock.flags()]
        for name, file in self.others.items():
            flags += ["--document", f"{name}={file.absolute()}"]
        return flags


def with_pack_settings(settings: Settings, opened: OpenedPack | None) -> Settings:
    """Take policy and framing from a pack where nobody has named them."""
    if opened is None:
        return settings
    pack = opened.pack
    given, facts = settings.public.model_fields_set, pack.facts
    overrides: dict[str, str] = {}
    if "policy" not in given:
        overrides["public.policy"] = pack.context.spec
    if facts.framing == RAW and "chat" not in given:
        overrides["public.chat"] = ChatForm.RAW
    elif facts.framing != RAW and "document_as" not in given:
        overrides["public.document_as"] = facts.framing
    return with_overrides(settings, overrides)


def _framed(tokenizer: Tokenizer, public: PublicConfig) -> tuple[str, str]:
    """Return what is around a document: the digest of a template, and where it finds the document."""
    template = None if public.chat is ChatForm.RAW else tokenizer.chat_template
    return ("none", RAW) if template is None else (template.digest, DocumentAs(public.document_as).value)


def _foreign(file: Path) -> TextError:
    return TextError(f"{file}: was packed with another model than this one; pack the document anew")


def _release() -> str:
    try:
        return version("mpcache")
    except PackageNotFoundError:  # run from a checkout
        return "source"
