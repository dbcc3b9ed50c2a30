"""The training step as a reader of the paper would write it, in plain PyTorch and torchvision.

On a CPU it is timed in a process of its own (`PlainProcess`), whose malloc is as it comes: ours keeps freed memory,
which would speed up whatever else runs in its process.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lars_step_bench import adapt_one_by_one, average_one_by_one
from sample_box_pairs_bench import python_sampler, random_crops
from timing import Timer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from scrl_fast.models import SCRL


class PlainStep:
    """Box sampling in Python, torchvision's RoIAlign, LARS and moving average tensor by tensor, ``.item()`` to log.

    NCHW; on a GPU under fp16 autocast with a GradScaler, on a CPU in float32 or under bf16 autocast. model: whose
    weights it starts with. views: ``[2B, 3, S, S]``, ready: making them is not in its time.
    """

    def __init__(self, model: SCRL, views: Tensor, crops: np.ndarray, *, lr: float = 0.1, bf16: bool = False) -> None:
        def encoder(branch: Any) -> nn.Sequential:
            return nn.Sequential(*list(branch.encoder.body.children())[:-2])

        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.encoder, self.target_encoder = encoder(model.online), encoder(model.target)
        self.projector, self.target_projector = model.online.projector.net, model.target.projector.net
        self.predictor, self.stride = model.predictor.net, model.online.encoder.stride
        self.views, self.crops, self.cuda = views.contiguous(), crops, views.is_cuda
        params = [p for p in model.parameters() if p.requires_grad]
        targets, sources = model.ema_pairs()
        self.state = SimpleNamespace(
            params=params, adapt=[p.ndim > 1 for p in params], targets=targets, sources=sources
        )
        self.sgd = torch.optim.SGD(params, lr, momentum=0.9, foreach=False)
        self.scaler = torch.amp.GradScaler(enabled=self.cuda)
        self.bf16 = bf16 and not self.cuda

    def loss(self, boxes: tuple[Tensor, Tensor]) -> Tensor:
        def pooled(features: Tensor) -> Tensor:
            return roi_align(features, torch.cat(boxes), 1, 1 / self.stride).flatten(1)

        online = self.predictor(self.projector(pooled(self.encoder(self.views))))
        with torch.no_grad():
            target = self.target_projector(pooled(self.target_encoder(self.views)))
        p1, p2 = F.normalize(online, dim=1).chunk(2)
        z1, z2 = F.normalize(target, dim=1).chunk(2)
        return ((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean()

    def __call__(self) -> float:
        rows1, rows2 = (torch.from_numpy(rows).to(self.views.device) for rows in python_sampler(*self.crops))
        half = torch.bfloat16 if self.bf16 else torch.float16
        with torch.autocast(self.views.device.type, half, enabled=self.bf16 or self.cuda):
            loss = self.loss((rows1, rows2))
        self.sgd.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.sgd)
        adapt_one_by_one(self.state)
        self.scaler.step(self.sgd)
        self.scaler.update()
        average_one_by_one(self.state)
        return loss.item()


class PlainProcess:
    """`PlainStep` on random weights and views in a process of its own; a call is one step, and waits for its end.

    size: of the views in pixels. The process begins with the first call, with as many CPU threads as this one.
    """

    def __init__(self, backbone: str, batch: int, size: int, *, bf16: bool = False) -> None:
        self.command = [sys.executable, __file__, backbone, str(batch), str(size), str(int(bf16))]
        self.process: Any = None

    def __call__(self) -> None:
        self._ask("step")

    def peak_bytes(self) -> int | None:
        """Memory that a step takes beyond what is there before it; None where it cannot be known."""
        return int(self._ask("peak")) or None

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def _ask(self, what: str) -> str:
        if self.process is None:
            command = [*self.command, str(torch.get_num_threads())]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            self._answer()
        self.process.stdin.write(f"{what}\n")
        return self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the plain step ended with {self.process.wait()}")
        return line


def serve(backbone: str, batch: int, size: int, bf16: int, threads: int) -> None:
    """What that process does: a line in, a step, a line out."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = PlainStep(SCRL(backbone), torch.randn(2 * batch, 3, size, size), random_crops(batch), bf16=bool(bf16))
    print("ready", flush=True)
    for line in sys.stdin:
        answer = Timer(torch.device("cpu"), cold=False).peak_bytes(step) if line.strip() == "peak" else step()
        print(answer or 0, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
