"""`scrl_fast.pretrain` and `scrl_fast.embed`: the command as a function, heard through logging, and its features."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_trainer import Pictures, make_trainer

import scrl_fast
from scrl_fast.errors import UsageError
from scrl_fast.run.log import LOGGER

OPTIONS = {
    **{"data__workers": 0, "views__size": 32, "views__recipe": "simple", "boxes__min_size": 8, "boxes__per_image": 3},
    **{"model__hidden_dim": 16, "model__projection_dim": 8, "optim__warmup_epochs": 1, "run__tensorboard": False},
    **{"run__log_every": 2, "train__batch_size": 4, "train__precision": "fp32", "train__device": "cpu"},
}


def pretrain(out, **options):
    return scrl_fast.pretrain(
        **{"data": Pictures(), "model": "resnet10_tiny", "out": out, "epochs": 2, **OPTIONS, **options}
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        Image.fromarray(Pictures().read(index)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def result(tmp_path_factory, photos):
    return pretrain(tmp_path_factory.mktemp("run") / "a", data=photos)


# ---- pretrain ----


def test_it_is_the_trainer_bit_for_bit(tmp_path):
    result, trainer = pretrain(tmp_path / "function"), make_trainer(tmp_path / "trainer")
    summary = trainer.fit()
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(
            result.encoder.state_dict().values(), trainer.model.online.encoder.state_dict().values(), strict=True
        )
    )
    assert result.folder == tmp_path / "function" and not result.encoder.training
    assert result.metrics[-1]["loss"] == summary["loss"] == result.summary["loss"]
    assert result.metrics == [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert (result.folder / "checkpoints/last.pt").is_file() and result.summary["interrupted"] == ""


def test_every_option_is_reachable_and_spelled_one_way(tmp_path):
    out = tmp_path / "a"
    with pytest.raises(UsageError, match="unknown option 'optim__lrr'; did you mean 'optim__lr'"):
        pretrain(out, optim__lrr=0.3)
    with pytest.raises(UsageError, match=r"train\.batch_size=many: must be a whole number"):
        pretrain(out, train__batch_size="many")
    with pytest.raises(UsageError, match="train__epochs is given twice"):
        pretrain(out, train__epochs=3)
    with pytest.raises(UsageError, match=r"needs --data\.root"):
        scrl_fast.pretrain(data__source="folder", out=out)
    with pytest.raises(UsageError, match="neither a recipe"):
        pretrain(out, recipe="scrl_20ep")
    assert not out.exists()
    result = pretrain(out, recipe="byol_200ep", optim__lr="0.01", train__max_steps=1, compat="none")
    text = (result.folder / "config.yaml").read_text()
    assert "method: byol" in text and "lr: 0.01" in text and "max_steps: 1" in text and "hidden_dim: 16" in text


def test_a_network_of_ones_own_is_trained_in_place(tmp_path):
    layers = [torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3, 4, 1)]
    network = torch.nn.Sequential(*layers)
    before = network[0].weight.clone()
    result = pretrain(tmp_path / "a", model=network, train__max_steps=1)
    assert not torch.equal(network[0].weight, before)
    assert result.encoder(torch.rand(1, 3, 32, 32)).shape == (1, 12, 4, 4)
    assert scrl_fast.embed(np.zeros((40, 40, 3), np.uint8), weights=result, device="cpu").shape == (1, 12)


def test_rows_are_heard_and_may_stop_the_run(tmp_path):
    rows = []

    def listen(row):
        rows.append(row)
        return row["step"] >= 4

    result = pretrain(tmp_path / "a", on_row=listen, epochs=4)
    assert [row["step"] for row in rows] == [1, 2, 4] == [row["step"] for row in result.metrics]
    assert rows[-1]["loss"] == result.metrics[-1]["loss"]
    assert result.summary["interrupted"] == "on_row" and result.summary["step"] == 4
    rest = pretrain(tmp_path / "a", epochs=4, resume="auto")
    whole = pretrain(tmp_path / "b", epochs=4)
    pairs = zip(rest.encoder.state_dict().values(), whole.encoder.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_an_answer_that_is_neither_true_nor_false_costs_no_step(tmp_path):
    with pytest.raises((RuntimeError, ValueError), match="ambiguous"):
        pretrain(tmp_path / "a", on_row=lambda row: torch.zeros(2))
    assert (tmp_path / "a" / "checkpoints" / "last.pt").exists()


def test_an_error_of_the_listener_costs_no_step(tmp_path):
    def listen(row):
        if row["step"] == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pretrain(tmp_path / "a", on_row=listen)
    assert torch.load(tmp_path / "a/checkpoints/last.pt", weights_only=True)["step"] == 2


def test_messages_go_through_logging_alone(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO, logger="scrl_fast"):
        pretrain(tmp_path / "a")
    said = capfd.readouterr()
    assert not said.out and not said.err
    heard = [record.getMessage() for record in caplog.records if record.name == "scrl_fast"]
    text = (tmp_path / "a/log.txt").read_text()
    assert any("step 2/6" in line for line in heard) and all(line in text for line in heard)
    assert len(heard) == len(set(heard)) == len(text.splitlines())  # once each
    assert not LOGGER.handlers


def test_a_program_may_silence_it_and_log_txt_has_all(tmp_path, capfd, caplog):
    before = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)
    try:
        pretrain(tmp_path / "a")
    finally:
        LOGGER.setLevel(before)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert (
        "step 2/6" in (tmp_path / "a/log.txt").read_text() and "done: 6 steps" in (tmp_path / "a/log.txt").read_text()
    )


def test_what_modules_log_is_noted_once(tmp_path, photos, caplog):
    for place in range(12):
        (tmp_path / f"{place:02}.png").write_bytes((photos / f"{place:02}.png").read_bytes())
    (tmp_path / "05.png").write_bytes(b"no image")
    pretrain(tmp_path / "run", data=tmp_path, data__max_bad_fraction=0.5)
    lines = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "05.png" in line]
    assert len(lines) == 1 and sum("05.png" in record.getMessage() for record in caplog.records) == 1


def test_the_trainer_by_itself_speaks_as_before(tmp_path, capfd):
    make_trainer(tmp_path / "a").fit()
    assert "step 2/6" in capfd.readouterr().err


# ---- embed ----


def test_features_are_those_of_the_evaluation(result, photos):
    from scrl_fast.config.schema import ViewsConfig
    from scrl_fast.data.sources.files import image_folder
    from scrl_fast.evaluate.images import ImageLoader, pooled_features

    views = ViewsConfig(recipe="none", size=32)
    expected = pooled_features(result.encoder, image_folder(str(photos)), ImageLoader(views=views, workers=0))
    for weights in (result, result.folder, result.folder / "checkpoints/last.pt"):
        found = scrl_fast.embed(photos, weights=weights, device="cpu", batch_size=5)
        assert found.shape == (12, 64) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not result.encoder.training and all(p.requires_grad for p in result.encoder.parameters())  # as it was


def test_dense_maps_average_to_the_features(result, photos):
    options = {"weights": result, "device": "cpu"}
    maps = scrl_fast.embed(photos, dense=True, **options)
    assert maps.shape == (12, 64, 4, 4)
    torch.testing.assert_close(maps.mean((2, 3)), scrl_fast.embed(photos, **options), rtol=1e-4, atol=1e-5)
    assert scrl_fast.embed(photos, dense=True, size=64, **options).shape == (12, 64, 8, 8)


def test_every_form_of_an_image(result, photos):
    path = photos / "03.png"
    pixels = np.asarray(Image.open(path))
    options = {"weights": result, "device": "cpu"}
    expected = scrl_fast.embed(path, **options)
    assert expected.shape == (1, 64)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    for image in (str(path), pixels, Image.open(path), tensor, [tensor / 255]):
        torch.testing.assert_close(scrl_fast.embed(image, **options), expected)
    both = scrl_fast.embed([photos / "01.png", pixels], **options)
    torch.testing.assert_close(both[1:], expected, rtol=1e-4, atol=1e-5)


def test_a_long_embedding_says_how_far_it_is(result, photos, caplog, monkeypatch):
    monkeypatch.setattr("scrl_fast.evaluate.batches.Progress.FIRST", 0.0)
    caplog.set_level(logging.INFO, "scrl_fast")
    scrl_fast.embed(photos, weights=result, device="cpu", batch_size=6)
    assert any(re.match(r"features: (0|6) of 12 images", line) for line in caplog.messages)
    assert caplog.messages[-1].startswith("features: 12 images in ")


def test_what_cannot_be_embedded_is_named(result, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for images, message in (
        ([tmp_path / "a.jpg"], "a.jpg"),
        ([np.zeros((3, 3), np.uint8)], r"images\[0\]: image must be an array"),
        ([], "images is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            scrl_fast.embed(images, weights=result, device="cpu")
    with pytest.raises(UsageError, match="nothing"):
        scrl_fast.embed(np.zeros((9, 9, 3), np.uint8), weights=tmp_path / "nothing.pt")
