"""The three parties as processes.

main (flags) -> process (modes) -> roles (serve | ask | deal) -> facts, handshake; below: network, state,
operations. `launch` starts all three on this machine.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported anywhere; errors are ours to tell
