"""Train the demo model: a small Llama that recalls facts from a long document.

    python tools/train_demo.py --minutes 90

needs two CPU cores, torch, tokenizers, safetensors, and Debian's `bible-kjv`, whose
public-domain King James text is all the prose there is. Into that text the program strews
lines such as "The gate of Shimei is 4831." and asks for them again; the number cannot be
guessed, so the loss on a repeated number falls only when attention finds the first mention.

Two things make that learnable in an hour on two cores. Every name is one token, so a
question shares exactly one rare token with its fact. And the length grows by skill, not by
the clock: 64 tokens of facts and nothing else until the first digit is right 95 times in a
hundred, then 128, and then documents with prose of 256, 512 and 1024 tokens, each until
recall is back; last come verses to be repeated word for word. The learning rate stays
constant all that while and decays only at the end.

The result is a Hugging Face folder, mpcache/demo/model, with metrics.json beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "mpcache" / "demo"
sys.path.insert(0, str(ROOT))

from mpcache.demo.documents import NOUNS, load_lines, make_document  # noqa: E402

HELD_OUT_BOOKS = ("Ruth", "Est", "Eccl", "Lam", "Jonah", "Jas")
BOS, EOS = "<s>", "</s>"
N_BASE_TOKENS = 1024  # two special tokens, 256 bytes, and the merges learned from the text
N_NAME_TOKENS = 192  # names (and nouns) added whole, so that each is one token


# ---------------------------------------------------------------------------- text


def read_bible() -> tuple[list[str], list[str]]:
    """Read the verses to train on and those of the held-out books, about 30 300 and 780 of them."""
    text = subprocess.run(
        ["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    train: list[str] = []
    held_out: list[str] = []
    for line in text.splitlines():
        reference, verse = line.split(" ", 1)
        book = re.sub(r"\d+:\d+$", "", reference)
        (held_out if book in HELD_OUT_BOOKS else train).append(verse.strip())
    return train, held_out


def build_tokenizer(verses: list[str]) -> tuple[Tokenizer, list[str]]:
    """Learn a byte-level BPE with single digits, and find the names that are one token in it.

    The names are the most frequent proper names that the learned merges leave in pieces.
    Each goes into the vocabulary whole, with its leading space; `ignore_merges` makes the
    encoder look a whole word up there before it merges any bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_BASE_TOKENS,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(verses, trainer)

    words = Counter(re.findall(r"[A-Za-z]+", " ".join(verses)))
    proper = [
        word
        for word, count in words.most_common()
        if re.fullmatch(r"[A-Z][a-z]{3,8}", word) and word.lower() not in words and count >= 5
    ]
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    vocabulary = spec["model"]["vocab"]
    names: list[str] = []
    for word in [*NOUNS, *proper]:
        if "\u0120" + word not in vocabulary and len(vocabulary) < N_BASE_TOKENS + N_NAME_TOKENS:
            vocabulary["\u0120" + word] = len(vocabulary)  # U+0120 stands for a space byte
            if word in proper:
                names.append(word)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    for word in [*NOUNS, *names]:
        assert len(encode(tokenizer, " " + word)) == 1, word
    return tokenizer, sorted(names)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text` without the start token."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


# ---------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Config:
    """The shape of the model, in the words of Hugging Face's LlamaConfig."""

    vocab_size: int = N_BASE_TOKENS + N_NAME_TOKENS
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines, [length, head_dim], each frequency twice: Llama rotates halves."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.arange(length)[:, None] * config.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [batch, heads, length, head_dim] by position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with rotary positions and shared key-value heads."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.groups = c.num_attention_heads // c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """The gated layer after attention."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each after its norm and added to its input."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Token ids [batch, length] to final hidden states [batch, length, hidden_size]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        cos, sin = rope_tables(c, c.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """Named so that its state_dict is a LlamaForCausalLM's with tied embeddings."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.model = Trunk(c)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)  # each block starts as the identity
            elif "embed" in name:
                nn.init.normal_(p, std=0.1)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.embed_tokens.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        """Turn token ids [batch, length] into logits [batch, length, vocab_size]."""
        return self.head(self.model(ids))


# ---------------------------------------------------------------------------- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one.

    torch.optim.Muon works matrix by matrix in bfloat16, which is slow on a CPU; this one
    stacks all matrices of a shape and stays in float32.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                ahead = []
                for p in params:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    ahead.append(p.grad.lerp(buffer, group["momentum"]))
                update = orthogonalize(torch.stack(ahead))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=scale)


def orthogonalize(m: Tensor) -> Tensor:
    """Take five Newton-Schulz steps towards the orthogonal factor of each [rows, columns] matrix."""
    tall = m.shape[-2] > m.shape[-1]
    x: Tensor = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.mT if tall else x


# ---------------------------------------------------------------------------- rows


class Rows:
    """Makes training rows: token ids and the weight of predicting each of them."""

    def __init__(self, tokenizer: Tokenizer, names: list[str], verses: list[str]) -> None:
        self.verses = [encode(tokenizer, verse + "\n") for verse in verses]

        def one(text: str) -> int:
            return encode(tokenizer, text)[0]

        self.bos: int = encode(tokenizer, BOS)[0]
        self.nouns = [one(" " + noun) for noun in NOUNS]
        self.names = [one(" " + name) for name in names]
        self.digits = [one(str(d)) for d in range(10)]
        self.the, self.of, self.is_, self.space, self.stop, self.newline = map(
            one, ("The", " of", " is", " ", ".", "\n")
        )
        self.vocab_size = tokenizer.get_vocab_size()
        self.line_length = 12

    def facts(self, rng: random.Random, n: int) -> list[list[int]]:
        """Make `n` lines of 12 tokens: The gate of Shimei is _ 4 8 3 1 . newline."""
        return [
            [self.the, rng.choice(self.nouns), self.of, name, self.is_, self.space]
            + [rng.choice(self.digits) for _ in range(4)]
            + [self.stop, self.newline]
            for name in rng.sample(self.names, n)
        ]

    # What cannot be predicted has no weight; what can only be recalled has much.
    STATED = [1.0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    ASKED = [0.5, 0, 1, 0, 1, 1, 8, 8, 8, 8, 1, 1]

    @staticmethod
    def again(verse: list[int]) -> list[float]:
        """Return the weights of a repeated verse.

        Its start is free: else all prose is expected to be said again.
        """
        return [0.0 if i < 6 else 2.0 for i in range(len(verse))]

    def dense(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Make nothing but a few facts, stated again and again in a random order."""
        n_lines = length // self.line_length + 1
        facts = self.facts(rng, rng.randint(2, max(2, n_lines // 2)))
        ids, weights, seen = [self.bos], [0.0], set[int]()
        for _ in range(n_lines):
            i = rng.randrange(len(facts))
            ids += facts[i]
            weights += self.ASKED if i in seen else self.STATED
            seen.add(i)
        return ids, weights

    def copy(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Make random tokens and the same tokens again: induction in its purest form."""
        half = rng.randint(length // 4, length // 2)
        tokens = [rng.randrange(self.vocab_size) for _ in range(half)]
        ids = [self.bos] + (tokens * 4)[:length]
        return ids, [0.0] * (half + 2) + [1.0] * (length - half - 1)

    def document(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Make verses with facts among them, then questions; sometimes verses are said again too."""
        most = min(16, length // (3 * self.line_length))
        facts = self.facts(rng, rng.randint(1, most))
        asked = facts * rng.choice((1, 1, 2))
        asked = rng.sample(asked, rng.randint(1, len(asked)))[:most]
        left = length - self.line_length * (len(facts) + len(asked))

        verses: list[list[int]] = []
        again: list[list[int]] = []
        position = rng.randrange(len(self.verses))
        repeat = rng.random() < 0.5
        while left > 0:
            verse = self.verses[position % len(self.verses)]
            position += 1
            if repeat and verses and len(verse) < left // 3:
                again.append(rng.choice(verses))
                left -= len(again[-1])
                repeat = rng.random() < 0.5
                if left <= 0:
                    break
            verses.append(verse[:left] if len(verse) < left else [*verse[: left - 1], self.newline])
            left -= len(verse)

        lines = [(verse, [1.0] * len(verse)) for verse in verses]
        for fact in facts:
            lines.insert(rng.randrange(len(lines) + 1), (fact, self.STATED))
        end = [(fact, self.ASKED) for fact in asked]
        end += [(verse, self.again(verse)) for verse in again]
        rng.shuffle(end)
        ids, weights = [self.bos], [0.0]
        for line, line_weights in lines + end:
            ids += line
            weights += line_weights
        return ids, weights

    def repeat(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Make verses for about half the row, then some of them again word for word."""
        position = rng.randrange(len(self.verses))
        verses: list[list[int]] = []
        ids, weights = [self.bos], [0.0]
        while len(ids) < length // 2:
            verses.append(self.verses[(position + len(verses)) % len(self.verses)])
            ids += verses[-1]
            weights += [1.0] * len(verses[-1])
        while len(ids) <= length:
            verse = rng.choice(verses)
            ids += verse
            weights += self.again(verse)
        return ids, weights

    def batch(
        self, rng: random.Random, kinds: dict[str, float], length: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Make ids and weights, each [rows, length + 1]; `kinds` maps a method to its share."""
        ids, weights = [], []
        for kind in rng.choices(list(kinds), list(kinds.values()), k=rows):
            i, w = getattr(self, kind)(rng, length)
            pad = max(0, length + 1 - len(i))
            ids.append((i + [self.newline] * pad)[: length + 1])
            weights.append((w + [0.0] * pad)[: length + 1])
        return torch.tensor(ids), torch.tensor(weights)


# ---------------------------------------------------------------------------- figures


@torch.no_grad()
def answered(model: Llama, tokenizer: Tokenizer, text: str, asked: list[tuple[str, str]]) -> Tensor:
    """Tell which digits of the answers are the model's first choice, [questions, 4] of bool.

    One forward pass over the text, the questions and the right answers: an answer is exact
    under greedy decoding if and only if each of its digits is right given those before it.
    """
    ids, places = [tokenizer.token_to_id(BOS), *encode(tokenizer, text)], []
    for question, answer in asked:
        ids += encode(tokenizer, question)
        places.append(len(ids) + 1)  # after the space that the answer begins with
        ids += encode(tokenizer, answer + "\n")
    choices = model(torch.tensor([ids]))[0].argmax(-1)
    return torch.stack([choices[p - 1 : p + 3] == torch.tensor(ids[p : p + 4]) for p in places])


def recall(
    model: Llama, tokenizer: Tokenizer, context: int, n_facts: int, n_asked: int,
    documents: int, depth: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure the shares of exact answers and first digits among `documents` unseen documents.

    `context` tokens hold the start token, the document, and `n_asked` questions with answers.
    """
    rng = random.Random(f"{context} {n_facts} {n_asked} {depth}")
    digits = []
    for _ in range(documents):
        text, facts = make_document(
            rng, lambda t: len(encode(tokenizer, t)), context - 1 - 12 * n_asked, n_facts,
            None if depth is None else [depth] * n_facts,
        )  # fmt: skip
        digits.append(answered(model, tokenizer, text, facts[:n_asked]))
    right = torch.cat(digits).float()
    return {
        "exact": round(right.min(1).values.mean().item(), 4),
        "first_digit": round(right[:, 0].mean().item(), 4),
        "answers": len(right),
    }


@torch.no_grad()
def verbatim(model: Llama, tokenizer: Tokenizer, context: int, documents: int) -> float:
    """Measure how well the model repeats a verse.

    Returns the share of tokens that are right when a verse of a document is begun again (8 tokens) and
    goes on.
    """
    rng, right, total = random.Random(context), 0, 0
    while documents:
        text, _ = make_document(rng, lambda t: len(encode(tokenizer, t)), context - 120, 1)
        verse = encode(tokenizer, rng.choice(text.splitlines()) + "\n")
        if not 24 <= len(verse) <= 118:
            continue
        documents -= 1
        ids = [tokenizer.token_to_id(BOS), *encode(tokenizer, text), *verse]
        choices = model(torch.tensor([ids]))[0].argmax(-1)
        n = len(verse) - 8
        right += int((choices[-n - 1 : -1] == torch.tensor(ids[-n:])).sum())
        total += n
    return round(right / total, 4)


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, context: int) -> float:
    """Measure the loss on the held-out books in pieces of `context` tokens, each from a fresh start token."""
    text = "".join(verse + "\n" for verse in load_lines("verses.txt"))
    ids, nats = encode(tokenizer, text), 0.0
    for piece in torch.split(torch.tensor(ids), context - 1):
        inputs = F.pad(piece[:-1], (1, 0), value=tokenizer.token_to_id(BOS))
        nats += F.cross_entropy(model(inputs[None])[0], piece, reduction="sum").item()
    return round(nats / math.log(2) / len(text.encode()), 4)


def measure(model: Llama, tokenizer: Tokenizer) -> dict[str, object]:
    """Measure all figures on unseen documents and the held-out books; a few minutes on two cores."""
    n_facts = 8
    return {
        "recall_8_facts_asked_in_turn_by_context": {
            str(n): recall(model, tokenizer, n, n_facts, n_facts, 50) for n in (256, 512, 768, 1024)
        },
        "recall_8_facts_one_question_by_context": {
            str(n): recall(model, tokenizer, n, n_facts, 1, 200) for n in (256, 512, 1024)
        },
        "recall_at_1024_by_facts_asked_in_turn": {
            str(n): recall(model, tokenizer, 1024, n, n, 200 // n) for n in (1, 2, 4, 8, 12, 16)
        },
        "passkey_at_1024_by_depth": {
            f"{d:.2f}": recall(model, tokenizer, 1024, 1, 1, 50, d) for d in (0, 0.25, 0.5, 0.75, 1)
        },
        "verbatim_token_accuracy_by_context": {
            str(n): verbatim(model, tokenizer, n, 40) for n in (512, 1024)
        },
        "held_out_bits_per_byte": bits_per_byte(model, tokenizer, 1024),
    }


# ---------------------------------------------------------------------------- export


def export(model: Llama, config: Config, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face folder, and a demo document with a question about its middle."""
    folder = DEMO / "model"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().contiguous() for name, t in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        **asdict(config),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "pretraining_tp": 1,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
    })  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    rng = random.Random("demo")
    text, facts = make_document(rng, lambda t: len(encode(tokenizer, t)), 880, 8)
    middle = min(facts, key=lambda fact: abs(text.index(fact[0]) / len(text) - 0.5))
    (DEMO / "document.txt").write_text(text)
    (DEMO / "question.txt").write_text(middle[0])


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stage:
    """A length of row, what rows to make, and the first-digit accuracy that ends the stage."""

    length: int
    kinds: dict[str, float]
    enough: float = 0.95


STAGES = (
    Stage(64, {"dense": 0.8, "copy": 0.2}),
    Stage(128, {"dense": 0.9, "copy": 0.1}),
    Stage(256, {"dense": 0.3, "document": 0.7}),
    Stage(512, {"dense": 0.1, "document": 0.9}),
    Stage(1024, {"document": 1.0}),
    Stage(256, {"document": 0.3, "repeat": 0.7}),
    Stage(1024, {"document": 0.8, "repeat": 0.2}, enough=2.0),  # until the time is over
)


def main() -> None:
    """Train, export, and measure the model; go on from a checkpoint where there is one."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time")
    parser.add_argument("--decay", type=float, default=0.3, help="share of it with falling rate")
    parser.add_argument("--batch", type=int, default=8192, help="tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--muon-decay", type=float, default=0.3, help="keeps activations small")
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mpcache-demo")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    train, held_out = read_bible()
    tokenizer, names = build_tokenizer(train)
    (DEMO / "verses.txt").write_text("".join(verse + "\n" for verse in held_out))
    (DEMO / "names.txt").write_text("".join(name + "\n" for name in names))
    rows = Rows(tokenizer, names, train)
    config = Config(vocab_size=tokenizer.get_vocab_size())
    model = Llama(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_bytes, n_tokens = sum(len(v) + 1 for v in train), sum(map(len, rows.verses))
    print(f"{n_parameters} parameters, {len(names)} names, {n_tokens} tokens of text, "
          f"{n_bytes / n_tokens:.2f} bytes a token", flush=True)  # fmt: skip

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices, lr=args.muon_lr, weight_decay=args.muon_decay)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    trunk = torch.compile(model.model, dynamic=False)

    step, tokens, stage, skill, elapsed = 0, 0, 0, 0.0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average = state["average"]
        rng.setstate(state["rng"])
        step, tokens, stage, skill, elapsed = state["progress"]

    def save() -> None:
        state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(),
                 "average": average, "rng": rng.getstate(),
                 "progress": (step, tokens, stage, skill, elapsed)}  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    total = args.minutes * 60
    clock, saved, since_stage = time.monotonic(), elapsed, 0
    smooth = {"text": math.nan, "answer": math.nan, "first": skill, "all": math.nan}
    while elapsed < total and not args.export_only:
        # Half of the later batches are shorter, so that short documents are not forgotten.
        current = stage if stage < 2 or rng.random() < 0.5 else rng.randrange(1, stage)
        length = STAGES[current].length
        ids, weights = rows.batch(rng, STAGES[current].kinds, length, args.batch // length)
        inputs, targets, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]

        rate = min(1.0, (step + 1) / 50, max(0.02, (1 - elapsed / total) / args.decay))
        for optimizer, lr in ((muon, args.muon_lr), (adam, args.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate

        hidden = trunk(inputs)
        chosen = weights > 0
        logits = model.head(hidden[chosen])
        losses = F.cross_entropy(logits, targets[chosen], reduction="none")
        loss = (losses * weights[chosen]).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        since_stage += 1
        tokens += inputs.numel()
        with torch.no_grad():
            keep = min(0.995, step / (step + 20))
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - keep)

        now = time.monotonic()
        elapsed, clock = elapsed + now - clock, now

        if current == stage:
            w = weights[chosen]
            right = (logits.argmax(-1) == targets[chosen]).float()
            first = (weights == 8) & (weights.roll(1, dims=1) != 8)
            chances = {"text": (losses, w == 1), "answer": (losses / math.log(2), w == 8),
                       "first": (right, first[chosen]), "all": (right, w == 8)}  # fmt: skip
            measured = {k: v[m].mean().item() for k, (v, m) in chances.items()}
            for key, value in measured.items():
                if not math.isnan(value):
                    old = smooth[key] if not math.isnan(smooth[key]) else value
                    smooth[key] = old + (value - old) * 0.05
            skill = smooth["first"]
        if step % 25 == 0:
            print(f"step {step} stage {stage} {elapsed / 60:.1f} min {tokens / 1e6:.2f} M tokens "
                  f"{tokens / elapsed:.0f}/s  text {smooth['text']:.3f} nats  "
                  f"answer {smooth['answer']:.3f} bits a digit  first {smooth['first']:.3f} "
                  f"digits {smooth['all']:.3f}  rate {rate:.2f}", flush=True)  # fmt: skip
        if skill > STAGES[stage].enough and since_stage >= 50:
            stage, skill, since_stage = stage + 1, 0.0, 0
            smooth = dict.fromkeys(smooth, math.nan)
            smooth["first"] = 0.0
            print(f"stage {stage}: {STAGES[stage].length} tokens", flush=True)
            save()
        if elapsed - saved > 120:
            saved = elapsed
            save()
    if not args.export_only:
        save()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    export(model, config, tokenizer)
    figures = {
        "date": datetime.date.today().isoformat(),
        "parameters": n_parameters,
        "training_minutes": round(elapsed / 60, 1),
        "training_tokens": tokens,
        "training_steps": step,
        "stage": stage,
        "bytes_per_token": round(n_bytes / n_tokens, 3),
        **measure(model, tokenizer),
    }
    write_json(DEMO / "metrics.json", figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
