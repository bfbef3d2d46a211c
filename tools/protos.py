"""Generate the modules of protos/mpcache_protos from its *.proto; with --check, only compare them.

The link moves frames as bytes that it serialises itself (it counts them, and names what is malformed),
so the gRPC stubs are not generated: the service's name is read from the descriptor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent.parent / "protos"


def generate(target: Path) -> list[Path]:
    """Write the generated modules below `target`; return their paths relative to it."""
    sources = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.glob("mpcache_protos/*.proto"))
    flags = [f"--proto_path={SOURCES}", f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", *flags, *sources]) != 0:
        raise SystemExit("protoc failed; its message is above")
    return sorted(path.relative_to(target) for path in target.glob("mpcache_protos/*_pb2.py*"))


def main() -> int:
    """Generate the modules, or with --check return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one is out of date")
    if not parser.parse_args().check:
        generate(SOURCES)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        stale = [
            path
            for path in generate(fresh)
            if not (SOURCES / path).exists() or (SOURCES / path).read_bytes() != (fresh / path).read_bytes()
        ]
    for path in stale:
        print(f"{path} is out of date; run `make protos`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
