"""Transfer and compare without --model.backbone: that of the weights, or of the run that goes on."""

from __future__ import annotations

import pytest
import torch
from test_transfer_compare import options
from tiny_transfer import SMALL

from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.transfer.__main__ import main, parse
from scrl_fast.weights.formats import write_safetensors_state


@pytest.fixture
def weights(tmp_path):
    """A file that states no backbone."""
    torch.save({"state_dict": build_encoder("resnet10_tiny").body.state_dict()}, tmp_path / "scrl.pth")
    return tmp_path / "scrl.pth"


def test_the_backbone_is_that_of_the_weights_where_none_is_named(data_root, tmp_path, weights, capsys):
    """weights state none, as torchvision's files; a run's do."""
    runs = {}
    for name in ("resnet10_tiny", "resnet18"):
        runs[name] = tmp_path / f"{name}.safetensors"
        state = build_encoder(name).body.state_dict()
        write_safetensors_state(runs[name], state, {"backbone": name})
    base = ["voc", f"--data.root={data_root}"]
    assert options(*base, f"--inits=random,{weights}").model.backbone == "resnet50"
    assert options(*base, f"--inits=random,{weights},{runs['resnet10_tiny']}").model.backbone == "resnet10_tiny"
    capsys.readouterr()
    assert parse([*base, f"--init={runs['resnet18']}"]).model.backbone == "resnet18"
    assert f"model.backbone=resnet18, as {runs['resnet18']} states" in capsys.readouterr().err
    named = "--model.backbone=resnet34"
    assert parse([*base, f"--init={runs['resnet18']}", named]).model.backbone == "resnet34"
    assert "states" not in capsys.readouterr().err
    both = "--inits=" + ",".join(map(str, runs.values()))
    with pytest.raises(UsageError, match="is of resnet18; one detector is compared from all starts"):
        options(*base, both)
    assert options(*base, both, named).model.backbone == "resnet34", "the weights' own shapes decide then"
    (tmp_path / "options.yaml").write_text("model: {backbone: resnet34}")
    assert options(*base, both, f"--config={tmp_path / 'options.yaml'}").model.backbone == "resnet34"


@pytest.mark.parametrize("stated", ["os:getcwd", "<Net>", "no_such_network", "timm:no_such", "resnet34"])
def test_no_file_of_weights_chooses_code_or_what_is_no_backbone(stated, data_root, tmp_path):
    file = tmp_path / "stated.safetensors"
    write_safetensors_state(file, build_encoder("resnet18").body.state_dict(), {"backbone": stated})
    assert parse(["voc", f"--data.root={data_root}", f"--init={file}"]).model.backbone == "resnet50"


def test_a_run_that_goes_on_keeps_its_backbone_without_its_first_weights(data_root, tmp_path):
    file, run = tmp_path / "w.safetensors", tmp_path / "run"
    write_safetensors_state(file, build_encoder("resnet10_tiny").body.state_dict(), {"backbone": "resnet10_tiny"})
    words = ["voc", f"--data.root={data_root}", *SMALL, "--train.steps=2", "--eval.images=1", f"--run.dir={run}"]
    words = [word for word in words if "model.backbone" not in word]
    assert main([*words, f"--init={file}", "--train.max_steps=1"]) == 0
    file.unlink()
    assert parse([*words, f"--init={file}", "--resume=auto"]).model.backbone == "resnet10_tiny"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("")  # as a full disk leaves it: the checkpoint holds the options as well
    assert parse([*words, f"--init={file}", "--resume=auto"]).model.backbone == "resnet10_tiny"
    (run / "config.yaml").write_text(config)
    assert main([*words, f"--init={file}", "--resume=auto"]) == 0
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    other = build_encoder("resnet18").body.state_dict()
    write_safetensors_state(file, other, {"backbone": "resnet18"})
    begins = parse([*words, f"--init={file}", "--resume=auto"])
    assert begins.model.backbone == "resnet18", "a run without a checkpoint begins anew"
