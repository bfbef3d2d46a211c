"""Ray clusters: what is refused in one line, and, where Ray is installed, workers that die."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mpcache.cluster import (
    Actors,
    Cluster,
    ClusterError,
    Failure,
    _refused,
    _signals_held,
    release_digest,
)
from mpcache.errors import BadInput

ray_only = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: the extra `scale`")


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'mpcache\[scale\]'"):
        Cluster.join("local")


def test_the_release_is_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert release_digest() == release_digest.__wrapped__() and len(release_digest()) == 16
    monkeypatch.setattr("mpcache.cluster.PACKAGES", ("mpcache",))
    assert release_digest.__wrapped__() != release_digest()


def test_peers_do_not_read_of_a_partys_machines() -> None:
    assert "10.0.0.7" not in ClusterError("actor 1 of 2 on 10.0.0.7: died").for_peers


@ray_only
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster there"), ("nowhere.invalid:6379", "no Ray cluster there"),
        ("127.0.0.1", "give HOST:PORT"), ("ray://127.0.0.1:1", "give HOST:PORT"),
    ],
)  # fmt: skip
def test_where_there_is_no_cluster_one_line_says_so(address: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as error:
        Cluster.join(address)
    assert error.value.private and "\n" not in str(error.value)


def test_a_machine_that_is_in_no_cluster_is_told_how_to_start_one() -> None:
    assert "no Ray cluster runs on this machine" in _refused("auto", ConnectionError("a\nb"))
    assert "RAY_AUTH_MODE=token" in _refused("h:1", ConnectionError("no"))
    assert _refused("h:1", RuntimeError("\n Version mismatch \n more")) == "--ray h:1: Version mismatch"


class Unreachable(Exception):
    pass


class Gone:
    """An actor of which a machine is gone for so many calls, and what stands for Ray and for its method."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.exceptions = SimpleNamespace(
            RayError=Unreachable, ActorUnavailableError=Unreachable, GetTimeoutError=TimeoutError
        )
        self.say = SimpleNamespace(remote=lambda word: word)

    def get(self, word: str, timeout: float) -> str:
        self.left -= 1
        if self.left >= 0:
            raise Unreachable("no route")
        return word


def test_an_actor_whose_machine_is_gone_is_asked_until_it_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpcache.cluster.AGAIN_S", 0.001)
    gone = Gone(3)
    assert Actors(gone, [gone]).ask("say", [("a",)]) == ["a"] and gone.left == -1
    monkeypatch.setattr("mpcache.cluster.REACH_S", 0.05)
    with pytest.raises(ClusterError, match="actor 1 of 1: Unreachable: no route"):
        Actors(Gone(10**9), [Gone(0)]).ask("say", [("a",)])


def test_a_signal_is_handled_after_rays_own_code() -> None:
    came: list[str] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: came.append("handled"))
    try:
        with _signals_held():
            signal.raise_signal(signal.SIGHUP)
            came.append("inside")
        assert came == ["inside", "handled"]
        signal.raise_signal(signal.SIGHUP)
        assert came[2:] == ["handled"]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    with Cluster.join("local", workers=2) as joined:
        assert signal.getsignal(signal.SIGTERM) is handler
        yield joined


def parts(n: int) -> Iterator[int]:
    yield from range(n)
    if n == 3:
        os._exit(1)
    if n == 4:
        raise BadInput("a line of its own")


@pytest.mark.slow
def test_results_come_whenever_there_is_one(cluster: Cluster) -> None:
    found = list(cluster.stream(parts, [(2,), (5,)]))
    assert sorted((n, x) for n, x in found if x is not None) == [
        (n, x) for n, m in enumerate((2, 5)) for x in range(m)
    ]
    assert [x for n, x in found if n == 0] == [0, 1, None]


@pytest.mark.slow
def test_a_worker_that_dies_or_raises_is_a_line(cluster: Cluster) -> None:
    found = list(cluster.stream(parts, [(3,), (4,), (1,)], again=0))
    last = {n: x for n, x in found if not isinstance(x, int)}
    assert isinstance(last[0], Failure) and "died" in last[0].why
    assert last[1] == Failure("a line of its own") and last[2] is None


class Frail:
    def __init__(self) -> None:
        self.said = 0

    def say(self, word: str) -> tuple[str, int]:
        self.said += 1
        return word, self.said

    def process(self) -> int:
        return os.getpid()


@pytest.mark.slow
def test_an_actor_that_dies_is_made_anew(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    actors = cluster.actors(Frail, [(), ()], 1 << 20)
    assert actors.ask("say", [("a",), ("b",)]) == [("a", 1), ("b", 1)]
    os.kill(actors.ask("process", [(), ()])[0], signal.SIGKILL)
    assert actors.ask("say", [("a",), ("b",)]) == [("a", 1), ("b", 2)]
    assert capfd.readouterr().out == ""  # stdout is for results


@pytest.mark.slow
def test_too_little_memory_is_said_before(cluster: Cluster) -> None:
    with pytest.raises(BadInput, match=r"workers need 1000000.0 GB each, 2 at once; the machines offer"):
        cluster.check_memory(10**15, 2, "workers")


@pytest.mark.slow
def test_machines_with_another_release_are_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcache.cluster.release_digest", lambda: "0" * 16)
    with pytest.raises(BadInput, match="another release of mpcache"):
        cluster._check_release()
