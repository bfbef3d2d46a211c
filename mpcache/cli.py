"""`mpcache`: private answers on this machine, and what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mpcache.answer import PlainAnswer, left_range, plain_answer
from mpcache.audit.audit_command import audit
from mpcache.chat_command import chat_here
from mpcache.check.check_command import check
from mpcache.choices import POLICY_AUTO, ChatForm
from mpcache.config import PublicConfig, Settings, load_settings, with_overrides
from mpcache.console import terminal
from mpcache.console.inputs import check_stdin, read_context, read_question, read_text
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
    read_stops,
    version_option,
)
from mpcache.console.signals import ignore_signals, stop_on_signals
from mpcache.console.streams import open_streams, written_out
from mpcache.cost.planner import with_planned_policy
from mpcache.cost.reading import reading_plan
from mpcache.errors import BadInput, MpcacheError, told_as
from mpcache.evaluate.calibrate_command import calibrate_model
from mpcache.evaluate.eval_command import evaluate
from mpcache.limits import bind_policy, with_default_policy
from mpcache.model import ModelShape, demo_model_dir, find_model, load_model, load_shape, load_tokenizer
from mpcache.model.framing import Framing, make_framing
from mpcache.pack_command import pack_document
from mpcache.padding import padded_length
from mpcache.policies_command import policies
from mpcache.policy import BoundPolicy
from mpcache.rank import Rank
from mpcache.report.account import summary
from mpcache.report.tables import card, comparison
from mpcache.sampling import Sampling
from mpcache.serve_command import serve_here
from mpcache_parties.launch import PartyFailed, run_parties, setup_flags
from mpcache_parties.packing import OpenedPack, check_pack, with_pack_settings
from mpcache_parties.state.packs import bind_packed

COMPARE_TOKENS = 8  # answered in each run of `compare` unless told otherwise

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = terminal.stdout()
STARTING = "starting the parties ..."


@dataclass(frozen=True)
class Inquiry:
    """What is asked of whom. context, own, question: token ids, with what frames the texts.

    own: the client's document.

    named: --model; None: the demo's.  packed: the document, where it was packed: then context is empty.
    """

    named: str | None
    model: Path
    context_text: str | None
    private_text: str | None
    question_text: str
    shape: ModelShape
    framing: Framing
    context: list[int]
    own: list[int]
    question: list[int]
    sampling: Sampling
    stop_at_eos: bool
    stop_texts: tuple[str, ...]
    packed: OpenedPack | None = None

    @staticmethod
    def read(
        model: str | None,
        context: Path | None,
        packed: OpenedPack | None,
        private_context: Path | None,
        question: str | None,
        question_file: Path | None,
        sampling: Sampling,
        stop_at_eos: bool,
        stop: Sequence[str] | None,
        public: PublicConfig,
    ) -> Inquiry:
        """Read everything but the weights; raises BadInput before any process is started."""
        check_stdin(context, private_context, question_file)
        question_text = read_question(question, question_file)
        path = demo_model_dir() if model is None else find_model(model)
        shape, tokenizer = load_shape(path), load_tokenizer(path)
        stops = read_stops(stop, stop_at_eos)
        text = read_context(model, context) if packed is None else None  # once: it may be a pipe
        written = text is not None if packed is None else packed.pack.written
        framing = make_framing(tokenizer, shape, public.chat is ChatForm.RAW, public.document_as, written)
        document: list[int] = []
        if packed is None:
            document = framing.frame_document(text)
        else:
            check_pack(packed.pack, packed.file, tokenizer, public)
            bind_packed(packed.pack.context, shape, packed.file)
        private = None if private_context is None else read_text(private_context)
        own = [] if private is None else framing.frame_private(private)
        asked = framing.frame_turn(question_text, True, private)
        return Inquiry(
            model, path, text, private, question_text, shape, framing, document, own, asked, sampling,
            stop_at_eos, stops, packed,
        )  # fmt: skip

    def bind(self, public: PublicConfig) -> BoundPolicy:
        self.sampling.check(public.reveal)
        length = len(self.context)
        if self.packed is not None:
            check_pack(self.packed.pack, self.packed.file, self.framing.tokenizer, public)
            length = self.packed.pack.context.length
        asked = padded_length(len(self.question), public.length_grid)
        return bind_policy(self.shape, public, length, asked, private=len(self.own))

    def planned(self, settings: Settings) -> Settings:
        """Put what policy `auto` stands for here into settings, and say it."""
        if settings.public.policy != POLICY_AUTO:
            return settings
        model = load_model(self.model)
        settings, why = with_planned_policy(settings, model, len(self.context), len(self.question))
        terminal.say(why)
        return settings

    def private(
        self,
        settings: Settings,
        say: Callable[[str], None],
        on_token: Callable[[int, str], None],
        every: Sequence[str] = (),
        setup_dir: Path | None = None,
    ) -> dict[Rank, Any]:
        """Run three processes, and return their reports. every: flags that all of them get."""
        sampling = self.sampling
        flags = {
            Rank.SERVER: [
                *([] if self.named is None else ["--model", str(self.model)]),
                *([] if self.packed is None else self.packed.flags()),
            ],
            Rank.CLIENT: [
                f"--temperature={sampling.temperature}",
                f"--top-p={sampling.top_p}",
                f"--seed={sampling.seed}",
                "--stop-at-eos" if self.stop_at_eos else "--no-stop-at-eos",
                *(f"--stop={text}" for text in self.stop_texts),
            ],
        }
        kept = setup_flags(setup_dir)
        flags = {rank: [*flags.get(rank, ()), *kept.get(rank, ()), *every] for rank in Rank}
        texts = {Rank.CLIENT: self.question_text}
        if self.context_text is not None:
            texts[Rank.SERVER] = self.context_text
        return run_parties(settings, flags, texts, say, on_token, self.private_text)

    def compared(self, public: PublicConfig, leakage: str, reports: dict[Rank, Any]) -> dict[str, Any]:
        """Answer in plaintext, too; return what both took, as `summary` does."""
        plain = self.plain(public)
        run = summary(public.policy, leakage, reports, plain, plain.text)
        return run | {"length_grid": public.length_grid}

    def plain(self, public: PublicConfig) -> PlainAnswer:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stops = self.framing.end_tokens if self.stop_at_eos else ()
        limit, model = public.max_new_tokens, load_model(self.model)
        reading = reading_plan(self.shape, public, len(self.context), len(self.own), public.protocol)
        context = self.context if self.packed is None else self.packed.pack.context
        return plain_answer(
            model, self.bind(public), context, self.question, limit, self.sampling, stops, device,
            self.stop_texts, public.length_grid, self.own, reading,
        )  # fmt: skip


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
    settings = with_default_policy(with_pack_settings(settings, packed), model)
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
    with terminal.progress(STARTING) as (say, hush):
        shown = ""

        def show(token: int, text: str) -> None:
            nonlocal shown
            if as_json or not text:
                return
            hush()
            if shown:
                _write(text)
            else:
                _entry("Private", text)
            shown += text

        try:
            reports = inquiry.private(settings, say, show, [*kept, *["--resume"] * resume], setup_dir)
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
    protocol: Annotated[list[str] | None, typer.Option(help="May be given several times. [fast]")] = None,
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
    agreed = with_default_policy(with_pack_settings(agreed, packed), model)
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
    chosen = [
        inquiry.planned(with_overrides(agreed, public_overrides(one, way, network, max_new_tokens, reveal)))
        for way in protocol or (None,)
        for one in policy or (("full", None) if packed is None else (None,))
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
    out.print(f"[bold]{name:<11}[/]", end="")
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
