"""The options that several commands share, each with its one help text.

A command takes them as the types of its parameters: `network: NetworkOption = None`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.choices import ChatForm, Reveal
from mpcache.errors import BadInput
from mpcache.transport.network import NETWORKS

MODEL_FORMS = "A Hugging Face folder, a .gguf file, or OWNER/NAME[@REVISION][:FILE.gguf] of the hub"
ModelOption = Annotated[str | None, typer.Option("--model", help=f"{MODEL_FORMS}. [the demo model]")]
ContextOption = Annotated[
    Path | None,
    typer.Option(
        help="The server's document: a text file, or - for stdin. [the demo model: its own; else none]"
    ),
]
PrivateContextOption = Annotated[
    Path | None,
    typer.Option(help="The client's own document, which nobody else sees: a text file, or - for stdin."),
]
PrivatePolicyOption = Annotated[
    str | None,
    typer.Option(help="What stays of --private-context: full, or snapkv, mpcache, h2o with a budget. [full]"),
]
DocumentOption = Annotated[
    str | None,
    typer.Option(help="A document that was packed (`mpcache pack`), in place of --context: no prefill."),
]
PackKeyOption = Annotated[Path | None, typer.Option(help="The key that the pack is sealed with, mode 0600.")]
PackPassphraseOption = Annotated[
    Path | None, typer.Option(help="A file with the passphrase that the pack is sealed with, mode 0600.")
]
QuestionOption = Annotated[str | None, typer.Option(help="The client's question. [the demo's]")]
QuestionFileOption = Annotated[
    Path | None, typer.Option(help="A file with the question, or - for stdin: not seen in the process list.")
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Public settings, a YAML file; its addresses are not used here.")
]
PolicyOption = Annotated[
    str | None, typer.Option(help="NAME[:key=value,...], as `mpcache policies` lists them.")
]
PoliciesOption = Annotated[
    list[str] | None, typer.Option("--policy", help="NAME[:key=value,...]; may be given several times. [all]")
]
ProtocolOption = Annotated[str | None, typer.Option(help="auto, fast, fast-bits or stock. [auto]")]
NetworkOption = Annotated[str | None, typer.Option(help=f"{NETWORKS}: the links are slowed down to it.")]
NewTokensOption = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
RawOption = Annotated[
    bool,
    typer.Option("--raw", help="No chat template around document and question. [where the model has one]"),
]
DocumentAsOption = Annotated[
    str | None,
    typer.Option(help="The document is the model's system message, or the user's: system or user. [system]"),
]
PadOption = Annotated[
    int | None,
    typer.Option("--pad", help="Only the next multiple of this is public of a question's length. [1]"),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; may be given several times."),
]
RevealOption = Annotated[
    str | None, typer.Option(help="What the client learns of each step: logits, or the token alone. [logits]")
]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option(help="Share of probability to draw from.")]
SeedOption = Annotated[int, typer.Option(help="Of the draws.")]
StopAtEosOption = Annotated[
    bool, typer.Option(help="End at the model's end token; the answer's length is public then.")
]
StateOption = Annotated[
    Path | None, typer.Option(help="Keep the session here after each token, each party's part encrypted.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the session in --state.")]
SetupDirOption = Annotated[
    Path | None,
    typer.Option(
        "--setup-dir",
        help="Keep the masked weights and document here, sealed: later runs send none. [anew in each run]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]

SweepRayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Ask the cells on a Ray cluster: HOST:PORT of its head, auto (the one that this machine is in), "
        "or local (this machine's processors).",
    ),
]
JournalOption = Annotated[
    Path | None,
    typer.Option(help="Note each finished cell here; given again, an interrupted sweep goes on after them."),
]


def read_reveal(text: str | None) -> Reveal:
    """Read what --reveal was given; LOGITS where it was not. Raises BadInput."""
    try:
        return Reveal.LOGITS if text is None else Reveal(text)
    except ValueError:
        raise BadInput(f"--reveal {text!r} is not known; give {' or '.join(Reveal)}") from None


def version_option(program: str) -> Any:
    """Return the option `--version` of this program."""

    def show(wanted: bool) -> None:
        if wanted:
            try:
                print(f"{program} {version('mpcache')}")
            except PackageNotFoundError:  # run from a checkout
                print(f"{program}, not installed: run from its source")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Print the version, and end.")


def read_stops(stops: Sequence[str] | None, stop_at_eos: bool) -> tuple[str, ...]:
    """Read what --stop was given. Raises BadInput."""
    if stops and not stop_at_eos:
        raise BadInput("--stop ends an answer early, --no-stop-at-eos never does; give one of them")
    if stops and not all(stops):
        raise BadInput("--stop is empty; give the text that ends an answer")
    return tuple(stops or ())


def chat_overrides(
    raw: bool, document_as: str | None, pad: int | None = None, private_policy: str | None = None
) -> dict[str, Any]:
    """Return what these options override in the config's public section."""
    return {
        "public.chat": ChatForm.RAW if raw else None, "public.document_as": document_as,
        "public.length_grid": pad, "public.private_policy": private_policy,
    }  # fmt: skip


def public_overrides(
    policy: str | None, protocol: str | None, network: str | None, tokens: int | None, reveal: str | None
) -> dict[str, Any]:
    """Return what these options override in the config's public section."""
    return {
        "public.policy": policy,
        "public.protocol": protocol,
        "public.network": network,
        "public.max_new_tokens": tokens,
        "public.reveal": reveal,
    }
