"""`mpcache serve`: three parties on this machine, and the client's endpoint for programs and a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcache.config import load_settings
from mpcache.console import terminal
from mpcache.console.inputs import read_text
from mpcache.console.options import (
    ConfigOption,
    ContextOption,
    DocumentAsOption,
    ModelOption,
    NetworkOption,
    NewTokensOption,
    PackKeyOption,
    PackPassphraseOption,
    PadOption,
    PolicyOption,
    PrivateContextOption,
    PrivatePolicyOption,
    ProtocolOption,
    RawOption,
    RevealOption,
    SetupDirOption,
    chat_overrides,
    public_overrides,
)
from mpcache.limits import with_default_policy
from mpcache_parties.chat import Chat
from mpcache_parties.endpoint.chat_like import models_of
from mpcache_parties.endpoint.endpoint_options import KEY_VARIABLE, EndpointOptions
from mpcache_parties.local_parties import LocalParties
from mpcache_parties.packing import OpenedPack, with_pack_settings
from mpcache_parties.say import Say

CONVERSATIONS = 2  # at once: each holds its own masked operands


def serve_here(
    model: ModelOption = None,
    context: ContextOption = None,
    private_context: PrivateContextOption = None,
    private_policy: PrivatePolicyOption = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            help="A document that was packed (`mpcache pack`), in place of --context; or NAME=FILE for each "
            "of several, which callers ask for as MODEL@NAME."
        ),
    ] = None,
    pack_key: PackKeyOption = None,
    pack_passphrase: PackPassphraseOption = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    protocol: ProtocolOption = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    reveal: RevealOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    pad: PadOption = None,
    setup_dir: SetupDirOption = None,
    port: Annotated[str, typer.Option(help="[HOST:]PORT.  [HOST: this machine alone]")] = "8000",
    api_key: Annotated[
        Path | None,
        typer.Option(help=f"A file with the key that callers need, mode 0600. [{KEY_VARIABLE}, if set]"),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name under which it is called; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may call, https://HOST; may be repeated.")
    ] = None,
    conversations: Annotated[int, typer.Option(min=1, max=64, help="How many at once.")] = CONVERSATIONS,
) -> None:
    """Serve private conversations: an OpenAI-compatible API, and a page for a browser.

    All three parties run on this machine. It ends with Ctrl-C.
    """
    options = EndpointOptions(
        port, api_key, tuple(allow_host or ()), tuple(allow_origin or ()), flag="--port"
    )  # fmt: skip
    options.check_free()
    overrides = public_overrides(policy, protocol, network, max_new_tokens, reveal)
    settings = load_settings(config, overrides | chat_overrides(raw, document_as, pad, private_policy))
    packed = OpenedPack.read_several(document or [], pack_key, pack_passphrase, context)
    settings = with_pack_settings(settings, packed)
    settings = with_default_policy(settings, model, private_context is not None, context, terminal.say)
    text = None if context is None else read_text(context)  # once: it may be a pipe
    own = None if private_context is None else read_text(private_context)
    flags, names = ([], ()) if packed is None else (packed.flags(), packed.names)
    packed = None  # the server reads it, too: once in memory is enough
    say = terminal.say
    with LocalParties(settings, model, text, conversations, say, setup_dir, packed=flags) as parties:
        # What is wrong is told now, and the first question need not wait.
        first = names[0] if names else ""
        ready = {first: parties.chat(document=first, private=own)}

        def open_chat(name: str, say: Say) -> Chat:
            return ready.pop(name, None) or parties.chat(say, document=name, private=own)

        try:
            options.serve(models_of(public_name(model), names, open_chat), conversations, terminal.say)
        finally:
            for chat in ready.values():
                chat.close()


def public_name(model: Path | str | None) -> str:
    """Return what callers name a model: the last part of its folder, file or id."""
    return "mpcache-demo" if model is None else Path(model).name.removesuffix(".gguf") or "model"
