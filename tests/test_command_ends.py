"""Commands that write files and end before they are done: by a signal, a full disk, a folder that goes, a reader that
ends. No file is half written under its name, and one line and the exit code say what happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transfer import transfer

from scrl_fast import export, weights
from scrl_fast.models import build_encoder
from scrl_fast.transfer import trained
from scrl_fast.transfer.__main__ import main as transfer_main

ROOT = Path(__file__).parents[1]
FATAL = [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU]


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    made = transfer("detection", data_root, tmp_path_factory.mktemp("run") / "detector")
    made.loop.save()
    return made.folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    from safetensors.torch import save_file

    save_file(build_encoder("resnet10_tiny").body.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "photos" / f"{number}.jpg")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def _signals_of_a_shell():
    """Under nohup SIGHUP is ignored, and stays so; in the background of a script SIGINT is."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in FATAL}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number in FATAL:
        assert signal.getsignal(number) == signal.SIG_DFL, "a command leaves the handlers as they were"
    for number, handler in before.items():
        signal.signal(number, handler)


def predict(run, photos, out, *more):
    return transfer_main(
        ["predict", f"--detector={run}", f"--images={photos}", f"--out={out}", "--device=cpu", "--workers=0", *more]
    )


def at_image(monkeypatch, number, action):
    """Does something when the detector is asked for its image of this number."""
    original, asked = trained.TrainedDetector.predict, []

    def hooked(self, image, **options):
        asked.append(1)
        if len(asked) == number:
            action()
        return original(self, image, **options)

    monkeypatch.setattr(trained.TrainedDetector, "predict", hooked)


def left_over(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- signals ----


@pytest.mark.parametrize("number", [*FATAL, signal.SIGINT])
def test_predict_ends_by_a_signal_with_whole_pictures_and_no_json(number, run, photos, tmp_path, monkeypatch, capsys):
    at_image(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        predict(run, photos, tmp_path / "out")
    said = capsys.readouterr().err.splitlines()[-1]
    if number == signal.SIGINT:
        assert (ended.value.code, said) == (1, "scrl_fast.transfer: interrupted")
    else:
        assert ended.value.code == 128 + number
        assert said.startswith(f"scrl_fast.transfer: {number.name}: ended before all images were done")
    assert left_over(tmp_path / "out") == ["pictures/0.jpg", "pictures/1.jpg"]
    for path in (tmp_path / "out" / "pictures").iterdir():
        Image.open(path).load()


def test_json_of_an_earlier_use_does_not_stay_beside_other_pictures(run, photos, tmp_path, monkeypatch):
    assert predict(run, photos, tmp_path / "out") == 0
    assert (tmp_path / "out" / "results.json").is_file()
    at_image(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    (tmp_path / "more").mkdir()
    shutil.copy(photos / "0.jpg", tmp_path / "more" / "0.jpg")
    with pytest.raises(SystemExit):
        predict(run, tmp_path / "more", tmp_path / "out", "--overwrite")
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("number", FATAL)
@pytest.mark.parametrize("kind", ["encoder", "folder", "detector"])
def test_an_export_that_a_signal_ends_leaves_nothing(number, kind, run, encoder_file, tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def stopped(*arguments, **options):
        save(*arguments, **options)
        saved.append(1)
        os.kill(os.getpid(), number)

    if kind == "folder":
        monkeypatch.setattr("scrl_fast.weights.formats.model_card", lambda *_: os.kill(os.getpid(), number))
        work, command = export.main, [str(encoder_file), "--to=hf", str(tmp_path / "out")]
    elif kind == "encoder":
        monkeypatch.setattr("scrl_fast.weights.formats.TORCHVISION_NAMES", ("resnet10_tiny",))
        work, command = export.main, [str(encoder_file), "--to=torchvision", str(tmp_path / "out.pth")]
        monkeypatch.setattr(torch, "save", stopped)
    else:
        work, command = transfer_main, ["export", f"--detector={run}", "--to=torchvision", f"--out={tmp_path}/out.pth"]
        monkeypatch.setattr("scrl_fast.transfer.export.TORCHVISION_NAMES", ("resnet10_tiny",))
        monkeypatch.setattr("scrl_fast.transfer.export.torchvision_detector.build", _build_any(run))
        monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(SystemExit) as ended:
        work(command)
    assert ended.value.code == 128 + number and left_over(tmp_path) == []
    assert f"{number.name}: ended before the export was done" in capsys.readouterr().err
    assert saved or kind == "folder"


@pytest.mark.parametrize("order", ["replace", "write_text"])
def test_a_detector_is_never_left_with_the_script_of_another(order, run, tmp_path, monkeypatch):
    """Whatever step of giving names is the last one: the script is there only beside the weights it belongs to."""
    monkeypatch.setattr("scrl_fast.transfer.export.TORCHVISION_NAMES", ("resnet10_tiny",))
    monkeypatch.setattr("scrl_fast.transfer.export.torchvision_detector.build", _build_any(run))
    (tmp_path / "out.pth").write_bytes(b"old weights")
    (tmp_path / "out.py").write_text("old script")
    where = "scrl_fast.transfer.export." + ("os.replace" if order == "replace" else "write_text")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, fail)
    with pytest.raises(SystemExit):
        transfer_main(["export", f"--detector={run}", "--to=torchvision", f"--out={tmp_path}/out.pth", "--overwrite"])
    assert left_over(tmp_path) == ["out.pth"]


@pytest.mark.parametrize("number", FATAL)
def test_an_evaluation_that_a_signal_ends_leaves_nothing(number, encoder_file, tmp_path, monkeypatch, capsys):
    from scrl_fast.evaluate import tasks
    from scrl_fast.evaluate.__main__ import main

    monkeypatch.setitem(tasks.TASKS, "rank", lambda *_: os.kill(os.getpid(), number))
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "rank",
                f"--checkpoint={encoder_file}",
                "--data.source=demo",
                "--device=cpu",
                f"--json={tmp_path}/out/r.json",
            ]
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 128 + number and left_over(tmp_path / "out") == []
    assert said == f"scrl_fast.evaluate: {number.name}: ended before there was a result; no file is half written"


@pytest.mark.parametrize("number", FATAL)
def test_a_pack_that_a_signal_ends_holds_whole_shards_and_goes_on(number, photos, tmp_path, monkeypatch, capsys):
    from scrl_fast.data import pack

    original, asked = pack.smaller, []

    def smaller(*arguments):
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), number)
        return original(*arguments)

    command = [str(photos), str(tmp_path / "out"), "--shard-images=2", "--workers=1"]
    monkeypatch.setattr(pack, "smaller", smaller)
    with pytest.raises(SystemExit) as ended:
        pack.main(command)
    assert ended.value.code == 128 + number
    assert f"{number.name}: ended before all shards were written" in capsys.readouterr().err
    assert not [name for name in left_over(tmp_path / "out") if name.endswith(".tmp") or name == "00001.tar"]
    assert pack.main(command) == 0 and "4 images in 2 shards" in capsys.readouterr().out


def _build_any(run):
    return lambda *_, **__: trained.load_detector(run, device="cpu").network


# ---- the output folder goes ----


@pytest.mark.parametrize("moved", [False, True])
def test_predict_does_not_make_a_folder_anew_that_went(moved, run, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_image(monkeypatch, 3, (lambda: out.rename(tmp_path / "away")) if moved else (lambda: shutil.rmtree(out)))
    with pytest.raises(SystemExit) as ended:
        predict(run, photos, out)
    assert ended.value.code == 2 and not out.exists()
    assert f"out={out} was removed or moved while it was written to" in capsys.readouterr().err
    if moved:
        assert left_over(tmp_path / "away") == ["pictures/0.jpg", "pictures/1.jpg"]


@pytest.mark.parametrize("moved", [False, True])
def test_an_export_names_the_file_whose_folder_went(moved, encoder_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    original = weights.formats.write_safetensors

    def lost(*arguments):
        folder.rename(tmp_path / "away") if moved else shutil.rmtree(folder)
        original(*arguments)

    monkeypatch.setattr("scrl_fast.weights.formats.write_safetensors", lost)
    with pytest.raises(SystemExit) as ended:
        export.main([str(encoder_file), "--to=safetensors", str(folder / "out.safetensors")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said == (
        f"scrl_fast.export: No such file or directory: {folder / 'out.safetensors'}\n"
    )


# ---- a full disk ----

FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from scrl_fast.commands import main
sys.exit(main(sys.argv[2:]))
"""


def limited(size, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", FULL, str(size), *map(str, command)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("to, out", [("safetensors", "out.safetensors"), ("hf", "out"), ("onnx", "out.onnx")])
def test_an_export_onto_a_full_disk_leaves_nothing_and_names_the_file(to, out, encoder_file, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="the exporter asks for it")
    done = limited(20_000, "export", encoder_file, f"--to={to}", "--size=32", tmp_path / out)
    assert done.returncode == 1 and left_over(tmp_path) == []
    last = done.stderr.splitlines()[-1]
    assert last.startswith("scrl_fast.export: File too large: ") and str(tmp_path / out) in last, done.stderr
    assert ".tmp" not in last


def test_predictions_onto_a_full_disk_leave_whole_pictures(run, photos, tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (400, 500, 3), np.uint8)).save(photos / "2.jpg")
    more = ("--device=cpu", "--workers=0")
    out = tmp_path / "out"
    done = limited(60_000, "transfer", "predict", f"--detector={run}", f"--images={photos}", f"--out={out}", *more)
    assert done.returncode == 1 and left_over(out) == ["pictures/0.jpg", "pictures/1.jpg"]
    assert done.stderr.splitlines()[-1].startswith(f"scrl_fast.transfer: File too large: {out}/pictures/2.jpg")


# ---- nobody reads ----


def shell(line):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)


def shells(lines):
    """What became of each line, by its name; together, since each begins with seconds of imports."""
    with ThreadPoolExecutor(len(lines)) as pool:
        return dict(zip(lines, pool.map(shell, lines.values()), strict=True))


def test_predict_goes_on_without_a_reader(run, photos, tmp_path):
    command = f"{sys.executable} -m scrl_fast.transfer predict --detector={run} --images={photos} --device=cpu --out="
    ends = {"closed": ">&- 2>&-", "errors": "2> >(exec true)", "result": "| true; exit ${PIPESTATUS[0]}"}
    for name, done in shells({name: f"{command}{tmp_path}/{name} {end}" for name, end in ends.items()}).items():
        assert done.returncode == 0 and "rror" not in done.stderr, (name, done)
        assert len(json.loads((tmp_path / name / "images.json").read_text())["images"]) == 4, name


def test_exports_and_evaluations_go_on_without_a_reader(encoder_file, tmp_path):
    command = f"{sys.executable} -m scrl_fast.export {encoder_file} --to=safetensors {tmp_path}/"
    ends = {"1": "2>&-", "2": ">&-", "3": "| true; exit ${PIPESTATUS[0]}"}
    lines = {name: f"{command}{name}.safetensors {end}" for name, end in ends.items()}
    evaluate = f"{sys.executable} -m scrl_fast.evaluate rank --checkpoint={encoder_file} --data.source=demo"
    lines["e"] = f"{evaluate} --images=8 --size=32 --json={tmp_path}/result.json 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    done = shells(lines)
    assert done["e"].returncode == 0, done["e"]
    assert json.loads((tmp_path / "result.json").read_text())["task"] == "rank"
    for name in ends:
        assert done[name].returncode == 0 and not done[name].stderr, (name, done[name])
        assert (tmp_path / f"{name}.safetensors").is_file() and (tmp_path / f"{name}.safetensors.json").is_file()
