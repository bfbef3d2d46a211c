"""Put the exact figures of README.md and docs/ where the pages show them; with --check, only compare.

    python -m tools.figures [--check]

A page shows figures between `<!-- figures: NAME -->` and `<!-- figures end -->`. Rounds and bytes come from
the cost reading (`mpcache audit`, tools/layer_cost.py), which equals a real run's ledger to the byte. A line
of a block that is not computed here (another system's, a measured time) stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from mpcache.audit.private_rows import price_document
from mpcache.cli import app
from mpcache.config import PublicConfig
from mpcache.cost.sizing import sizing
from mpcache.demo import DEMO_DOCUMENT
from mpcache.ledger import Entry
from mpcache.model import demo_model_dir, load_model, load_shape, load_tokenizer
from mpcache.model.shapes import config_of
from mpcache.policy import parse_policy
from mpcache.report.units import duration, number, size
from mpcache.transport.network import NO_NETWORK, parse_network
from tools.layer_cost import PAPER, SHAPE, layers

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- figures end -->", re.S)
DEFAULT = "compact"  # of a model that has a curve
OTHER = "mpcache:score=bound,share=none"
ANSWER = 6  # tokens of `make demo`
Line = tuple[str, str]  # what a line begins with, and what it is


@cache
def audited(*arguments: str) -> list[dict[str, Any]]:
    """Run and return the rows of `mpcache audit ... --json`."""
    done = CliRunner().invoke(app, ["audit", *arguments, "--json"], catch_exceptions=False)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def priced(shape: str, context: int, policy: str, protocol: str = "fast") -> dict[str, Any]:
    """Price one generated token, with the audit's own question; times on `wan`."""
    policies = ("full", DEFAULT, OTHER, "snapkv") if shape == "demo" else ("full", "mpcache")
    given = [part for name in policies for part in ("--policy", name)]
    protocols = "fast,fast-bits" if shape == "demo" else "fast"
    rows = audited(
        "--shape", shape, "--context", str(context), "--network", "wan", "--protocol", protocols, *given
    )
    (row,) = (row for row in rows if (row["policy"], row["protocol"]) == (policy, protocol))
    return row


def cells(label: str, *rest: object) -> Line:
    """Return a row of a Markdown table."""
    return f"| {label} |", f"| {label} | " + " | ".join(map(str, rest)) + " |"


def with_heads(context: int) -> str:
    """Return the default policy with the counts that the demo model's curve gives its heads."""
    model = load_model(demo_model_dir())
    bound = parse_policy(DEFAULT).bind(context, model.shape)
    return bound.with_counts(bound.count_from_model(model), model.shape).spec


def demo() -> Iterator[Line]:
    """Yield the exact rows of the cost card of `make demo`."""
    tokenizer = load_tokenizer(demo_model_dir())
    context = len(tokenizer.encode(DEMO_DOCUMENT.read_text(encoding="utf-8"), bos=True))
    question = DEMO_DOCUMENT.with_name("question.txt").read_text(encoding="utf-8")
    (row,) = audited(
        "--shape", "demo", "--context", str(context), "--policy", with_heads(context), "--network", "none",
        "--question", str(len(tokenizer.encode(question, bos=False))), "--new-tokens", str(ANSWER),
        "--protocol", PublicConfig().protocol,
    )  # fmt: skip
    yield "Cost card: ", f"Cost card: policy {DEFAULT}, protocol {row['protocol']}"
    shown: Mapping[str, str] = {
        "rounds per token": str(row["rounds_per_token"]),
        "online bytes per token and party": size(row["online_bytes_per_token"]),
        "offline bytes per token (dealer)": size(row["offline_bytes_per_token"]),
        "context transfer (once per document)": size(row["context_bytes"]),
    }
    for name, value in shown.items():
        yield f"│ {name:<36} │", f"│ {name:<36} │ {value:>15} │ {'':>10} │"


@cache
def steps(spec: str, context: int, protocol: str = "fast") -> list[dict[str, Entry]]:
    """Count a decode step, by layer and operation. CrypTen's layers are all alike: one is enough."""
    shape = replace(SHAPE, layers=1) if protocol == "stock" else SHAPE
    return layers(spec, context, protocol, shape)


def one_layer(spec: str, index: int, context: int = 1024, protocol: str = "fast") -> Entry:
    """Count rounds and bytes of a layer's decode step."""
    total = Entry()
    for entry in steps(spec, context, protocol)[index].values():
        total += entry
    return total


def online(cost: Entry) -> float:
    """Return the bytes that a party sends, the mean of both."""
    return (cost.sent + cost.received) / 2


def layer() -> Iterator[Line]:
    """One decoder layer at 1024 tokens."""
    for label, spec, index, protocol, digits in (
        ("mpcache `fast`, full cache", "full", 0, "fast", 3),
        ("mpcache `fast-bits`, full cache", "full", 0, "fast-bits", 3),
        ("mpcache `fast`, MPCache selection", PAPER, 0, "fast", 3),
        ("mpcache `fast`, a layer that uses its neighbour's selection", PAPER, 3, "fast", 3),
        ("CrypTen 0.4.1 (`stock`), full cache", "full", 0, "stock", 1),
    ):
        cost = one_layer(spec, index, protocol=protocol)
        yield cells(label, cost.rounds, f"{online(cost) / 1e6:.{digits}f} MB")


def lengths() -> Iterator[Line]:
    """One decoder layer of `fast` at three lengths."""
    for label, spec, index in (
        ("mpcache fast | full cache", "full", 0),
        ("mpcache fast | mpcache, 32 keep 50 % then 16 keep 20 %", PAPER, 0),
        ("mpcache fast | the same with Quest's bound", f"{PAPER},score=bound", 0),
        ("mpcache fast | a layer whose selection another one uses", PAPER, 2),
        ("mpcache fast | a layer that uses its neighbour's selection", PAPER, 3),
    ):
        found = [one_layer(spec, index, context) for context in (512, 1024, 2048)]
        yield cells(label, *(f"{online(cost) / 1e6:.3f} MB, {cost.rounds} rounds" for cost in found))


def models() -> Iterator[Line]:
    """Yield a generated token with the full cache, for each model."""
    for label, shape, context in (
        ("demo (1.26 M parameters)", "demo", 880), ("Llama-2-7B", "llama-2-7b", 2048)
    ):  # fmt: skip
        row = priced(shape, context, "full")
        online, offline = size(row["online_bytes_per_token"]), size(row["offline_bytes_per_token"])
        seconds = f"{row['total_ms_per_token'] / 1000:.1f} s"
        yield cells(label, context, row["rounds_per_token"], online, offline, seconds)


def dealer() -> Iterator[Line]:
    """Yield what the dealer sends beside what the parties send."""
    for label, shape, context, policy, protocol in (
        ("demo | 880 | snapkv", "demo", 880, "snapkv", "fast"),
        ("demo | 880 | full", "demo", 880, "full", "fast"),
        (f"demo | 880 | {DEFAULT}", "demo", 880, DEFAULT, "fast"),
        (f"demo | 880 | {OTHER}", "demo", 880, OTHER, "fast"),
        (f"demo | 880 | {OTHER}, `fast-bits`", "demo", 880, OTHER, "fast-bits"),
        ("Llama-2-7B | 2048 | full", "llama-2-7b", 2048, "full", "fast"),
        ("Llama-2-7B | 2048 | mpcache", "llama-2-7b", 2048, "mpcache", "fast"),
    ):
        row = priced(shape, context, policy, protocol)
        yield cells(label, size(row["online_bytes_per_token"]), size(row["offline_bytes_per_token"]))


def sizes() -> Iterator[Line]:
    """Yield what each party's machine needs, by model."""
    for name in ("smollm2-135m", "gpt2", "llama-2-7b", "llama-2-70b"):
        row = sizing(load_shape(config_of(name)), "full", 1000)
        amounts = [*row["memory_bytes"].values(), row["session_bytes"], row["dealer_disk_bytes"]]
        amounts += [row["dealer_token_bytes"], row["online_token_bytes"]]
        yield cells(name, *map(size, amounts))


def saved(shape: str, context: int, policy: str, network: str = "lan") -> tuple[dict[str, Any], list[str]]:
    """Price a policy; and write how many times less of bytes, online bytes, time and context it takes."""
    full, row = audited(
        "--shape", shape, "--context", str(context), "--network", network, "--policy", "full",
        "--policy", policy,
    )  # fmt: skip
    every = [2 * one["online_bytes_per_token"] + one["offline_bytes_per_token"] for one in (full, row)]
    parts = [every[0] / every[1]]
    parts += [
        full[name] / row[name] for name in ("online_bytes_per_token", "total_ms_per_token", "context_bytes")
    ]
    return row, [f"{part:.2f}" for part in parts]


def published() -> Iterator[Line]:
    """Yield what MPCache saves of a token of Llama-2-7B, at several lengths."""
    settings = {
        "`mpcache:n_keep=0.3`": ("mpcache:n_keep=0.3", (512, 1024, 2048, 4096)),
        "`mpcache` (n_keep=0.75)": ("mpcache", (512, 1024, 2048, 4096)),
        "`mpcache:share=none`": ("mpcache:share=none", (2048,)),
    }
    for label, (policy, contexts) in settings.items():
        for context in contexts:
            row, (every, online, lan, _) = saved("llama-2-7b", context, policy)
            wan = saved("llama-2-7b", context, policy, "wan")[1][2]
            yield cells(f"{label}, {context}", row["attended_tokens"], every, online, lan, wan)


def systems() -> Iterator[Line]:
    """Yield what other systems save where their papers name a figure."""
    for policy, name, shape, context in (
        ("snapkv:cap=2048", "Mistral-7B", "mistral-7b", 16384),
        ("pod:lend=keys", "Llama-3-8B", "llama-3-8b", 32768),
        ("pod:lend=weights", "Llama-3-8B", "llama-3-8b", 32768),
    ):
        yield cells(f"`{policy}`, {name}, {context}", *saved(shape, context, policy)[1])


def own_documents() -> Iterator[Line]:
    """Yield what a document of the client's takes, evicted to a quarter, and a token of an answer then."""
    for label, name, tokens in (
        ("GPT-2", "gpt2", (128, 256, 512)),
        ("SmolLM2-135M", "smollm2-135m", (128, 512, 2048)),
        ("Llama-2-7B", "llama-2-7b", (128, 512, 2048)),
    ):
        shape, lan = load_shape(config_of(name)), parse_network("lan") or NO_NETWORK
        for row in price_document(shape, tokens, ["mpcache:n_keep=0.25"], ["fast"], [lan], 16):
            reading, *others = (row[part] for part in ("reading", "eviction", "token_with_all", "token"))
            amounts = [row["chunk_tokens"], *amounts_of(reading), duration(reading["modelled_ms"])]
            amounts += [", ".join(amounts_of(part)) for part in others]
            pays = (row[f"pays_from_tokens_by_{way}"] for way in ("bytes", "time"))
            yield cells(f"{label}, {row['private_tokens']}", *amounts, *pays)


def amounts_of(part: Mapping[str, Any]) -> list[str]:
    """Write rounds, a party's bytes and the dealer's."""
    return [number(part["rounds"]), size(part["online_bytes"]), size(part["offline_bytes"])]


FIGURES: Mapping[str, Mapping[str, Callable[[], Iterator[Line]]]] = {
    "README.md": {"demo": demo, "layer": layer, "models": models},
    "docs/audit.md": {"own_documents": own_documents},
    "docs/benchmarks.md": {"lengths": lengths},
    "docs/deploy.md": {"sizing": sizes},
    "docs/limits.md": {"dealer": dealer},
    "docs/reproducing.md": {"mpcache": published, "systems": systems},
}


def updated(text: str, blocks: Mapping[str, Callable[[], Iterator[Line]]]) -> str:
    """Return a page with today's figures. Raises ValueError where a block, or a line of one, is not there."""
    there = {name for name, _ in BLOCK.findall(text)}
    if there != set(blocks):
        raise ValueError(f"blocks {sorted(there)} are there, {sorted(blocks)} are computed")

    def put(match: re.Match[str]) -> str:
        block = match[0]
        for start, line in blocks[match[1]]():
            block, found = re.subn(rf"^{re.escape(start)}.*$", lambda _: line, block, flags=re.M)  # noqa: B023
            if found != 1:
                raise ValueError(f"block {match[1]} has {found} lines that begin with {start!r}")
        return block

    return BLOCK.sub(put, text)


def main() -> None:
    """Bring the pages' figures up to date, or with --check say which are not."""
    torch.set_num_threads(1)
    stale = []
    for name, blocks in FIGURES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        new = updated(text, blocks)
        if new == text:
            continue
        pairs = zip(text.splitlines(), new.splitlines(), strict=True)
        stale += [f"{name}: {old!r} is now {line!r}" for old, line in pairs if old != line]
        if "--check" not in sys.argv[1:]:
            page.write_text(new, encoding="utf-8")
    if stale:
        print("\n".join(stale))
    if stale and "--check" in sys.argv[1:]:
        sys.exit("figures are not what the tools say; run `make docs` and commit the pages")


if __name__ == "__main__":
    main()
