"""The three parties as processes."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported anywhere; errors are ours to tell
