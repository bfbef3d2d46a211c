"""`mpcache-party`: the command line of one of the three parties, as a process of its own."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.console import terminal
from mpcache.console.options import (
    MODEL_FORMS,
    DocumentAsOption,
    NetworkOption,
    NewTokensOption,
    PadOption,
    PolicyOption,
    PrivatePolicyOption,
    ProtocolOption,
    RawOption,
    RevealOption,
    version_option,
)
from mpcache.console.signals import Stopped, ignore_signals
from mpcache.errors import MpcacheError
from mpcache.rank import Rank
from mpcache_parties.client_api import ClientApi
from mpcache_parties.health_command import health
from mpcache_parties.keygen import keygen
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.pinning import pin
from mpcache_parties.process import run_party
from mpcache_parties.serving import AT_ONCE

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)


app.command()(keygen)
app.command()(pin)
app.command()(health)


@app.callback(invoke_without_command=True)
def party(
    command: typer.Context,
    version: Annotated[bool, version_option("mpcache-party")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, max=2, help="0: server, 1: client, 2: dealer.  [required]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="What all parties agree on: a YAML file.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Server. {MODEL_FORMS}. [the demo model]")] = None,
    context: Annotated[
        Path | None,
        typer.Option(
            help="Server: the document, a text file, or - for stdin. [the demo model: its own] "
            "Client: a document of its own, which nobody else sees."
        ),
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            help="Server: FILE, a document that was packed, or NAME=FILE for each of several. "
            "Client: the NAME of the one that it asks about; with --api of each that callers may ask about."
        ),
    ] = None,
    pack_key: Annotated[
        Path | None, typer.Option(help="Server: the key that its packs are sealed with, mode 0600.")
    ] = None,
    pack_passphrase: Annotated[
        Path | None, typer.Option(help="Server: a file with the passphrase for them, mode 0600.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Client: the question. [the demo's]")] = None,
    question_file: Annotated[
        Path | None, typer.Option(help="Client: a file with the question, or - for stdin; unseen by `ps`.")
    ] = None,
    policy: PolicyOption = None,
    private_policy: PrivatePolicyOption = None,
    protocol: ProtocolOption = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    reveal: RevealOption = None,
    temperature: Annotated[float | None, typer.Option(help="Client: 0 is greedy. [0]")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Client: share of probability to draw from. [1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Client: seed of the draws. [0]")] = None,
    stop_at_eos: Annotated[
        bool, typer.Option(help="Client: end at the model's end token; the answer's length is public then.")
    ] = True,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Client: end the answer before this text; may be given several times."),
    ] = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    pad: PadOption = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Keep this party's part of the session here after each token, encrypted. "
            "With --serve: of the sessions whose client asks for it."
        ),
    ] = None,
    state_key: Annotated[
        Path | None, typer.Option(help="The key for it, mode 0600; made if there is none. [in --state]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the session in --state; all alike, but for who serves."),
    ] = False,
    setup_dir: Annotated[
        Path | None,
        typer.Option(
            help="Server, dealer: keep the masked weights and documents here for later sessions. [in memory]"
        ),
    ] = None,
    fresh_document: Annotated[
        bool,
        typer.Option(
            "--fresh-document",
            help="Server: mask the document anew in each session, unlinkable for the dealer.",
        ),
    ] = False,
    offline_store: Annotated[
        str | None,
        typer.Option(
            help="Server, client: the folder of tapes, used in place of a dealer. Dealer, with --ray: the "
            "folder or fsspec URL (s3://...) that workers deal into."
        ),
    ] = None,
    prepare_tokens: Annotated[
        int | None, typer.Option("--prepare", help="Deal tapes for one answer of so many tokens, store them.")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Dealer, with --prepare: so many batches. [1]"),
    ] = None,
    turns: Annotated[
        str | None,
        typer.Option(
            help="Client, with --prepare: for a conversation whose questions have so many tokens, as in "
            "14,9,9; each has an answer of that length."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Spread this party's matrices over a Ray cluster: HOST:PORT of its head, auto (the one that "
            "this machine is in), or local."
        ),
    ] = None,
    ray_actors: Annotated[
        int | None, typer.Option(min=1, max=1024, help="With --ray: over so many actors. [the machines]")
    ] = None,
    connect_timeout: Annotated[float | None, typer.Option(help="Seconds to wait for the others.")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="Folder of this party's key and certificate: the links use TLS.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, whatever the addresses: for a network you trust.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Append a JSON line for each event, without secrets; - is stderr.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus to read.  [HOST: this machine alone]")
    ] = None,
    health: Annotated[
        str | None, typer.Option(help="[HOST:]PORT of gRPC's standard health service.  [likewise]")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="Server, dealer: HOST:PORT to bind. [the address in the config]"),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Server or dealer: serve one session after another until stopped."),
    ] = False,
    sessions: Annotated[
        int | None, typer.Option(min=1, max=64, help=f"With --serve: how many at once. [{AT_ONCE}]")
    ] = None,
    events: Annotated[
        bool,
        typer.Option("--events", help="JSON lines on stdout; ends when stdin closes: for a parent process."),
    ] = False,
    conversation: Annotated[
        bool,
        typer.Option(
            "--conversation", help="Client, with --events: questions, one after another, from stdin."
        ),
    ] = False,
    api: Annotated[
        str | None,
        typer.Option(help="Client: [HOST:]PORT of an OpenAI-compatible endpoint and its page; stays."),
    ] = None,
    api_key: Annotated[
        Path | None, typer.Option(help="With --api: a file with the key that callers need, mode 0600.")
    ] = None,
) -> None:
    """Run one party until the answer is complete. Start all three, in any order.

    With --serve a server or a dealer stays, and keeps its model and document for the next client.
    Without flags: the demo model, document and question, over loopback.
    """
    if command.invoked_subcommand is not None:
        return
    if rank is None:
        raise typer.BadParameter("give --rank 0 (server), 1 (client) or 2 (dealer)", param_hint="--rank")
    options = PartyOptions(
        me=Rank(rank),
        config=config,
        model=model,
        context=context,
        document=tuple(document or ()),
        pack_key=pack_key,
        pack_passphrase=pack_passphrase,
        question=question,
        question_file=question_file,
        policy=policy,
        private_policy=private_policy,
        protocol=protocol,
        network=network,
        max_new_tokens=max_new_tokens,
        reveal=reveal,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_at_eos=stop_at_eos,
        stop=tuple(stop or ()),
        raw=raw,
        document_as=document_as,
        pad=pad,
        state=state,
        state_key=state_key,
        resume=resume,
        setup_dir=setup_dir,
        fresh_document=fresh_document,
        offline_store=offline_store,
        prepare_tokens=prepare_tokens,
        turns=turns,
        connect_timeout=connect_timeout,
        identity=identity,
        insecure=insecure,
        log=log,
        log_level=log_level,
        metrics=metrics,
        health=health,
        listen=listen,
        serve=serve,
        sessions=sessions,
        events=events,
        conversation=conversation,
        ray=ray,
        ray_actors=ray_actors,
        batches=batches,
    )
    if api is not None:
        ClientApi(api, api_key).serve(options, terminal.say)
        return
    run_party(options)


def main() -> None:
    """Run the command line, and end this process with its exit code, whatever gRPC's threads still do."""
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except MpcacheError as error:
        code = error.exit_code
        if not (isinstance(error, Stopped) and isinstance(error.__context__, MpcacheError | SystemExit)):
            print(f"error: {error}", file=sys.stderr)  # else: told to stop while another error was told
    finally:
        ignore_signals()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is closed by now. The interpreter's own end would wait for gRPC's threads, which may wait for it.
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
