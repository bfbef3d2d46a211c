"""`mpcache`: private answers on this machine, and what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from mpcache.answer import left_range
from mpcache.audit.audit_command import audit
from mpcache.chat_command import chat_here
from mpcache.check.check_command import check
from mpcache.config import PublicConfig, load_settings, with_overrides
from mpcache.console import terminal
from mpcache.console.options import (
    ConfigOption,
    ContextOption,
    DocumentAsOption,
    DocumentOption,
    JsonOption,
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
    QuestionFileOption,
    QuestionOption,
    RawOption,
    ResumeOption,
    RevealOption,
    SeedOption,
    SetupDirOption,
    StateOption,
    StopAtEosOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    chat_overrides,
    public_overrides,
    version_option,
)
from mpcache.console.signals import ignore_signals, stop_on_signals
from mpcache.console.streamed import StreamedText
from mpcache.console.streams import open_streams, written_out
from mpcache.errors import BadInput, MpcacheError, told_as
from mpcache.evaluate.calibrate_command import calibrate_model
from mpcache.evaluate.eval_command import evaluate
from mpcache.inquiry import Inquiry
from mpcache.limits import with_default_policy
from mpcache.pack_command import pack_document
from mpcache.policies_command import policies
from mpcache.report.tables import card, comparison
from mpcache.sampling import Sampling
from mpcache.serve_command import serve_here
from mpcache_parties.launch import PartyFailed
from mpcache_parties.packing import OpenedPack, with_pack_settings

COMPARE_TOKENS = 8  # answered in each run of `compare` unless told otherwise

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = terminal.stdout()
NAME_WIDTH = 11  # columns of what stands before a text
STARTING = "starting the parties ..."


@app.callback()
def options_of_all(version: Annotated[bool, version_option("mpcache")] = False) -> None:
    """Private LLM answers with MPCache: three parties, secret shares, an evicted KV cache."""


@app.command()
def generate(
    model: ModelOption = None,
    context: ContextOption = None,
    private_context: PrivateContextOption = None,
    private_policy: PrivatePolicyOption = None,
    document: DocumentOption = None,
    pack_key: PackKeyOption = None,
    pack_passphrase: PackPassphraseOption = None,
    question: QuestionOption = None,
    question_file: QuestionFileOption = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    protocol: ProtocolOption = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    reveal: RevealOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop_at_eos: StopAtEosOption = True,
    stop: StopOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    pad: PadOption = None,
    state: StateOption = None,
    resume: ResumeOption = False,
    setup_dir: SetupDirOption = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="A dry run: the plaintext answer alone, without any privacy.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question privately: server, client and dealer as three processes of this machine.

    The answer streams as the client learns it; then the plaintext answer, and what both cost.
    """
    overrides = public_overrides(policy, protocol, network, max_new_tokens, reveal)
    packed = OpenedPack.read(document, pack_key, pack_passphrase, context)
    settings = load_settings(config, overrides | chat_overrides(raw, document_as, pad, private_policy))
    settings = with_pack_settings(settings, packed)
    settings = with_default_policy(settings, model, private_context is not None, context, terminal.say)
    if resume and state is None:
        raise BadInput("--resume needs --state DIR, where the session is kept")
    kept = ["--state", str(state)] if state is not None else []
    sampling, public = Sampling(temperature, top_p, seed), settings.public
    inquiry = Inquiry.read(
        model, context, packed, private_context, question, question_file, sampling, stop_at_eos, stop, public
    )
    settings = inquiry.planned(settings)
    public = settings.public
    bound = inquiry.bind(public)
    if not as_json:
        _entry("Question", inquiry.question_text + "\n")
    if plain:
        _answer_in_the_clear(inquiry, public, as_json)
        return
    with terminal.progress(STARTING) as (say, hush), StreamedText(NAME_WIDTH) as streamed:
        shown = ""

        def show(token: int, text: str) -> None:
            nonlocal shown
            if as_json or not text:
                return
            hush()
            if not streamed.began:
                _entry("Private", "")
                text = text.lstrip(" ")
            streamed.write(text)
            shown += text

        def tell(text: str) -> None:
            say(text)  # on a terminal this is seen up to the first word
            if streamed.began:
                streamed.note(text)

        try:
            reports = inquiry.private(settings, tell, show, [*kept, *["--resume"] * resume], setup_dir)
        except PartyFailed as failure:
            if as_json and failure.answer is not None:  # it is there, though not what all of it took
                told = {"text": failure.answer.text, "token_ids": failure.answer.token_ids}
                print(json.dumps(told | {"error": str(failure)}))
            raise
    run = inquiry.compared(settings.public, bound.leak, reports)
    if as_json:
        print(json.dumps(run))
        _check_range(run)
        return
    if shown and not shown.endswith("\n"):
        _write("\n")
    text = run["plaintext_text"]
    _entry("Plaintext", text if text.endswith("\n") else text + "\n")
    _write("\n")
    terminal.print_table(out, card(run))
    _check_range(run)


def _answer_in_the_clear(inquiry: Inquiry, public: PublicConfig, as_json: bool) -> None:
    """Answer without privacy, and say so."""
    found = inquiry.plain(public)
    if as_json:
        told = {"text": found.text, "token_ids": found.ids, "privacy": "none", "policy": public.policy}
        print(json.dumps(told | {"prefill_ms": found.prefill_ms, "ms": found.ms}))
        return
    _entry("Plaintext", found.text if found.text.endswith("\n") else found.text + "\n")
    terminal.say("a dry run: no party ran, and nothing was private")


def _check_range(run: dict[str, Any]) -> None:
    """Raise OutOfRange where an answer ended for a value that left its range: what is shown is right."""
    if run["in_range"] is False:
        raise left_range(len(run["token_ids"]))


@app.command()
def compare(
    model: ModelOption = None,
    context: ContextOption = None,
    private_context: PrivateContextOption = None,
    private_policy: PrivatePolicyOption = None,
    document: DocumentOption = None,
    pack_key: PackKeyOption = None,
    pack_passphrase: PackPassphraseOption = None,
    question: QuestionOption = None,
    question_file: QuestionFileOption = None,
    config: ConfigOption = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="May be given several times. [full, and the default]")
    ] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="May be given several times. [auto]")] = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    reveal: RevealOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop_at_eos: StopAtEosOption = True,
    stop: StopOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    pad: PadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare private with plaintext, per policy and protocol: latency, rounds, bytes, agreement."""
    if max_new_tokens is None and config is None:
        max_new_tokens = COMPARE_TOKENS
    sampling = Sampling(temperature, top_p, seed)
    overrides = chat_overrides(raw, document_as, pad, private_policy)
    agreed = load_settings(config, overrides)  # once: it may be a pipe
    packed = OpenedPack.read(document, pack_key, pack_passphrase, context)
    agreed = with_pack_settings(agreed, packed)
    agreed = with_default_policy(agreed, model, private_context is not None, context, terminal.say)
    inquiry = Inquiry.read(
        model,
        context,
        packed,
        private_context,
        question,
        question_file,
        sampling,
        stop_at_eos,
        stop,
        agreed.public,
    )
    usual = ("full", None) if packed is None and agreed.public.policy != "full" else (None,)
    chosen = [
        inquiry.planned(with_overrides(agreed, public_overrides(one, way, network, max_new_tokens, reveal)))
        for way in protocol or (None,)
        for one in policy or usual
    ]
    bounds = [inquiry.bind(settings.public) for settings in chosen]  # all are checked before the first runs
    runs = []
    for settings, bound in zip(chosen, bounds, strict=True):
        public, spec = settings.public, settings.public.policy
        with terminal.progress(STARTING, f"{spec}, {public.protocol}: ") as (say, _):
            reports = inquiry.private(settings, say, lambda token, text: None)
        runs.append(inquiry.compared(public, bound.leak, reports))
    if as_json:
        print(json.dumps({"runs": runs}))
    else:
        terminal.print_table(out, comparison(runs))
    for run in runs:
        _check_range(run)


def _entry(name: str, text: str) -> None:
    """Write a name in bold, and the (beginning of the) text that belongs to it."""
    out.print(f"[bold]{name:<{NAME_WIDTH}}[/]", end="")
    _write(text.lstrip(" "))


def _write(text: str) -> None:
    """Write model text as it is: no markup, no wrapping."""
    out.file.write(text)
    out.file.flush()


app.command()(audit)
app.command()(check)
app.command()(policies)
app.command("pack")(pack_document)
app.command("eval")(evaluate)
app.command("calibrate")(calibrate_model)
app.command("serve")(serve_here)
app.command("chat")(chat_here)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error of the user's or a party's is one line on stderr, and an exit code above 0."""
    open_streams()
    try:
        stop_on_signals("mpcache")
        torch.set_num_threads(1)  # as each party does: else the comparison is not one
        with written_out():
            app(arguments, prog_name="mpcache")  # also as `python -m mpcache`
    except (MpcacheError, OSError) as error:
        ignore_signals()
        told = told_as(error)
        terminal.say(f"error: {told}")
        sys.exit(told.exit_code)
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
