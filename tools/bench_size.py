"""Measure private answers of a model of SmolLM2-135M's size: the tables of docs/benchmarks.md.

    python tools/bench_size.py [--context 99] [--question 14] [--tokens 6] [--model DIR] [--layers 30]
                               [--policy SPEC ...] [--protocol P ...] [--repeat N] [--checkout DIR ...]

Without --model the weights are random and made on the fly, so that nothing is downloaded; the plaintext
answer is measured beside, in the same run. --context 0: no document; --text FILE: this one. Prints a Markdown
row for each policy and protocol of this state, and of each other checkout of this project: latencies, their
ratios, rounds and bytes of a token, each party's CPU seconds and largest resident memory, set-up included.
With --repeat the rows take turns, and latencies are medians. Linux, as it reads /proc.

Full against evicted, side by side; once before, `mpcache calibrate --model MODEL` makes the curve and puts it
beside the model (--curve FILE: it is elsewhere):

    python tools/bench_size.py --model MODEL --text FILE --tokens 6 --repeat 2
        --policy full --policy compact:keep=0.2 --policy compact:keep=0.1

Random weights have no curve: take compact:counts=joint there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mpcache.demo import DEMO
from mpcache.model import load_tokenizer

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PARTIES = ("server", "client", "dealer")
HEAD = (
    "| state | policy | protocol | context | kept | question | plaintext ms/token | private ms/token | ratio "
    "| of the first row's | first token, s | prefill and eviction, s | set-up, s | rounds/token "
    "| online, dealer's MB/token | CPU s, server, client, dealer | memory GB, the same |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Row:
    """One policy and protocol of one state, and what its runs found. protocol: None is the default."""

    policy: str
    checkout: Path | None
    protocol: str | None
    found: list[dict[str, Any]] = field(default_factory=list)  # `mpcache generate --json`
    peak: dict[str, float] = field(default_factory=dict)  # GB, of each party
    cpu: dict[str, float] = field(default_factory=dict)  # s, in the last run

    def median(self, *keys: str) -> float:
        """Return the median of one figure over the runs."""
        values: list[Any] = list(self.found)
        for key in keys:
            values = [value[key] for value in values]
        return float(statistics.median(values))

    def markdown(self, first: Row) -> str:
        """Return it as a row of the table."""
        last, private = self.found[-1], self.found[-1]["private"]
        plain_ms = self.median("plaintext", "ms_per_token_median")
        ms = self.median("private", "ms_per_token_median")
        cells = [
            "this" if self.checkout is None else self.checkout.name,
            f"`{self.policy}`".replace("|", "\\|"),
            last["protocol"],
            last["context_tokens"],
            f"{statistics.fmean(last['kept_tokens']):.0f}",
            last["question_tokens"],
            f"{plain_ms:.0f}",
            f"{ms:.0f}",
            f"{ms / plain_ms:.1f}",
            f"{ms / first.median('private', 'ms_per_token_median'):.2f}",
            f"{self.median('private', 'first_token_ms') / 1e3:.1f}",
            f"{self.median('prefill_ms') / 1e3:.1f}",
            f"{self.median('setup_ms') / 1e3:.0f}",
            private["rounds_per_token"],
            f"{private['online_bytes_per_token'] / 1e6:.2f}, {private['offline_bytes_per_token'] / 1e6:.1f}",
            ", ".join(f"{self.cpu[name]:.1f}" for name in PARTIES),
            ", ".join(f"{self.peak[name]:.1f}" for name in PARTIES),
        ]
        return f"| {' | '.join(map(str, cells))} |"


def make_model(folder: Path, layers: int) -> None:
    """Write a model of that shape with random weights and the demo's tokenizer."""
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (DEMO / "model" / name).is_file():
            shutil.copy(DEMO / "model" / name, folder / name)
    torch.manual_seed(0)
    width, ffn, kv = 576, 1536, 3 * 64
    tensors = {
        "model.embed_tokens.weight": torch.randn(49152, width) * 0.1,
        "model.norm.weight": torch.ones(width),
    }
    sizes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    for i in range(layers):
        for name, size in sizes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(size) * 0.03
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(width)
    save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / "model.safetensors")


def text_of(tokenizer: Any, tokens: int) -> str:
    """Return a text of so many tokens, or one or two more."""
    words = "the river runs past the old mill and the road turns to the sea by a house of stone "
    text = ""
    for word in (words * tokens).split():
        if len(tokenizer.encode(text, bos=False)) >= tokens:
            break
        text += f" {word}" if text else word
    return text


def watch(process: subprocess.Popen[str], peak: dict[str, float], cpu: dict[str, float]) -> None:
    """Note the parties' largest memory, in GB, and CPU seconds until the process ends."""
    while process.poll() is None:
        for child in Path(f"/proc/{process.pid}/task").glob("*/children"):
            for number in child.read_text().split():
                try:
                    words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
                    status = Path(f"/proc/{number}/status").read_text()
                    times = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[11:13]
                except OSError:
                    continue
                if "--rank" not in words or "VmHWM:" not in status:
                    continue
                name = PARTIES[int(words[words.index("--rank") + 1])]
                peak[name] = int(status.partition("VmHWM:")[2].split()[0]) / 1e6
                cpu[name] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.1)


def environment_of(checkout: Path | None, data: Path | None) -> dict[str, str]:
    """Return the environment in which Python imports this state, or another checkout's.

    data: where the curve is looked for, in place of the user's folder.
    """
    found = dict(os.environ)
    if data is not None:
        found["XDG_DATA_HOME"] = str(data)
    if checkout is not None:
        roots = [checkout.resolve() / name for name in ("", "parties", "kernels", "protos")]
        found["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    return found


def place_curve(curve: Path, data: Path) -> None:
    """Put a curve where `compact` looks for its model's."""
    digest = json.loads(curve.read_text(encoding="utf-8"))["model_digest"]
    folder = data / "mpcache" / "curves"
    folder.mkdir(parents=True)
    shutil.copy(curve, folder / f"{digest}.json")


def program_of(checkout: Path | None) -> list[str]:
    """Return Python's arguments for `mpcache`: an early state has no `python -m mpcache`."""
    if checkout is not None and not (checkout / "mpcache/__main__.py").is_file():
        return ["-c", "from mpcache.cli import main; raise SystemExit(main())"]
    return ["-m", "mpcache"]


@dataclass
class Answered:
    """What a run of `mpcache generate --json` said, and each party's memory (GB) and CPU time (s)."""

    found: dict[str, Any]
    peak: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)


def run_generate(
    model: Path, given: argparse.Namespace, documents: Mapping[str, str], *flags: str,
    checkout: Path | None = None, data: Path | None = None,
) -> Answered:  # fmt: skip
    """Ask the flags' question. documents: texts, by the flag that names each one's file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, *program_of(checkout), "generate", "--json", "--no-stop-at-eos", *flags]
        for flag, text in documents.items():
            document = Path(folder) / f"{flag.strip('-')}.txt"
            document.write_text(text, encoding="utf-8")
            command += [flag, str(document)]
        question = text_of(load_tokenizer(model), given.question)
        command += ["--model", str(model), "--question", question, "--max-new-tokens", str(given.tokens)]
        answered = Answered({})
        with out.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, text=True, env=environment_of(checkout, data), cwd=folder
            )
            watch(process, answered.peak, answered.cpu)
        if process.returncode:
            raise SystemExit(f"{Path(sys.argv[0]).stem}: `mpcache generate` ended with {process.returncode}")
        answered.found = json.loads(out.read_text())
    return answered


def measure(row: Row, model: Path, given: argparse.Namespace, document: str, data: Path | None) -> None:
    """Run one answer of a row."""
    documents = {"--context": document} if document else {}
    flags = ["--policy", row.policy, *(["--protocol", row.protocol] if row.protocol else [])]
    answered = run_generate(model, given, documents, *flags, checkout=row.checkout, data=data)
    row.found.append(answered.found)
    row.cpu = answered.cpu
    row.peak |= {name: max(gb, row.peak.get(name, 0.0)) for name, gb in answered.peak.items()}


def read_flags() -> argparse.Namespace:
    """Read the command line."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", type=Path, help="a folder or a .gguf file [random weights]")
    arguments.add_argument("--context", type=int, default=99, help="tokens of a made document [99]")
    arguments.add_argument("--text", type=Path, help="a document, in place of --context")
    arguments.add_argument("--question", type=int, default=14, help="tokens of the question [14]")
    arguments.add_argument("--tokens", type=int, default=6, help="of each answer [6]")
    arguments.add_argument("--layers", type=int, default=30, help="of random weights [30]")
    arguments.add_argument("--policy", action="append", help="again for more, side by side [full]")
    arguments.add_argument("--protocol", action="append", help="likewise")
    arguments.add_argument("--curve", type=Path, help="the model's, as `mpcache calibrate --out` wrote it")
    arguments.add_argument("--repeat", type=int, default=1, help="answers of each row, in turns [1]")
    arguments.add_argument("--checkout", type=Path, action="append", default=[], help="a further state")
    return arguments.parse_args()


def main() -> None:
    """Print the table's head and its rows."""
    given = read_flags()
    with tempfile.TemporaryDirectory() as folder:
        model, data = given.model, None
        if model is None:
            make_model(model := Path(folder), given.layers)
        if given.curve is not None:
            place_curve(given.curve, data := Path(folder) / "data")
        model = model.resolve()
        if given.text is None:
            document = text_of(load_tokenizer(model), given.context) if given.context else ""
        else:
            document = given.text.read_text(encoding="utf-8")
        checkouts = (None, *given.checkout)
        settings = product(checkouts, given.protocol or [None], given.policy or ["full"])
        rows = [Row(policy, checkout, protocol) for checkout, protocol, policy in settings]
        for run in range(given.repeat):
            for row in rows:
                print(f"run {run + 1} of {given.repeat}: {row.policy}", file=sys.stderr, flush=True)
                measure(row, model, given, document, data)
    print(HEAD)
    for row in rows:
        print(row.markdown(rows[0]))


if __name__ == "__main__":
    main()
