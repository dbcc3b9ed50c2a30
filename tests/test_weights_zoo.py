"""--init by name: torchvision, timm and the Hugging Face hub, where files of the tests stand for downloads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision
from tiny_trainer import Pictures, make_config

from scrl_fast import weights
from scrl_fast.config.schema import Config
from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.trainer import SCRLTrainer
from scrl_fast.weights import zoo
from scrl_fast.weights.zoo import read_initial

RESNET18 = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)


@pytest.fixture(autouse=True)
def hub_is_not_asked(monkeypatch, request):
    """No test waits for the network."""
    if "get_session" not in request.node.name:
        monkeypatch.setattr("scrl_fast.weights.zoo._hub_answers", lambda address: True)


def test_where_the_hub_does_not_answer_get_session_is_used_once(monkeypatch, caplog) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append((address, timeout))
            raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with zoo.hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and asked == [(constants.ENDPOINT, 5.0)]
    assert f"{constants.ENDPOINT} does not answer (ConnectionError): only its cache" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the user's environment has it
    with zoo.hub_or_cache():
        assert constants.HF_HUB_OFFLINE and len(asked) == 1


@pytest.fixture
def resnet18(monkeypatch):
    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(RESNET18, "get_state_dict", lambda self, **options: state)
    return state


def trained_from(folder, init, backbone="resnet18", **model):
    config = make_config(folder, max_steps=1)
    config.model.backbone, config.init = backbone, init
    config.views.mean = (0.5, 0.5, 0.5)
    return SCRLTrainer(config, source=Pictures())


def test_pre_training_starts_from_torchvisions_weights(tmp_path, resnet18) -> None:
    trainer = trained_from(tmp_path / "run", "torchvision")
    notes = trainer.initialise()
    assert "ResNet18_Weights.IMAGENET1K_V1 (torchvision): 120 tensors" in notes[0]
    for branch in (trainer.model.online, trainer.model.target):
        assert torch.equal(branch.encoder.body.layer4[1].bn2.weight, resnet18["layer4.1.bn2.weight"])
        assert torch.equal(branch.encoder.body.conv1.weight, resnet18["conv1.weight"])
    trainer.fit()
    assert "init: ResNet18_Weights" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("backbone", ["timm:resnet10t", "timm:convnext_atto", "resnet18"])
def test_pre_training_starts_from_timms_weights(tmp_path, monkeypatch, backbone) -> None:
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, []

    def without_network(name, pretrained=False, **options):
        asked.append((name, pretrained))
        torch.manual_seed(7)
        return create(name, pretrained=False, **options)

    trainer = trained_from(tmp_path / "run", "timm", backbone)
    monkeypatch.setattr(timm, "create_model", without_network)
    before = torch.get_rng_state()
    notes = trainer.initialise()
    assert torch.equal(before, torch.get_rng_state()), "a network that is made for its weights draws from no generator"
    name = backbone.removeprefix("timm:")
    assert asked == [(name, True)] and f"timm's {name} (timm): " in notes[0]
    assert notes[1] == "it was trained on images normalised otherwise than here: --views.mean=0.485,0.456,0.406"
    torch.manual_seed(7)
    theirs = create(name, **({"features_only": True} if backbone != name else {"num_classes": 0})).state_dict()
    ours = trainer.model.online.encoder.body.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def cached_repository(folder: Path, files: dict[str, Path]) -> Path:
    """As the hub's client keeps one: links into blobs."""
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name, path in files.items():
        os.replace(path, folder / "blobs" / name)
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", name))
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub with one repository, me/net@v1, that this machine has in its cache."""
    hub = pytest.importorskip("huggingface_hub")
    from safetensors.torch import save_file

    encoder = build_encoder("resnet10_tiny")
    save_file(encoder.body.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"backbone": "resnet10_tiny", "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}')
    files = {name: tmp_path / name for name in ("model.safetensors", "config.json")}
    snapshot, asked = cached_repository(tmp_path / "cache", files), []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        if repo != "me/net":
            raise hub.errors.LocalEntryNotFoundError("An error happened while trying to locate the file\nmore")
        if not (snapshot / file).exists():
            raise hub.errors.EntryNotFoundError(f"404: {file}")
        return str(snapshot / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return encoder, snapshot, asked


def test_pre_training_starts_from_a_repository_of_the_hub(tmp_path, hub) -> None:
    encoder, _, asked = hub
    trainer = trained_from(tmp_path / "run", "hf-hub:me/net@v1", "resnet10_tiny")
    notes = trainer.initialise()
    assert asked == [("me/net", "model.safetensors", "v1"), ("me/net", "config.json", "v1")]
    assert "tensors of the encoder matched" in notes[0] and "--views.mean=0.1,0.2,0.3" in notes[1]
    ours = trainer.model.online.encoder.body.state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in encoder.body.state_dict().items())


def test_a_repository_with_a_torch_file_only(hub, tmp_path) -> None:
    encoder, snapshot, asked = hub
    (snapshot / "model.safetensors").unlink()
    torch.save(encoder.body.state_dict(), snapshot / "pytorch_model.bin")
    source = read_initial("hf-hub:me/net", "resnet10_tiny")
    assert torch.equal(source.encoder()["conv1.weight"], encoder.body.conv1.weight)
    assert [file for _, file, _ in asked] == ["model.safetensors", "pytorch_model.bin"]


def test_a_repository_that_names_code_does_not_run_it(hub) -> None:
    _, snapshot, _ = hub
    (snapshot / "config.json").write_text('{"backbone": "own_encoders:failing"}')
    source = read_initial("hf-hub:me/net", "resnet10_tiny")
    weights.load_into(build_encoder("resnet10_tiny"), source)
    with pytest.raises(UsageError, match="is not imported because a file says so"):
        weights.encoder_of(source)


@pytest.mark.parametrize(
    "init, backbone, message",
    [
        ("torchvision", "resnet10_tiny", "init=torchvision: torchvision has no ImageNet weights of resnet10_tiny"),
        ("torchvision", "timm:resnet18", "torchvision has no ImageNet weights of timm:resnet18"),
        ("timm", "resnet10_tiny", "init=timm: timm has no weights of resnet10_tiny"),
        ("timm", "own_encoders:six_layers", "init=timm: timm has no weights of own_encoders:six_layers"),
        (
            "hf-hub:you/none",
            "resnet18",
            r"init=hf-hub:you/none: .* of you/none cannot be downloaded \(LocalEntry",
        ),
        ("hf-hub:net", "resnet18", r"init=hf-hub:net: must be hf-hub:OWNER/NAME"),
    ],
)
def test_weights_that_are_not_to_be_had(hub, init, backbone, message) -> None:
    with pytest.raises(UsageError, match=message):
        read_initial(init, backbone)


def test_without_network_the_cause_and_the_cache_are_named(monkeypatch) -> None:
    def offline(*_, **__):
        raise OSError("Name or service not known\nRetrying")

    monkeypatch.setattr(RESNET18, "get_state_dict", offline)
    with pytest.raises(UsageError, match=r"cannot be downloaded \(OSError: Name .* known\), and .*give a file"):
        read_initial("torchvision", "resnet18")
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"of timm:resnet18 cannot be downloaded \(OSError: .*not in the cache"):
        read_initial("timm", "timm:resnet18")


def test_a_run_that_goes_on_downloads_nothing(tmp_path, resnet18, monkeypatch) -> None:
    trained_from(tmp_path / "run", "torchvision").fit()
    monkeypatch.setattr(RESNET18, "get_state_dict", lambda self, **options: pytest.fail("downloaded"))
    config = Config.from_yaml(tmp_path / "run" / "config.yaml")
    config.resume, config.train.max_steps = "auto", 2
    assert SCRLTrainer(config, source=Pictures()).fit()["step"] == 2
