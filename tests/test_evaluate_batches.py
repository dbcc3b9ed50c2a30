"""Batches of an evaluation: in order however many are in work, shared by processes, with a sign of progress."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import num_threads
from test_roi_linear import Colours, identity_encoder
from tiny_data import write_coco, write_imagenet
from torch import nn

from scrl_fast.config.schema import BoxesConfig, ModelConfig, ViewsConfig
from scrl_fast.data import workers
from scrl_fast.errors import UsageError
from scrl_fast.evaluate import batches as module
from scrl_fast.evaluate import region_tasks
from scrl_fast.evaluate.batches import Progress, map_batches
from scrl_fast.evaluate.config import PcaOptions
from scrl_fast.evaluate.dense import retrieval_sums
from scrl_fast.evaluate.encoder import EvaluatedEncoder
from scrl_fast.evaluate.images import (
    ImageLoader,
    frozen_copy,
    measure_batchnorm,
    measure_batchnorm_on_images,
    pooled_features,
)
from scrl_fast.evaluate.linear import fit_heads
from scrl_fast.evaluate.regions import BoxLoader, box_features
from scrl_fast.evaluate.result import TaskContext
from scrl_fast.models import build_encoder
from scrl_fast.run.terminal import Terminal

CPU = torch.device("cpu")


def until(condition):
    """Waits for what another thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def speaking():
    """Whether a thread may say lines of progress."""
    return any(thread.name == "scrl_fast-progress" for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_threads_are_given_back(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seen = []

    def compute(number: int) -> tuple[torch.Tensor]:
        time.sleep(0.01 * (number % 3))
        seen.append(torch.get_num_threads())
        return (torch.tensor(number, dtype=torch.float32, requires_grad=True) * 2,)

    try:
        found = [value for (value,) in map_batches(lambda n: n + 1, compute, range(9), device=CPU, workers=2)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [int(value) for value in found] == [2 * (n + 1) for n in range(9)]
    assert not any(value.requires_grad for value in found)
    assert set(seen) == {max(1, threads // min(module.CONCURRENT, threads))}


def test_an_error_in_a_batch_comes_to_the_caller():
    def compute(number: int) -> tuple[torch.Tensor]:
        if number == 3:
            raise ValueError("batch 3")
        return (torch.tensor(number),)

    with pytest.raises(ValueError, match="batch 3"):
        list(map_batches(lambda n: n, compute, range(9), device=CPU))


def test_progress_speaks_of_slow_stages_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said = []
    with Progress("quick", 3, "images", said.append) as quick:
        for _ in range(3):
            now[0] += 0.5
            quick.advance()
    assert not said
    with Progress("features", 50, "images", said.append) as slow:
        for _ in range(50):
            now[0] += 1
            slow.advance()
    assert said[0] == "features: 2 of 50 images, 1/s" and said[1] == "features: 12 of 50 images, 1/s"
    assert said[-1] == "features: 50 images in 50.0 s" and len(said) == 6


def test_progress_counts_what_is_iterated_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said = []

    def slow():
        for image in "abcde":
            now[0] += 1
            yield image

    with Progress("measuring", 5, "images", said.append) as progress:
        assert list(progress.over(slow())) == list("abcde")
    assert said == ["measuring: 2 of 5 images, 1/s", "measuring: 5 images in 5.0 s"]


def test_progress_speaks_while_the_first_unit_takes_long(monkeypatch):
    monkeypatch.setattr(Progress, "FIRST", 0.01)
    monkeypatch.setattr(Progress, "EVERY", 0.02)
    said = []
    with Progress("features", 8, "images", said.append) as progress:
        until(lambda: len(said) > 1)
        progress.advance(4)
        until(lambda: "4 of 8" in said[-1])
        progress.advance(4)
    assert said[0] == said[1] == "features: 0 of 8 images so far"
    assert said[-1].startswith("features: 8 images in ")
    with pytest.raises(UsageError), Progress("box pairs", 8, "images", said.append):
        until(lambda: said[-1].startswith("box pairs"))
        raise UsageError("no images")
    assert not speaking()
    assert said[-1] == "box pairs: 0 of 8 images so far"


def test_progress_is_silent_after_an_error_in_what_uses_the_units():
    """Also where something, a traceback for one, refers to the generator of the units still."""

    def held():
        with Progress("epoch 1", 8, "images", [].append):
            yield torch.zeros(2, 9), torch.zeros(2).long()  # other features than those of the test

    kept = held()
    plan = {"epochs": 1, "steps_per_epoch": 1, "batch_size": 2, "classes": 2}
    with pytest.raises(RuntimeError):
        fit_heads(lambda _: kept, (torch.zeros(2, 3), torch.zeros(2).long()), lrs=[1.0], **plan)
    assert not speaking()
    with pytest.raises(UsageError), Progress("fitting", 8, "classifiers", [].append) as progress:
        kept = progress.over(range(8))
        for _ in kept:
            raise UsageError("one class")
    assert kept and not speaking()


def test_a_line_that_cannot_be_said_ends_the_stage(monkeypatch, capfd):
    """A full disk below log.txt: the caller gets the error, not stderr."""
    monkeypatch.setattr(Progress, "FIRST", 0.01)
    calls = []

    def full(line):
        calls.append(line)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Progress("features", 8, "images", full) as progress:
        until(lambda: calls and not speaking())
        with pytest.raises(OSError, match="No space"):
            progress.advance()
        raise OSError("No space, as the caller was told")
    with pytest.raises(OSError, match="No space"), Progress("features", 8, "images", full):
        until(lambda: len(calls) > 1 and not speaking())
    with pytest.raises(UsageError), Progress("features", 8, "images", full):  # an error on its way goes first
        until(lambda: len(calls) > 2 and not speaking())
        raise UsageError("no images")
    assert len(calls) == 3 and not capfd.readouterr().err


def test_no_line_is_due_once_all_units_are_done(monkeypatch):
    monkeypatch.setattr(Progress, "FIRST", 0.01)
    monkeypatch.setattr(Progress, "EVERY", 0.01)
    said = []
    with Progress("features", 4, "images", said.append) as progress:
        progress.advance(4)
        time.sleep(0.05)
    assert not said


def test_a_total_that_is_a_bound_is_called_one(monkeypatch):
    monkeypatch.setattr(Progress, "FIRST", 0.01)
    said = []
    with Progress("classifier", 700, "iterations", said.append, at_most=True) as progress:
        until(lambda: said)
        progress.advance(312)
    assert said[0] == "classifier: 0 of at most 700 iterations so far"
    assert said[-1].startswith("classifier: 312 iterations in ")


def test_a_bar_ends_after_the_line_that_another_thread_writes():
    class Ends(Terminal):
        """Another thread ends the bar while a line is written."""

        def _try(self, action):
            if self.bar is not None and not enders:
                enders.append(threading.Thread(target=self.end_progress))
                enders[0].start()
                enders[0].join(0.05)
            return super()._try(action)

    class Bar:
        def write(self, line, file):
            written.append(line)

        def close(self):
            written.append("closed")

    written, enders = [], []
    terminal = Ends(io.StringIO(), total=3, done=0)
    terminal.bar = Bar()
    terminal.write("features: 1 of 3 images")
    enders[0].join()
    assert written == ["features: 1 of 3 images", "closed"] and terminal.bar is None


def test_nobody_listens_and_no_thread_begins():
    with Progress("features", 8, "images"):
        assert not speaking()


def test_stages_speak_before_their_first_batch_is_done(monkeypatch):
    """Batches are large: without this a stage says nothing for a minute."""
    monkeypatch.setattr(Progress, "FIRST", 0.01)
    said = []
    encoder, source = identity_encoder(), Colours(6, seed=0)
    loader, views = BoxLoader((0.5,) * 3, (0.25,) * 3, batch_size=6), ViewsConfig(recipe="none", size=32)

    class Slow(nn.Module):
        def forward(self, images):
            until(lambda: said)
            return images

    encoder.body.maxpool = Slow()
    images = ImageLoader(views, batch_size=6, workers=0)
    recipe = views, BoxesConfig(min_size=4, per_image=2), ModelConfig()
    options, evaluated = PcaOptions(checkpoint="file", size=32), EvaluatedEncoder(encoder, "file", "")
    pooling = 1, -1, False
    stages = {
        "BatchNorm statistics": lambda: measure_batchnorm_on_images(encoder, source, images, say=said.append),
        "features of train": lambda: box_features(encoder, source, loader, pooling, name="train", say=said.append),
        "features": lambda: pooled_features(encoder, source, images, say=said.append),
        "box pairs": lambda: retrieval_sums(encoder, source, recipe, [range(6)], seed=0, say=said.append),
        "dense features of file": lambda: region_tasks.pca_task(options, evaluated, TaskContext(said.append)),
    }
    monkeypatch.setattr(region_tasks, "make_source", lambda *_, **__: source)
    monkeypatch.setattr(region_tasks, "save_plot", lambda *_: None)
    for name, stage in stages.items():
        said.clear()
        stage()
        assert said[0].startswith(f"{name}: 0 of "), name


def test_batchnorm_statistics_are_those_of_one_batch_after_the_other():
    """The same as cumulative running statistics of an encoder that sees the batches itself, in order."""
    torch.manual_seed(0)
    encoder = frozen_copy(build_encoder("resnet10_tiny"))
    images = torch.randn(40, 3, 32, 32)
    batches = images.split([16, 8, 16])
    alone = copy.deepcopy(encoder)
    norms = [m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            alone(batch)
    measure_batchnorm(encoder, batches)
    for (name, ours), theirs in zip(encoder.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert not encoder.training and not any(m.training for m in encoder.modules())


def test_batches_of_boxes_are_runs_of_one_size():
    class Sized(Colours):
        reads = 0

        def size_of(self, index):
            return self._items[index][0].shape[:2]

        def read(self, index):
            Sized.reads += 1
            return super().read(index)

    loader = BoxLoader((0.5,) * 3, (0.25,) * 3, batch_size=3)
    sized = Sized(10, seed=0, sizes=(32, 32, 32, 32, 48))
    expected = [[0, 1, 2], [3], [4], [5, 6, 7], [8], [9]]
    assert [b.tolist() for b in loader.batches(sized)] == expected and Sized.reads == 0
    assert [b.tolist() for b in loader.batches(Colours(10, seed=0, sizes=(32, 32, 32, 32, 48)))] == expected
    loaded = loader.load(sized, np.array([5, 6, 7]))
    assert loaded.pictures.shape == (3, 32, 32, 3) and set(loaded.images.tolist()) <= {5, 6, 7}
    pixels = loader.normalised(loaded.pictures)
    assert pixels.shape == (3, 3, 32, 32) and pixels.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pixels[0, :, 5, 7], loaded.pictures[0, 5, 7] / 255 * 4 - 2)
    assert identity_encoder().out_channels == 3


def test_an_error_waits_for_what_other_threads_compute():
    """One left behind in compiled code when Python ends takes the process with it."""
    begun, ended = threading.Event(), []

    def compute(batch):
        if batch == 0:
            begun.wait(60)
            raise UsageError("no result")
        begun.set()
        time.sleep(workers.JOIN_SECONDS + 0.3)
        ended.append(batch)
        return (batch,)

    with num_threads(2), pytest.raises(UsageError, match="no result"):
        list(map_batches(lambda batch: batch, compute, [0, 1], device=CPU))
    assert ended == [1] and not [t for t in threading.enumerate() if t.name.startswith("scrl_fast-data")]


# ---- several processes ----


def run(arguments: list[str], file, processes: int) -> tuple[dict, str]:
    """The JSON document of one evaluation by so many processes with one thread each, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*launch, "scrl_fast.evaluate", *arguments, f"--json={file}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def numbers(result) -> list[float]:
    if isinstance(result, dict):
        return [number for value in result.values() for number in numbers(value)]
    if isinstance(result, (list, tuple)):
        return [number for value in result for number in numbers(value)]
    return [float("nan") if result is None else float(result)]


@pytest.mark.parametrize("task", ["linear", "roi-linear"])
def test_three_processes_give_the_numbers_of_one(tmp_path, task):
    tiny = ["--checkpoint=random", "--backbone=resnet10_tiny", f"--cache={tmp_path / 'kept'}"]
    if task == "linear":
        write_imagenet(tmp_path, train=8, val=4)
        data = ["--data.source=imagenet", f"--data.root={tmp_path}", "--size=48", "--batch_size=8", "--epochs=2"]
    else:
        write_coco(tmp_path, "train2017", images=14, seed=1)
        write_coco(tmp_path, "val2017", images=8, seed=2)
        data = ["--data.source=coco", f"--data.root={tmp_path}", "--batch_size=4"]
    one, line = run([task, *tiny, *data, "--cache="], tmp_path / "one.json", 1)
    several, shared = run([task, *tiny, *data], tmp_path / "several.json", 3)
    assert numbers(several["result"]) == pytest.approx(numbers(one["result"]), nan_ok=True, abs=1e-6)
    assert shared == line and line.count("\n") == 1  # one process prints
    if task == "roi-linear":  # now from the cache, which the first process alone reads
        assert run([task, *tiny, *data], tmp_path / "again.json", 2)[0]["result"] == several["result"]


def test_after_its_last_unit_a_stage_waits_without_work(monkeypatch):
    looks = []
    speak = Progress._speak
    monkeypatch.setattr(Progress, "FIRST", 0.0)
    monkeypatch.setattr(Progress, "_speak", lambda self: (looks.append(self.done), speak(self)))
    with Progress("x", 2, "images", lambda line: None) as progress:
        progress.advance(2)
        time.sleep(0.2)
    assert len(looks) <= 4
