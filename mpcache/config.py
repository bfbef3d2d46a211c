"""What all parties agree on, and where they are: one YAML file, checked when it is read.

What is each party's own (model folder, document, question, keys) is not here: those are flags.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from mpcache.certificates import certificates_in
from mpcache.choices import ChatForm, DocumentAs, ProtocolName, Reveal
from mpcache.errors import ConfigError, PolicyError
from mpcache.policy.grammar import NOTATION, parse_parts
from mpcache.rank import Rank
from mpcache.transport.address import HostPort
from mpcache.transport.network import NETWORKS, parse_network


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _policy(spec: str) -> str:
    try:
        parse_parts(spec)
    except PolicyError:
        raise ValueError(f"must be {NOTATION}") from None
    return spec


def _address(text: str) -> str:
    HostPort.parse(text)
    return text


def _network(text: str) -> str:
    try:
        parse_network(text)
    except ConfigError:
        raise ValueError(f"must be {NETWORKS}") from None
    return text


def _certificates(pem: str) -> str:
    try:
        certificates_in(pem)
    except ValueError:
        raise ValueError("must be certificates in PEM; mpcache-party pin writes them") from None
    return pem


# A choice is its enum's member in memory, and its text in YAML and JSON.
_TEXT = (Field(strict=False), PlainSerializer(lambda choice: choice.value, return_type=str))
Address = Annotated[str, AfterValidator(_address)]
Pem = Annotated[str, AfterValidator(_certificates)]


class PublicConfig(_Section):
    """What every party must agree on before anything secret moves."""

    # `auto` picks one of fast and fast-bits by `network` (`mpcache.cost.choose`).
    protocol: Annotated[ProtocolName, *_TEXT] = ProtocolName.AUTO
    # NAME[:key=value,...]. Plain `mpcache` is the paper's setting; the default selects by Quest's exact
    # bound in every layer, which keeps the demo model's recall at one more round (docs/quality.md).
    policy: Annotated[str, AfterValidator(_policy)] = "mpcache:score=bound,share=none"
    max_new_tokens: int = Field(default=32, ge=1, le=100_000)  # of one answer
    conversation_tokens: int = Field(default=1024, ge=2, le=100_000)  # of all turns, questions and answers
    reveal: Annotated[Reveal, *_TEXT] = Reveal.LOGITS  # what the client learns of each step
    chat: Annotated[ChatForm, *_TEXT] = ChatForm.TEMPLATE  # a model without a template is asked raw
    document_as: Annotated[DocumentAs, *_TEXT] = DocumentAs.SYSTEM  # where a template finds the document
    # What stays of a document of the client's own: it is evicted once, on shares, after it has been read.
    private_policy: Annotated[str, AfterValidator(_policy)] = "full"
    # Tokens of the client's document that are read at once; 0: by cost (`mpcache.cost.reading`).
    document_chunk: int = Field(default=0, ge=0, le=4096)
    length_grid: int = Field(default=1, ge=1, le=4096)  # a question's length is public to its multiples
    # The dealer does not hear which of a server's documents a client names; each session masks it anew.
    hide_document: bool = False
    fraction_bits: int = Field(default=16, ge=8, le=16)  # `fast` has its ranges, docs/ranges.md, at 16
    network: Annotated[str, AfterValidator(_network)] = "none"
    # What the server reads its document with, in plaintext; auto: Triton's where there is a GPU.
    kernels: Literal["auto", "reference", "triton"] = "auto"

    def flat(self) -> dict[str, str]:
        """Return every field as text, the policy's options apart (`policy.n_keep`), for Hello."""
        fields = {name: str(value) for name, value in self.model_dump().items()}
        parts = parse_parts(self.policy)
        fields["policy"] = "|".join(part.name for part in parts)
        for part in parts:
            prefix = "policy" if len(parts) == 1 else f"policy.{part.name}"
            fields |= {f"{prefix}.{key}": value for key, value in part.options}
        return dict(sorted(fields.items()))


class Addresses(_Section):
    """Who takes calls where. The client takes none: it dials both, and the server dials the dealer."""

    server: Address = "127.0.0.1:7100"
    dealer: Address = "127.0.0.1:7102"
    bind: Address | None = (
        None  # --listen: what this party binds, where its address above is another machine's
    )

    def of(self, rank: Rank) -> str:
        """Return where this rank listens; raises ValueError for the client."""
        if rank is Rank.CLIENT:
            raise ValueError("the client does not listen")
        return self.server if rank is Rank.SERVER else self.dealer

    def bound_by(self, rank: Rank) -> str:
        """Return what this rank binds on its own machine; raises ValueError for the client."""
        return self.bind if self.bind is not None and rank is not Rank.CLIENT else self.of(rank)


class Timeouts(_Section):
    """In seconds."""

    connect_s: float = Field(default=60, gt=0, le=86_400)  # for all peers to come
    recv_s: float = Field(default=120, gt=0, le=86_400)  # longest silence of a peer that is waited for
    reconnect_s: float = Field(default=20, gt=0, le=86_400)  # for a broken connection to come back
    idle_s: float = Field(default=1800, gt=0, le=604_800)  # longest pause between a conversation's turns


class Certificates(_Section):
    """Which certificates are taken for which rank, in PEM; several where several clients may come.

    Public, and the same in every party's file; `mpcache-party pin` writes it.
    """

    server: Pem = ""
    client: Pem = ""
    dealer: Pem = ""

    def of(self, rank: Rank) -> str:
        return {Rank.SERVER: self.server, Rank.CLIENT: self.client, Rank.DEALER: self.dealer}[rank]


class Settings(_Section):
    """The whole file."""

    public: PublicConfig = PublicConfig()
    addresses: Addresses = Addresses()
    certificates: Certificates = Certificates()
    timeouts: Timeouts = Timeouts()


def load_settings(path: Path | str | None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read a YAML file (None: the defaults) and put `overrides` on top.

    An override's key is dotted (`public.policy`); None as its value means: not given.
    Raises ConfigError, one line: the file or flag, the key, what is wrong and what is allowed.
    """
    source = str(path) if path is not None else "settings"
    tree = _read_yaml(Path(path)) if path is not None else {}
    _check_keys(Settings, tree, source, "")
    return _validated(tree, overrides or {}, source)


def with_overrides(settings: Settings, overrides: Mapping[str, Any]) -> Settings:
    """Put `overrides` on top of settings that were read before. Raises ConfigError."""
    return _validated(settings.model_dump(), overrides, "settings")


def _validated(tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> Settings:
    for key, value in overrides.items():
        if value is None:
            continue
        section, _, name = key.partition(".")
        layer = {section: {name: value}} if name else {section: value}
        _check_keys(Settings, layer, "override", "")
        tree[section] = {**tree.get(section, {}), **layer[section]}
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{source}: {where} is {_brief(first['input'])}: {what[0].lower()}{what[1:]}"
        ) from None


_OTHERWISE = ("int", "float", "merge", "value")  # what YAML 1.1 finds in words, and this loader does not
_NUMBERS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml comes without types
    """YAML in which a file means what it seems to mean.

    No aliases: a few lines of them spell gigabytes. No key twice: the last one would win in silence. No
    merged keys (<<), and numbers in decimal alone: 10:50 is no 650, and 010 no 8.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in some if tag.rpartition(":")[2] not in _OTHERWISE]
        for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value} comes twice; leave one of them"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="aliases (*) are not allowed here", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"), _NUMBERS)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.inf\Z|\.nan\Z", re.I
    ),
    _NUMBERS,
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # a 13th month, say
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        known = ", ".join(Settings.model_fields)
        raise ConfigError(f"{path}: must hold sections ({known}), not {_kind(tree)}")
    return tree


def _check_keys(model: type[BaseModel], tree: Mapping[Any, Any], source: str, prefix: str) -> None:
    """Unknown keys, with the nearest valid one; and sections that are no sections."""
    for key, value in tree.items():
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(model.model_fields)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}; {hint}")
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(value, dict):
                known = ", ".join(kind.model_fields)
                what = f"must be a section with {known}, not {_kind(value)}"
                raise ConfigError(f"{source}: {prefix}{key} {what}")
            _check_keys(kind, value, source, f"{prefix}{key}.")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
