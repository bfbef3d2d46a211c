"""Tests: the same tree as the code, and what several of them share in support/.

What has to be settled before anything imports torch or Triton, here and in the processes that tests start:

* One thread for torch. Tensors in tests are tiny: two threads wait for each other at every operation, and
  they wait spinning. With two workers on two cores that doubled the suite's processor time, and the
  parties' processes starved.
* Triton's interpreter where there is no GPU. Triton reads the variable when it is imported and again for
  each kernel: set in between (transformers imports Triton, too), kernels are interpreted that call
  functions of Triton which are not, and they fail. So the kernels' tests failed after some others.
* Signals that whoever started the tests ignores (a shell ignores Ctrl-C for what it runs in the background).
  The programs leave an ignored signal ignored, and so does what they start: the tests that stop them would
  wait forever.
"""

import os
import signal

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
