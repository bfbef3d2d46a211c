"""Serve scripted conversations at a port until a signal comes: what tests start as a process."""

from __future__ import annotations

import sys

from mpcache.console.signals import stop_on_signals
from mpcache.errors import MpcacheError
from mpcache_parties.endpoint.endpoint_options import EndpointOptions
from tests.support.scripted_chat import Script


def main(address: str) -> None:
    stop_on_signals("endpoint")
    script = Script(pace_s=0.05)
    try:
        EndpointOptions(address).serve({"demo": script.open}, 1, lambda text: print(text, flush=True))
    except MpcacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main(sys.argv[1])
