"""Measure a private answer of a model of SmolLM2-135M's size: the tables of docs/benchmarks.md.

    python tools/bench_size.py [--context 99] [--question 14] [--tokens 6] [--model DIR] [--layers 30]
                               [--checkout DIR ...]
    python tools/bench_size.py --private 128,512 [--private-policy SPEC ...]

Without --model the weights are random and made on the fly, so that nothing is downloaded; the plaintext
answer is measured beside, in the same run. --context 0: no document. Prints a Markdown row for this state,
and for each other checkout of this project: latencies, their ratio, bytes of a token, and each party's CPU
seconds and largest resident memory, set-up included. With --private a row for each length of a document of
the client's own and each rule by which it is evicted. Linux, as it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
    "| state | context | question | plaintext ms/token | private ms/token | ratio | first token, s "
    "| set-up, s | online, dealer's MB/token | CPU s, server, client, dealer | memory GB, the same |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)

PRIVATE_HEAD = (
    "| own tokens, kept | chunks | reading, plaintext s | private s | ratio | rounds | online, dealer's MB "
    "| eviction, s | rounds | online, dealer's MB | token, plaintext ms | private ms | ratio "
    "| online, dealer's MB | same tokens | CPU s, server, client, dealer | memory GB, the same |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


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


def environment_of(checkout: Path | None) -> dict[str, str]:
    """Return the environment in which Python imports this state, or another checkout's."""
    if checkout is None:
        return dict(os.environ)
    roots = [checkout.resolve() / name for name in ("", "parties", "kernels", "protos")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}


def program_of(checkout: Path | None) -> list[str]:
    """Return Python's arguments for `mpcache`: an early state has no `python -m mpcache`."""
    if checkout is not None and not (checkout / "mpcache/__main__.py").is_file():
        return ["-c", "from mpcache.cli import main; raise SystemExit(main())"]
    return ["-m", "mpcache"]


def answer(
    model: Path, given: argparse.Namespace, checkout: Path | None, texts: dict[str, int], *flags: str
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Run one answer; return its account, and each party's CPU seconds and memory in GB.

    texts: flags that name a document, with its tokens.
    """
    tokenizer = load_tokenizer(model)
    peak: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, *program_of(checkout), "generate", "--json", "--no-stop-at-eos", *flags]
        command += ["--model", str(model), "--policy", given.policy]
        for flag, tokens in texts.items():
            document = Path(folder) / f"{flag.strip('-')}.txt"
            document.write_text(text_of(tokenizer, tokens), encoding="utf-8")
            command += [flag, str(document)]
        command += ["--question", text_of(tokenizer, given.question), "--max-new-tokens", str(given.tokens)]
        with out.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, text=True, env=environment_of(checkout), cwd=folder
            )
            watch(process, peak, cpu)
        if process.returncode:
            raise SystemExit(f"bench_size: `mpcache generate` ended with {process.returncode}")
        return json.loads(out.read_text()), cpu, peak


def measure_private(model: Path, given: argparse.Namespace, tokens: int, rule: str) -> str:
    """Run one answer about a document of the client's own, and return its row."""
    found, cpu, peak = answer(model, given, None, {"--private-context": tokens}, "--private-policy", rule)
    private, plain, own = found["private"], found["plaintext"], found["client_document"]
    reading, eviction = own["reading"], own["eviction"]
    token, plain_token = private["ms_per_token_median"], plain["ms_per_token_median"]
    same = sum(a == b for a, b in zip(found["token_ids"], found["plaintext_token_ids"], strict=True))

    def sizes(part: dict[str, Any], more: str = "") -> str:
        return f"{part[f'online_bytes{more}'] / 1e6:.2f}, {part[f'offline_bytes{more}'] / 1e6:.1f}"

    evicted = (
        "| | "
        if eviction is None
        else (f"{eviction['ms'] / 1e3:.1f} | {eviction['rounds']} | {sizes(eviction)}")
    )
    return (
        f"| {own['tokens']}, {own['kept']} | {own['chunks']} | {plain['prefill_ms'] / 1e3:.2f} "
        f"| {reading['ms'] / 1e3:.1f} | {reading['ms'] / plain['prefill_ms']:.0f} "
        f"| {reading['rounds']} | {sizes(reading)} | {evicted} "
        f"| {plain_token:.0f} | {token:.0f} | {token / plain_token:.1f} | {sizes(private, '_per_token')} "
        f"| {same} of {len(found['token_ids'])} "
        f"| {', '.join(f'{cpu[name]:.1f}' for name in PARTIES)} "
        f"| {', '.join(f'{peak[name]:.1f}' for name in PARTIES)} |"
    )


def measure(model: Path, given: argparse.Namespace, checkout: Path | None) -> str:
    """Run one answer, and return its row."""
    texts = {"--context": given.context} if given.context else {}
    found, cpu, peak = answer(model, given, checkout, texts)
    private, plain = found["private"], found["plaintext"]
    ratio = private["ms_per_token_median"] / plain["ms_per_token_median"]
    return (
        f"| {'this' if checkout is None else checkout.name} "
        f"| {found['context_tokens']} | {found['question_tokens']} | {plain['ms_per_token_median']:.0f} "
        f"| {private['ms_per_token_median']:.0f} | {ratio:.1f} | {private['first_token_ms'] / 1e3:.1f} "
        f"| {found['setup_ms'] / 1e3:.0f} "
        f"| {private['online_bytes_per_token'] / 1e6:.2f}, {private['offline_bytes_per_token'] / 1e6:.1f} "
        f"| {', '.join(f'{cpu[name]:.1f}' for name in PARTIES)} "
        f"| {', '.join(f'{peak[name]:.1f}' for name in PARTIES)} |"
    )


def main() -> None:
    """Print the table's head and a row."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--context", type=int, default=99)
    arguments.add_argument("--question", type=int, default=14)
    arguments.add_argument("--tokens", type=int, default=6)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--policy", default="full")
    arguments.add_argument("--private", help="tokens of a document of the client's own, as in 128,512")
    arguments.add_argument("--private-policy", action="append", help="[full, mpcache:n_keep=0.25]")
    arguments.add_argument("--checkout", type=Path, action="append", default=[])
    given = arguments.parse_args()
    print(PRIVATE_HEAD if given.private else HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            make_model(model := Path(folder), given.layers)
        model = model.resolve()
        if given.private:
            rules = given.private_policy or ["full", "mpcache:n_keep=0.25"]
            for tokens, rule in product(map(int, given.private.split(",")), rules):
                print(measure_private(model, given, tokens, rule), flush=True)
            return
        for checkout in (None, *given.checkout):
            print(measure(model, given, checkout), flush=True)


if __name__ == "__main__":
    main()
