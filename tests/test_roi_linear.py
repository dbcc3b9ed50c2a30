"""RoI linear accuracy: the protocol treats all weights alike, exact where the answer is known, repeatable."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scrl_fast.config.schema import Config
from scrl_fast.data import DemoScenes
from scrl_fast.evaluate import demo_roi_linear, roi_linear, softmax_regression
from scrl_fast.evaluate.regions import BoxFeatures
from scrl_fast.evaluate.softmax_regression import fit
from scrl_fast.models import Encoder, build_encoder

module = importlib.import_module("scrl_fast.evaluate.regions")  # the package gives the name to the function


class Colours:
    """Grey images with squares of one of three colours: the class is the colour, its place is random."""

    def __init__(self, count: int, seed: int, sizes: tuple[int, ...] = (32,), squares: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self._items = []
        for i in range(count):
            size = sizes[i % len(sizes)]
            image = rng.integers(90, 160, (size, size, 3)).astype(np.uint8)
            labels = rng.integers(0, 3, squares if i % 4 else 0)  # every fourth image holds none
            boxes = np.zeros((len(labels), 4), np.float32)
            for k, label in enumerate(labels):
                x, y = 16 * k, int(rng.integers(0, size - 12))
                image[y : y + 12, x : x + 12] = 40
                image[y : y + 12, x : x + 12, label] = 220
                boxes[k] = x, y, x + 12, y + 12
            self._items.append((image, boxes, labels))

    def __len__(self):
        return len(self._items)

    def read(self, index):
        return self._items[index][0]

    def boxes(self, index):
        return self._items[index][1]

    def labels(self, index):
        return self._items[index][2]


def identity_encoder() -> Encoder:
    """A feature map that is the image itself, averaged over 4x4 pixels."""
    torch.manual_seed(0)
    body = nn.Module()
    body.conv1, body.bn1 = nn.Conv2d(3, 3, 4, 4, bias=False), nn.BatchNorm2d(3)
    body.conv1.weight.data = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4) / 16
    for name in ("relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        setattr(body, name, nn.Identity())
    return Encoder("identity", body, out_channels=3, stride=4)


def test_finds_what_lies_in_the_boxes():
    result = roi_linear(identity_encoder(), Colours(60, seed=0), Colours(40, seed=1))
    assert result.accuracy > 0.97
    assert (result.boxes, result.train_boxes, result.classes) == (60, 90, 3)


def test_labels_that_say_nothing_are_not_learned():
    test = Colours(200, seed=1)
    for _, _, labels in test._items:
        labels[:] = np.random.default_rng(len(labels)).permutation(labels + 1) % 3
    result = roi_linear(identity_encoder(), Colours(60, seed=0), test)
    assert result.accuracy < 0.6


def test_boxes_are_read_where_they_lie():
    shifted = Colours(40, seed=1)
    for _, boxes, _ in shifted._items:
        boxes[:, [0, 2]] = 31 - boxes[:, [2, 0]]  # mirrored: the other square, or none
    assert roi_linear(identity_encoder(), Colours(60, seed=0), shifted).accuracy < 0.7


def test_images_of_mixed_sizes_and_batches_give_the_same_answer():
    train, test = Colours(60, seed=0, sizes=(32, 48)), Colours(40, seed=1, sizes=(40, 32, 32))
    results = [roi_linear(identity_encoder(), train, test, batch_size=b, measure_batchnorm=False) for b in (1, 7, 128)]
    assert results[0].accuracy > 0.97
    for other in results[1:]:  # a convolution over another batch rounds otherwise, so a box may change sides
        assert other.accuracy == pytest.approx(results[0].accuracy, abs=1.5 / other.boxes)
        assert replace(other, accuracy=0.0, penalty=0.0) == replace(results[0], accuracy=0.0, penalty=0.0)


def test_the_encoder_is_left_alone_and_the_answer_repeats():
    torch.manual_seed(0)
    encoder = build_encoder("resnet10_tiny").train()
    before = copy.deepcopy(encoder.state_dict())
    results = [roi_linear(encoder, Colours(40, seed=0), Colours(20, seed=1)) for _ in range(2)]
    assert results[0] == results[1]
    assert encoder.training and all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_stored_batchnorm_statistics_do_not_matter():
    """Two encoders that differ in running statistics only are the same encoder to this protocol."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet10_tiny")
    other = copy.deepcopy(encoder)
    for norm in other.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.num_batches_tracked.fill_(1000)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 9)
    data = Colours(40, seed=0), Colours(20, seed=1)
    assert roi_linear(encoder, *data) == roi_linear(other, *data)


def test_batchnorm_statistics_are_plain_averages_over_the_first_images(monkeypatch):
    monkeypatch.setattr("scrl_fast.evaluate.images.STATISTICS_IMAGES", 20)
    encoder, data = identity_encoder().train(), Colours(60, seed=0)
    encoder.body.bn1.num_batches_tracked.fill_(1000)
    encoder.body.bn1.running_mean.fill_(9.0)
    module.measure_batchnorm_on_boxes(encoder, data, module.BoxLoader((0.5,) * 3, (0.25,) * 3, 10))
    first = torch.stack([torch.from_numpy(data.read(i)).float() for i in range(20)])  # two batches of ten
    cells = ((first / 255 - 0.5) / 0.25).view(20, 8, 4, 8, 4, 3).mean((2, 4)).flatten(0, 2)
    torch.testing.assert_close(encoder.body.bn1.running_mean, cells.mean(0))
    torch.testing.assert_close(encoder.body.bn1.running_var, cells.var(0), rtol=0.05, atol=0)


def test_channel_scale_does_not_matter():
    """Standardised features: a channel a thousand times weaker than its neighbours is heard as well."""
    encoder = identity_encoder()
    faint = copy.deepcopy(encoder)
    faint.body.conv1.weight.data *= torch.tensor([1.0, 1e-4, 1e-4]).view(3, 1, 1, 1)
    data = Colours(60, seed=0), Colours(40, seed=1)
    plain, scaled = (roi_linear(e, *data, measure_batchnorm=False) for e in (encoder, faint))
    assert plain.accuracy == pytest.approx(scaled.accuracy, abs=0.02)


def test_the_penalty_is_chosen_by_images_held_back():
    """Two useful features among two hundred of noise want a strong penalty, ten classes on one axis a weak one."""
    rng = np.random.default_rng(0)
    coarse, fine = rng.integers(0, 2, 200), rng.integers(0, 10, 200)
    hidden = rng.normal(size=(200, 202)) + np.where(np.arange(202) < 2, coarse[:, None], 0)
    ordered = fine[:, None] + 0.1 * rng.normal(size=(200, 1))
    chosen = []
    for features, labels in ((hidden, coarse), (ordered, fine)):
        samples = BoxFeatures(torch.from_numpy(features), torch.from_numpy(labels), torch.arange(200))
        chosen.append(module.classify(samples, samples)[0].penalty)
    assert chosen[0] >= 1e-2 and chosen[1] <= 1e-4


def test_classifier_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the other solver here")
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(300, 7)), rng.integers(0, 4, 300)
    features[:, 0] += labels
    penalty = 1e-2
    (ours,) = fit(torch.from_numpy(features), torch.from_numpy(labels), 4, [penalty])
    theirs = linear_model.LogisticRegression(C=1 / (2 * penalty * 300), tol=1e-10, max_iter=2000).fit(features, labels)
    torch.testing.assert_close(ours[:-1].T, torch.from_numpy(theirs.coef_), rtol=1e-3, atol=1e-4)


def test_demo_protocol_runs_on_the_configured_scenes(monkeypatch):
    monkeypatch.setattr(softmax_regression, "LBFGS_STEPS", 5)  # which answer is not the question here
    config = Config()
    config.data.demo_images, config.data.demo_size, config.eval.scenes = 24, 48, 12
    torch.manual_seed(0)
    encoders = {"random": build_encoder("resnet10_tiny"), "other": build_encoder("resnet10_tiny")}
    results = demo_roi_linear(encoders, config)
    train, test = DemoScenes(24, 48, config.train.seed), DemoScenes(12, 48, config.train.seed, "test")
    assert results == {name: roi_linear(encoder, train, test) for name, encoder in encoders.items()}
    assert demo_roi_linear(encoders, config, train=train) == results
    assert results["random"].classes == 10 and results["random"].boxes > 12


def test_without_boxes_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="test holds no boxes in its 8 images"):
        roi_linear(identity_encoder(), Colours(60, seed=0), Colours(8, seed=0, squares=0))
