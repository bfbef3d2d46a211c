"""Reach a Ray cluster: the one module that imports Ray, and only when somebody asks for it (`--ray`).

Ray moves Python objects between a driver and its workers, by pickling them. So all machines of a cluster
belong to one organisation, and to one party of a session: docs/threat-model.md. Between parties nothing
changes.

Every failure is one line: Ray is not installed, nobody answers, machines with another release.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from mpcache.errors import BadInput, MpcacheError
from mpcache.silence import silent_stderr

HERE = "local"  # an address: a cluster of this machine alone, which ends with this process
RUNNING = "auto"  # an address: the cluster that this machine belongs to
STORE = 128 << 20  # bytes of Ray's object store on this machine, where the cluster is this machine alone
DIAL_S = 3.0  # for an address to be answered at
ANSWER_S = 300.0  # for an actor to answer, or to be made anew and then answer
REACH_S = 60.0  # for an actor whose machine is gone to be made anew on another; Ray misses a machine after 15
AGAIN_S = 0.5  # between two tries to reach it
RESTARTS = 3  # of an actor that is lost
PROBE_S = 60.0  # for a machine to start a worker and import mpcache
PACKAGES = ("mpcache", "mpcache_parties", "mpcache_kernels")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ray takes one of them when it is imported
SLICE_S = 0.5  # of a wait, between which signals are heard


class ClusterError(MpcacheError):
    """A machine of a Ray cluster, or a worker on it, is lost or cannot do its part."""

    private = True  # names a party's own machines

    @property
    def for_peers(self) -> str:
        return "machines of its own failed it; it says there which"


class ClusterInput(BadInput):
    """No cluster is where --ray says, or it cannot do what is asked."""

    private = True


@dataclass(frozen=True)
class Failure:
    """Why a worker did not give what it was asked for, in one line."""

    why: str


@cache
def release_digest() -> str:
    """Digest the source of this release: what driver and workers must have in common."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def tell_release() -> str:
    """Return the worker's own `release_digest`."""
    return release_digest()


class Cluster:
    """A Ray cluster that this process has joined, or started."""

    def __init__(self, address: str, ray: Any) -> None:
        self.address, self._ray = address, ray

    @classmethod
    def join(cls, address: str, workers: int | None = None) -> Cluster:
        """Join the cluster at HOST:PORT, the `auto` one, or start a `local` one of so many workers.

        Raises BadInput: no Ray, no cluster there, or machines with another release of Ray or mpcache.
        """
        ray = _import_ray()
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address == HERE:
            cpus = workers or os.cpu_count() or 1
            options |= {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
            options |= {"address": "local"}
        else:
            if address != RUNNING:
                _dial(address)
            options |= {"address": address}
        kept = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with silent_stderr():  # what fails is raised, too
                ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise ClusterInput(_refused(address, error)) from None
        finally:
            _restore(kept)
        found = cls(address, ray)
        try:
            found._check_release()
        except BaseException:
            found.leave()
            raise
        return found

    def leave(self) -> None:
        """Leave it; what this process has started there ends."""
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """Ray's account of each machine that is alive."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    @property
    def workers(self) -> int:
        """How many processors there are for work."""
        return int(self._ray.cluster_resources().get("CPU", 1))

    @property
    def memory(self) -> list[int]:
        """Bytes of memory that each machine offers, the largest first."""
        return sorted((int(node["Resources"].get("memory", 0)) for node in self.nodes), reverse=True)

    def check_memory(self, each: int, count: int, what: str) -> None:
        """Refuse work for which the machines have too little memory, before anything is loaded.

        each: bytes of one worker.  count: of workers that are there at once. Raises BadInput.
        """
        room = sum(memory // each for memory in self.memory)
        if room < count:
            offered = ", ".join(f"{memory / 1e9:.1f} GB" for memory in self.memory)
            raise ClusterInput(
                f"--ray {self.address}: {what} need {each / 1e9:.1f} GB each, {count} at once; the machines "
                f"offer {offered}: add machines, or ask for less"
            )

    def stream(
        self,
        work: Callable[..., Iterator[Any]],
        tasks: Sequence[tuple[Any, ...]],
        memory: int = 0,
        again: int = 2,
    ) -> Iterator[tuple[int, Any]]:
        """Call `work` with each task, somewhere; yield the task's number and a result, whenever there is one.

        The last thing that a task gives is None, or a `Failure` where its worker died again and again, or
        raised. again: how often a task whose worker died is begun anew.  memory: bytes that a call needs,
        so that no machine gets more calls than it can hold.
        """
        ray = self._ray
        remote = ray.remote(_results).options(num_cpus=1, memory=memory or None, max_retries=again)
        waiting = {remote.remote(work, *task): number for number, task in enumerate(tasks)}
        while waiting:
            with _signals_held():
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=SLICE_S, fetch_local=False)
            for generator in ready:
                number = waiting[generator]
                try:
                    yield number, ray.get(next(generator))
                    continue
                except StopIteration:
                    last = None
                except ray.exceptions.RayError as error:
                    last = Failure(_why(error))
                del waiting[generator]
                yield number, last

    def actors(self, kind: type, each: Sequence[tuple[Any, ...]], memory: int) -> Actors:
        """Start an actor of `kind` with each of these arguments, spread over the machines.

        memory: bytes of each, so that no machine gets more of them than it can hold.
        """
        make = self._ray.remote(kind).options(
            num_cpus=0, memory=memory, scheduling_strategy="SPREAD", max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )  # fmt: skip
        return Actors(self._ray, [make.remote(*arguments) for arguments in each])

    def _check_release(self) -> None:
        """Ask each machine for its release of mpcache. Raises BadInput."""
        ray, mine = self._ray, release_digest()
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {
            node["NodeManagerAddress"]: ray.remote(tell_release)
            .options(num_cpus=0, scheduling_strategy=place(node["NodeID"], soft=False))
            .remote()
            for node in self.nodes
        }
        for host, reply in asked.items():
            try:
                theirs = _fetched(ray, reply, PROBE_S)
            except ray.exceptions.RayError as error:
                raise ClusterInput(
                    f"--ray {self.address}: {host} cannot run mpcache: {_why(error)}"
                ) from None
            if theirs != mine:
                raise ClusterInput(
                    f"--ray {self.address}: {host} has another release of mpcache ({theirs}) than this "
                    f"machine ({mine}); install the same on all"
                )


class Actors:
    """Actors of a cluster. One that is lost is made anew by Ray, and what it was asked is asked again."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self._ray, self._actors = ray, actors

    def __len__(self) -> int:
        return len(self._actors)

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of each actor, of all at once, with its arguments. Raises ClusterError."""
        calls = [
            getattr(actor, method).remote(*arguments)
            for actor, arguments in zip(self._actors, each, strict=True)
        ]
        answers = []
        for number, (call, arguments) in enumerate(zip(calls, each, strict=True)):
            try:
                answers.append(self._answer(call, number, method, arguments))
            except self._ray.exceptions.RayError as error:
                raise ClusterError(f"actor {number + 1} of {len(self)}: {_why(error)}") from None
        return answers

    def _answer(self, call: Any, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """Wait for an answer; ask again while the actor's machine cannot be reached. Raises Ray's errors."""
        limit = time.monotonic() + REACH_S
        while True:
            try:
                return _fetched(self._ray, call, ANSWER_S)
            except self._ray.exceptions.ActorUnavailableError:
                if time.monotonic() > limit:
                    raise
            time.sleep(AGAIN_S)
            call = getattr(self._actors[number], method).remote(*arguments)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method of all actors, and do not wait."""
        for actor in self._actors:
            getattr(actor, method).remote(*arguments)


def _results(work: Callable[..., Iterator[Any]], *task: Any) -> Iterator[Any]:
    for result in work(*task):  # noqa: UP028 - Ray sends values into what `yield from` would hand on to
        yield result


def _fetched(ray: Any, reference: Any, within_s: float) -> Any:
    """Wait for an object, and return it. Raises Ray's own errors."""
    limit = time.monotonic() + within_s
    while True:
        try:
            with _signals_held():
                return ray.get(reference, timeout=SLICE_S)
        except ray.exceptions.GetTimeoutError:
            if time.monotonic() > limit:
                raise


@contextmanager
def _signals_held() -> Iterator[None]:
    """Handle signals that come meanwhile at the end: Ray's code bears no exception but KeyboardInterrupt."""
    came = list[Callable[[], object]]()

    def hold(number: signal.Signals, handler: Callable[[int, FrameType | None], object]) -> None:
        signal.signal(number, lambda _, frame: came.append(lambda: handler(number, frame)))

    kept = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is threading.main_thread():
        for number, handler in kept.items():
            if callable(handler):
                hold(number, handler)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            _restore(kept)
        for handle in came[:1]:
            handle()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave the GPUs visible, as they are
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its own log lines beside our one
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ClusterInput("--ray needs Ray, which is not installed: pip install 'mpcache[scale]'") from None
    finally:
        _restore(kept)
    # What Ray says of workers that die would go to stdout, where results belong; there is no option for it.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *arguments, **more: None
    return ray


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _dial(address: str) -> None:
    """Look whether anybody listens there: Ray itself tries for a minute. Raises BadInput."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ClusterInput(
            f"--ray is {address!r:.80}; give HOST:PORT of a cluster's head, {RUNNING}, or {HERE}"
        )
    try:
        socket.create_connection((host, int(port)), DIAL_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterInput(
            f"--ray {address}: no Ray cluster there ({getattr(error, 'strerror', None) or error}); start one "
            "with `ray start --head`, or give local"
        ) from None


def _refused(address: str, error: Exception) -> str:
    if address == RUNNING and isinstance(error, ConnectionError):
        return f"--ray {RUNNING}: no Ray cluster runs on this machine; start one with `ray start --head`"
    token = (
        "; where a token is asked for, set RAY_AUTH_MODE=token" if isinstance(error, ConnectionError) else ""
    )
    return f"--ray {address}: {_first_line(error)}{token}"


def _why(error: Exception) -> str:
    """Say in one line why a worker failed: what its code raised, or what became of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, MpcacheError):
        return str(cause)
    if cause is not None:
        return f"{type(cause).__name__}: {_first_line(cause)}"
    died = {"WorkerCrashedError": "its worker died", "OutOfMemoryError": "its worker took too much memory",
            "GetTimeoutError": "no worker answers",
            "ActorDiedError": "it died, and cannot be made anew",
            "ActorUnavailableError": "it cannot be reached"}  # fmt: skip
    return died.get(type(error).__name__, f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
