"""What stands for a Ray cluster where there is none: actors and workers are objects of this process.

What goes there and what comes back is pickled, as Ray does.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from mpcache.cluster import Actors, Cluster, ClusterError, Failure
from mpcache.errors import MpcacheError


class ActorsHere(Actors):
    """Actors of one class; one that was lost is made anew when it is next asked."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make, self.here, self.calls = make, make(), 0

    def __len__(self) -> int:
        return len(self.here)

    def lose(self, number: int) -> None:
        self.here[number] = self._make()[number]

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.calls += 1
        try:
            return [
                pickle.loads(pickle.dumps(getattr(actor, method)(*pickle.loads(pickle.dumps(arguments)))))
                for actor, arguments in zip(self.here, each, strict=True)
            ]
        except MpcacheError as error:
            raise ClusterError(f"actor: {error}") from None

    def tell(self, method: str, *arguments: Any) -> None:
        for actor in self.here:
            getattr(actor, method)(*arguments)


class ClusterHere(Cluster):
    """A cluster of this process. memory_asked: bytes of each actor, and how many there were to be."""

    def __init__(self, workers: int = 2) -> None:
        super().__init__("here", None)
        self._workers, self.started, self.memory_asked = workers, list[ActorsHere](), (0, 0)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return [{}]

    @property
    def workers(self) -> int:
        return self._workers

    def check_memory(self, each: int, count: int, what: str) -> None:
        self.memory_asked = each, count

    def actors(self, kind: type, each: Sequence[tuple[Any, ...]], memory: int) -> Actors:
        self.started.append(ActorsHere(lambda: [kind(*arguments) for arguments in each]))
        return self.started[-1]

    def stream(
        self, work: Callable[..., Iterator[Any]], tasks: Sequence[tuple[Any, ...]], memory: int = 0,
        again: int = 2,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Run the last task first: nothing may depend on the order."""
        for number in reversed(range(len(tasks))):
            last = None
            try:
                for result in work(*cast("tuple[Any, ...]", pickle.loads(pickle.dumps(tasks[number])))):
                    yield number, pickle.loads(pickle.dumps(result))
            except MpcacheError as error:
                last = Failure(str(error))
            yield number, last

    def leave(self) -> None:
        pass
