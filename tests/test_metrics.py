"""The collapse monitors on features whose collapse is known, and the meter that never waits."""

from __future__ import annotations

import math

import pytest
import torch

from scrl_fast.metrics import StepMeter, feature_std, rankme


def test_feature_std_of_spread_features_is_one_over_root_d():
    features = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(features).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)


def test_feature_std_does_not_see_length_and_is_zero_when_collapsed():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.linspace(0.1, 9, 50, dtype=torch.float64)[:, None]
    assert feature_std(features * lengths).item() == pytest.approx(feature_std(features).item(), rel=1e-12)
    assert feature_std(features[:1] * lengths).item() == pytest.approx(0, abs=1e-7)


def test_rankme_counts_directions():
    q = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert rankme(q).item() == pytest.approx(8, rel=1e-4)  # eight equal singular values
    assert rankme(q[:, :1] @ q[:8, :1].T).item() == pytest.approx(1, rel=1e-3)
    two = q * torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    assert rankme(two).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows_and_every_dtype_give_numbers(rows, dtype):
    features = torch.ones(rows, 4, dtype=dtype)
    assert feature_std(features).item() == pytest.approx(0, abs=1e-6)
    assert rankme(features).item() == pytest.approx(min(rows, 1), abs=1e-3)
    assert rankme(torch.zeros(rows, 4, dtype=dtype)).item() == 0


def test_non_finite_features_give_nan_not_an_error():
    features = torch.randn(5, 4)
    features[2, 1] = math.inf
    assert math.isnan(rankme(features).item())
    assert math.isnan(feature_std(features).item())


@pytest.mark.parametrize("monitor", [feature_std, rankme])
def test_a_wrong_shape_is_named(monitor):
    with pytest.raises(ValueError, match=r"features must have shape \[N, D\], got \[2, 3, 4\]"):
        monitor(torch.zeros(2, 3, 4))


def test_monitors_leave_no_graph():
    features = torch.randn(6, 4, requires_grad=True)
    assert not feature_std(features).requires_grad
    assert not rankme(features).requires_grad


def test_meter_returns_each_step_once_in_order_with_device_and_host_numbers():
    meter = StepMeter()
    assert meter.drain() == []
    for step in range(3):
        meter.add([torch.tensor(float(step), requires_grad=True), torch.tensor(step, dtype=torch.int32)], 10 * step)
    assert meter.drain() == [[0, 0, 0], [1, 1, 10], [2, 2, 20]]
    assert meter.drain() == []
