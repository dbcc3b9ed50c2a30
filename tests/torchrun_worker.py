"""``python -m scrl_fast.train`` whose process 1 is killed in the fourth step of torchrun's first attempt."""

from __future__ import annotations

import os
import signal
import sys

from scrl_fast import train
from scrl_fast.trainer import SCRLTrainer

plain = SCRLTrainer.train_step


def step(self, *batches):
    if self.step == 3 and self.world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, *batches)


SCRLTrainer.train_step = step
sys.exit(train.main())
