"""CrypTen's own protocols run unchanged on our links, and nothing insecure is reachable."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpcache.engines import crypten_shim
from mpcache.engines.crypten_shim import crypten
from mpcache.engines.stock import blocking
from mpcache.rank import Rank
from mpcache.runtime.program import Call, Program, run
from tests.support.harness import secure
from tests.support.paths import ROOT
from tests.support.play import play


def test_crypten_functions() -> None:
    x = torch.randn(3, 8) * 2
    for fn, reference, tolerance in (
        (lambda t: t.square(), torch.square, 1e-3),
        (lambda t: t.lt(0), lambda t: (t < 0).double(), 0),
        (lambda t: t.eq(t), lambda t: torch.ones_like(t), 0),
        (lambda t: (t - 8).exp(), lambda t: (t - 8).exp(), 1e-3),
        (lambda t: (t * 0.1 + 4).reciprocal(), lambda t: 1 / (t * 0.1 + 4), 1e-3),
        (lambda t: t.softmax(-1), lambda t: t.softmax(-1), 1e-2),
        (lambda t: t.max(-1, keepdim=True)[0], lambda t: t.amax(-1, keepdim=True), 1e-3),
    ):
        value = secure(lambda ops, s, fn=fn: blocking(fn, s), x, kind="stock").value()
        assert (value - reference(x)).abs().max() <= tolerance


def test_operations() -> None:
    x, w, up = torch.randn(3, 48), torch.randn(48, 5), torch.randn(3, 48)
    cases = (
        (lambda ops, a, b: ops.linear(a, b), (x, w), x @ w, 1e-3),
        (lambda ops, a: ops.norm(a, 1e-5), (x,), x * torch.rsqrt(x.square().mean(-1, keepdim=True)), 1e-2),
        (lambda ops, a, b: ops.gate("silu", a, b), (x, up), F.silu(x) * up, 2e-2),
    )
    for protocol, secrets, expected, tolerance in cases:
        assert (secure(protocol, *secrets, kind="stock").value() - expected).abs().max() < tolerance


def test_communicator() -> None:
    """Every collective of CrypTen's interface, over the parties' link."""

    def program(ops, party, rank):  # type: ignore[no-untyped-def]
        party.begin("test")
        if rank is Rank.DEALER:
            return None
        me = int(rank)
        x = torch.tensor([10 * (me + 1), me + 5])
        c = crypten.communicator.get()

        def collectives():  # type: ignore[no-untyped-def]
            return {
                "rank": (c.get_rank(), c.get_world_size()),
                "all_reduce": c.all_reduce(x).tolist(),
                "xor": c.all_reduce(x, op=crypten_shim.XOR).tolist(),
                "batched": [t.tolist() for t in c.all_reduce([x, x + 1], batched=True)],
                "reduce": c.reduce(x, 1),
                "broadcast": c.broadcast(x, 1).tolist(),
                "all_gather": [t.tolist() for t in c.all_gather(x)],
                "gather": [None if t is None else t.tolist() for t in c.gather(x, 0)],
                "scatter": c.scatter([x, x + 7], 0).tolist(),
                "send": c.send(x, 1) if me == 0 else c.recv(torch.empty_like(x), 0).tolist(),
                "barrier": c.barrier(),
            }

        def ask() -> Program[Any]:
            return (yield Call(lambda party, step: crypten_shim.call(party, collectives, step)))

        return run(ask(), party)

    played = play(program, "stock")
    zero, one = played.server, played.client
    assert zero["rank"] == (0, 2) and one["rank"] == (1, 2)
    for both in ("all_reduce", "xor", "batched", "broadcast", "all_gather"):
        assert zero[both] == one[both]
    assert zero["all_reduce"] == [30, 11] and zero["xor"] == [10 ^ 20, 5 ^ 6]
    assert zero["batched"] == [[30, 11], [32, 13]]
    assert zero["reduce"] is None and one["reduce"].tolist() == [30, 11]
    assert zero["broadcast"] == [20, 6] and zero["all_gather"] == [[10, 5], [20, 6]]
    assert zero["gather"] == [[10, 5], [20, 6]] and one["gather"] == [None]
    assert zero["scatter"] == [10, 5] and one["scatter"] == [17, 12]
    assert one["send"] == [10, 5]


def test_no_party_is_trusted_with_triples_and_no_generator_is_torchs() -> None:
    assert crypten.mpc.get_default_provider().NAME == "tape"
    with pytest.raises(RuntimeError, match="only inside"):
        crypten.generators["local"][torch.device("cpu")]
    with pytest.raises(RuntimeError, match="only inside"):
        crypten.mpc.primitives.ArithmeticSharedTensor.PRSS((2,))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_what_is_imported_where() -> None:
    """CrypTen in one file; pickle, gloo and Python's own generators nowhere near a secret."""
    sources = [p for d in ("mpcache", "parties", "kernels") for p in (ROOT / d).rglob("*.py")]
    assert len(sources) > 20
    for path in sources:
        imported = _imports(path)
        if path.name != "crypten_shim.py":
            assert not any(name.split(".")[0] == "crypten" for name in imported), path
        assert not imported & {"pickle", "torch.distributed", "dill", "marshal", "shelve"}, path
        if "secure" in path.parts:
            assert not imported & {"random", "numpy.random"}, path
            assert "torch.rand" not in path.read_text(), path


def test_openings_have_one_door() -> None:
    """Shares leave a party in `ComputingParty.open` alone; everybody else asks with a reason."""
    doors = []
    for path in (ROOT / "mpcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            # A link's `exchange` is its own `swap`; nobody else but the door calls it.
            own = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self"
            if name in ("swap", "exchange") and not (own and path.parent.name == "transport"):
                doors.append(f"{path.relative_to(ROOT)}")
            if name == "Opening":
                assert len(node.args) >= 2 or any(k.arg == "why" for k in node.keywords), path
    assert doors == ["mpcache/runtime/party.py"]
