"""The command line itself: what it says of itself before any party starts."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.choices import Reveal
from mpcache.config import PublicConfig
from mpcache.errors import BadInput
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache_parties.main import app
from mpcache_parties.operations.output import Output
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.private_inputs import DeclaredTurns


def test_it_says_its_version_and_completes_in_a_shell() -> None:
    run = CliRunner()
    told = run.invoke(app, ["--version"])
    assert told.exit_code == 0 and told.output == f"mpcache-party {version('mpcache')}\n"
    shown = run.invoke(app, ["--help"]).output
    assert "--install-completion" in shown and "--show-completion" in shown


def test_what_all_agree_on_has_a_flag_of_each_command() -> None:
    """As the threat model's `--reveal token`: a party takes what `mpcache generate` takes."""
    settings = PartyOptions(Rank.CLIENT, reveal="token", network="10:50").settings().public
    assert (settings.reveal, settings.network) == (Reveal.TOKEN, "10:50")
    shown = CliRunner().invoke(app, ["--help"]).output
    for flag in ("--reveal", "--network", "--policy", "--protocol", "--max-new-tokens"):
        assert flag in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PartyOptions(Rank.CLIENT, serve=True), "--serve belongs to the server and the dealer"),
        (PartyOptions(Rank.SERVER, serve=True, resume=True), "--resume is said by the client"),
        (PartyOptions(Rank.SERVER, sessions=2), "give --serve, too"),
        (PartyOptions(Rank.DEALER, seed=1), r"--seed belongs to the client \(--rank 1\), this is the dealer"),
        (PartyOptions(Rank.CLIENT, top_p=0.5, question="x"), None),
    ],
)
def test_flags_that_do_not_go_together_are_told(options: PartyOptions, words: str | None) -> None:
    if words is None:
        options.check()
        return
    with pytest.raises(BadInput, match=words):
        options.check()


def test_tapes_are_prepared_for_the_clients_document_too(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("the gate of the city")
    options = PartyOptions(Rank.CLIENT, context=own, turns="14,9", prepare_tokens=3)
    options.check()
    given = options.private_input(Sampling(), PublicConfig(), Output(events=False))
    assert given == DeclaredTurns((14, 9), "the gate of the city")
