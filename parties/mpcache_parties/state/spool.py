"""Files that workers write and their dealer reads once: in a folder, or on any file system of fsspec.

What lies there is sealed, and of no use to anybody once the dealer is gone. So nothing has to outlive a
crash, and a file system need not promise more than to give back what was written: an object store will do.
Tapes in store are another matter (`TapeStore`): that each is used once rests on locks, and on markers that
are on the disk before a tape is read.
"""

from __future__ import annotations

import io
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput, StateError
from mpcache_parties.state import sealed, snapshot

EXTRA = "scale"  # the extra that brings fsspec
_PROBE_BYTES = 1 << 10


class Spool(ABC):
    """Where the files are. Its workers get it pickled. Every method raises StateError."""

    @abstractmethod
    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file."""

    @abstractmethod
    def take(self, name: str, key: bytes, header: Mapping[str, Any]) -> bytearray:
        """Read the body of a sealed file with this header. The file is gone then."""

    @abstractmethod
    def clear(self, beginning: str) -> None:
        """Remove the files whose names begin so; what cannot be removed stays."""

    @abstractmethod
    def close(self) -> None:
        """Remove what this spool has made for itself."""

    def put_tree(self, name: str, key: bytes, header: Mapping[str, Any], tree: Any) -> None:
        """Seal a tree of `snapshot` into a file."""
        self.put(name, sealed.sealed_pieces(key, header, snapshot.serialize(tree)))

    def take_tree(self, name: str, key: bytes, header: Mapping[str, Any]) -> Any:
        """Return what `put_tree` was given; the file is gone then."""
        body = self.take(name, key, header)
        try:
            return snapshot.deserialize(body)
        except StateError as error:
            raise StateError(f"{self}/{name}: {error}") from None

    @staticmethod
    def at(place: str | None) -> Spool:
        """Open a folder, or an fsspec URL; None: a folder of this machine that goes with the spool.

        Raises BadInput, StateError: nothing can be written there and read back.
        """
        if place is None:
            return FolderSpool(Path(tempfile.mkdtemp(prefix="mpcache-dealt-")), made=True)
        return UrlSpool.checked(place) if is_url(place) else FolderSpool(Path(place))


def is_url(place: str) -> bool:
    """Return whether a place is fsspec's, and no path."""
    return "://" in place


class FolderSpool(Spool):
    """A folder that all workers see."""

    def __init__(self, folder: Path, made: bool = False) -> None:
        """Make the folder, if it is not there. made: for this spool alone."""
        self.folder, self._made = folder.absolute(), made
        sealed.make_folder(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        sealed.write_whole(self.folder / name, pieces)

    def take(self, name: str, key: bytes, header: Mapping[str, Any]) -> bytearray:
        file = self.folder / name
        body = sealed.unseal(file, key, header)
        file.unlink(missing_ok=True)
        return body

    def clear(self, beginning: str) -> None:
        for file in self.folder.glob(f"{beginning}*"):
            with suppress(OSError):
                file.unlink()

    def close(self) -> None:
        if self._made:
            shutil.rmtree(self.folder, ignore_errors=True)


class UrlSpool(Spool):
    """A folder, or a bucket's prefix, at an fsspec URL: s3://BUCKET/PREFIX, sftp://HOST/PATH, ...

    What a file system needs to know beyond that, it finds where its driver looks: in the environment, or in
    fsspec's own configuration.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    def checked(cls, url: str) -> UrlSpool:
        """Return a spool that has taken a file and given it back. Raises BadInput or StateError."""
        found = cls(url)
        name, key = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(sealed.KEY_BYTES)
        header, body = {"kind": "probe"}, secrets.token_bytes(_PROBE_BYTES)
        files, _ = found._open()
        if files.protocol == "memory":
            raise BadInput(
                f"--offline-store {found}: no worker sees the memory of this process; give another",
                private=True,
            )
        found.put(name, sealed.sealed_pieces(key, header, [body]))
        if found.take(name, key, header) != body:
            raise StateError(f"{found}: does not give back what was written there")
        return found

    def __str__(self) -> str:
        """Return the URL as it may be shown: without a password."""
        scheme, _, rest = self.url.rpartition("://")
        place, slash, path = rest.partition("/")
        return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        files, folder = self._open()
        with self._telling("cannot be written"), files.open(f"{folder}/{name}", "wb") as out:
            for piece in pieces:
                out.write(piece)

    def take(self, name: str, key: bytes, header: Mapping[str, Any]) -> bytearray:
        files, folder = self._open()
        with self._telling("cannot be read"):
            whole = files.cat_file(f"{folder}/{name}")
        body = sealed.unseal_stream(io.BytesIO(whole), len(whole), f"{self}/{name}", key, header)
        with self._telling("a file cannot be removed"):
            files.rm_file(f"{folder}/{name}")
        return body

    def clear(self, beginning: str) -> None:
        with suppress(StateError), self._telling("cannot be listed"):
            files, folder = self._open()
            files.invalidate_cache()
            for file in files.glob(f"{folder}/{beginning}*"):
                files.rm_file(file)

    def close(self) -> None:
        pass

    def _open(self) -> tuple[Any, str]:
        """Return the file system, the same one each time, and the folder's path in it."""
        with self._telling("cannot be used"):
            try:
                from fsspec.core import url_to_fs
            except ImportError:
                raise BadInput(
                    f"--offline-store {self} needs fsspec, which is not installed: "
                    f"pip install 'mpcache[{EXTRA}]'",
                    private=True,
                ) from None
            files, folder = url_to_fs(self.url)
            return files, str(folder).rstrip("/")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turn a driver's errors into one line. Each driver raises classes of its own, so all are caught."""
        try:
            with sealed.telling(f"{self}: {what}"):
                yield
        except (BadInput, StateError):
            raise
        except Exception as error:
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise StateError(f"{self}: {what}: {said:.200}") from None
