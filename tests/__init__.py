"""Tests: the same tree as the code, and what several of them share in support/.

One thread for torch, in tests and in the processes that they start, before anything imports torch.
Tensors here are tiny: two threads wait for each other at every operation, and they wait spinning. With
two workers on two cores that doubled the processor time of the suite, and the parties' processes starved.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
