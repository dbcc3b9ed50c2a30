"""Encoders whose BatchNorm, ReLU and residual are one operation: same names, same numbers up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_trainer import Pictures, make_config
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from scrl_fast.errors import UsageError
from scrl_fast.models import build_encoder
from scrl_fast.models.fused_norm import BatchNormAct, fuse_norms
from scrl_fast.ops import backends
from scrl_fast.trainer import SCRLTrainer


def twins(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    network = network.double().to(memory_format=torch.channels_last)
    return network, copy.deepcopy(network)


def passed(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = network(images)
    output.square().sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def images(count: int = 2, size: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return values.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet10_tiny", "resnet18", "resnet50"])
def test_encoders_compute_what_they_did(name: str) -> None:
    torch.manual_seed(0)
    plain, fused = twins(build_encoder(name))
    count = fuse_norms(fused)
    assert count == sum(1 for module in plain.modules() if isinstance(module, nn.BatchNorm2d)) - downsampling(plain)
    assert list(plain.state_dict()) == list(fused.state_dict())
    (one, grads), (other, fused_grads) = passed(plain, images()), passed(fused, images())
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    for parameter, grad in grads.items():
        torch.testing.assert_close(fused_grads[parameter], grad, rtol=1e-6, atol=1e-7 * float(grad.abs().max()))
    for key, value in plain.state_dict().items():  # running statistics, counters
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()), rtol=1e-9, atol=1e-9)


def downsampling(network: nn.Module) -> int:
    return sum(1 for name, _ in network.named_modules() if name.endswith("downsample"))


def test_a_copy_stays_fused_and_loads_the_same_names(tmp_path) -> None:
    network = resnet18()
    fuse_norms(network)
    twin = copy.deepcopy(network)
    assert type(twin.layer1[0].bn2) is BatchNormAct and twin.layer1[0].bn2 is not network.layer1[0].bn2
    torch.save(network, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    x = images().float()
    assert torch.equal(loaded.eval()(x), network.eval()(x))
    resnet18().load_state_dict(network.state_dict())


def test_a_relu_behind_a_norm_in_a_sequential_is_taken_and_nothing_else() -> None:
    class OwnNorm(nn.BatchNorm2d):
        pass

    def own() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.GELU(), OwnNorm(8), nn.ReLU())
        return nn.Sequential(*layers)

    plain, fused = twins(own())
    assert fuse_norms(fused) == 1 and type(fused[5]) is OwnNorm and type(fused[3]) is nn.BatchNorm2d
    assert list(plain.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(passed(fused, images())[0], passed(plain, images())[0])
    assert fuse_norms(fused) == 0  # once is enough


def test_timm_blocks() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain, fused = twins(timm.create_model("resnet26", num_classes=0))
    assert fuse_norms(fused) == 1 + 2 * 8  # stem, and two norms of each bottleneck; the addition stays timm's
    assert list(plain.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(passed(fused, images())[0], passed(plain, images())[0], rtol=1e-8, atol=1e-8)


def test_blocks_with_other_norms_stay_as_they_are() -> None:
    network = resnet50(norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert fuse_norms(network) == 0


def test_training_with_and_without(tmp_path) -> None:
    rows = {}
    for fused in (False, True):
        config = make_config(tmp_path / str(fused), epochs=1)
        config.model.fused_norm = fused
        trainer = SCRLTrainer(config, source=Pictures())
        assert any(isinstance(module, BatchNormAct) for module in trainer.model.modules()) is fused
        trainer.fit()
        rows[fused] = trainer.model.state_dict()
    assert list(rows[True]) == list(rows[False])
    for name, value in rows[False].items():
        torch.testing.assert_close(rows[True][name], value, rtol=2e-2, atol=2e-3)


def test_an_encoder_without_such_norms_is_refused(tmp_path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3, stride=8, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    config = make_config(tmp_path)
    config.model.fused_norm = True
    with pytest.raises(UsageError, match=r"model\.fused_norm=true"):
        SCRLTrainer(config, source=Pictures(), encoder=Bare())


def test_the_reference_serves_where_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.setenv("SCRL_FAST_BACKEND", "reference")
    backends.forget()
    plain, fused = twins(resnet18())
    fuse_norms(fused)
    torch.testing.assert_close(passed(fused, images())[0], passed(plain, images())[0], rtol=1e-9, atol=1e-9)
