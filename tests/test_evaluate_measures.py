"""Each measure against an answer that is known: by hand, by a plain loop, or by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_roi_linear import Colours, identity_encoder
from torch import nn
from torch.nn import functional as F

from scrl_fast.config.schema import BoxesConfig, ViewsConfig
from scrl_fast.data import BadImage, DemoScenes
from scrl_fast.data.prefetch import prefetched
from scrl_fast.errors import UsageError
from scrl_fast.evaluate import knn as knn_module
from scrl_fast.evaluate.cache import FeatureCache, key_of
from scrl_fast.evaluate.dense import _scores, dense_consistency, similarity_maps, view_pairs
from scrl_fast.evaluate.images import ImageLoader, pooled_features
from scrl_fast.evaluate.knn import knn, nearest
from scrl_fast.evaluate.linear import LinearHeads, accuracies, feature_epochs, fit_heads
from scrl_fast.evaluate.pca import principal_components
from scrl_fast.evaluate.rank import rank
from scrl_fast.evaluate.result import TaskContext
from scrl_fast.models.heads import classification
from scrl_fast.schedules import learning_rate

# ---- k-NN ----


def votes_by_hand(train, labels, query, k, temperature, classes):
    cosines = [(float(np.dot(t, query) / np.linalg.norm(t) / np.linalg.norm(query)), -i) for i, t in enumerate(train)]
    scores = [0.0] * classes
    for cosine, i in sorted(cosines, reverse=True)[:k]:
        scores[labels[-i]] += math.exp(cosine / temperature)
    return sorted(range(classes), key=lambda c: -scores[c])


@pytest.mark.parametrize(("queries", "bank"), [(256, 65_536), (3, 7)])
def test_knn_is_the_vote_by_hand_in_any_blocks(monkeypatch, queries, bank):
    monkeypatch.setattr(knn_module, "QUERIES", queries)
    monkeypatch.setattr(knn_module, "BANK", bank)
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 5)), rng.normal(size=(11, 5))
    labels, truth = rng.integers(0, 7, 40), rng.integers(0, 7, 11)
    args = [torch.from_numpy(a) for a in (train, labels, test, truth)]
    for result in knn(*args, k=(1, 6, 40), temperature=0.2):
        ranked = [votes_by_hand(train, labels, query, result.k, 0.2, 7) for query in test]
        assert result.top1 == pytest.approx(np.mean([r[0] == t for r, t in zip(ranked, truth, strict=True)]))
        assert result.top5 == pytest.approx(np.mean([t in r[:5] for r, t in zip(ranked, truth, strict=True)]))


def test_nearest_breaks_ties_by_index_in_any_blocks(monkeypatch):
    rows = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=1)
    bank = F.normalize(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), dim=1)
    for size in (5, 2, 1):
        monkeypatch.setattr(knn_module, "BANK", size)
        assert nearest(rows, bank, 3)[1].tolist() == [[1, 2, 4], [0, 3, 1]]
    with pytest.raises(ValueError, match="k=6: the training set has 5 images"):
        nearest(rows, bank, 6)


# ---- linear ----


def test_heads_train_as_each_would_alone():
    """All heads in one product equal a plain Linear with its own SGD, learning rate by learning rate."""
    torch.manual_seed(0)
    features, labels, test = (
        torch.randn(40, 6),
        torch.randint(0, 3, (40,)),
        (torch.randn(9, 6), torch.randint(0, 3, (9,))),
    )
    lrs, epochs, batch = (0.5, 20.0), 3, 8
    epoch = feature_epochs(features, labels, batch, seed=3)
    plan = {"steps_per_epoch": 5, "epochs": epochs, "warmup_epochs": 1}
    found = fit_heads(epoch, test, batch_size=batch, classes=3, lrs=lrs, seed=7, **plan)
    for lr, result in zip(lrs, found, strict=True):
        start = LinearHeads(1, 6, 3, seed=7)
        alone = nn.Linear(6, 3)
        alone.load_state_dict({"weight": start.weights[0].detach(), "bias": start.biases[0].detach()})
        solver = torch.optim.SGD(alone.parameters(), lr=1.0, momentum=0.9, nesterov=True)
        history, step = [], 0
        for number in range(epochs):
            for rows, truth in epoch(number):
                solver.param_groups[0]["lr"] = learning_rate(step, base=lr * batch / 256, **plan)
                solver.zero_grad()
                F.cross_entropy(alone(rows), truth).backward()
                solver.step()
                step += 1
            history.append((alone(test[0]).argmax(1) == test[1]).double().mean().item())
        assert step == 15 and result.last_top1 == pytest.approx(history[-1])
        assert (result.best_top1, result.best_epoch) == (max(history), 1 + int(np.argmax(history)))
        assert result.last_top5 == 1.0  # of three classes


def test_epochs_over_features_show_each_row_once_in_a_new_order():
    features = torch.arange(10.0)[:, None]
    epoch = feature_epochs(features, torch.arange(10), 4)
    orders = [torch.cat([labels for _, labels in epoch(number)]).tolist() for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and len(set(orders[1])) == 8
    assert all(torch.equal(rows[:, 0].long(), labels) for rows, labels in epoch(5))


def test_top5_counts_the_first_five():
    logits = torch.arange(8.0).flip(0).repeat(8, 1)  # class 0 first, then 1, ...
    assert accuracies(lambda rows: rows[None], logits, torch.arange(8))[0].tolist() == [1 / 8, 5 / 8]


def test_the_online_probe_and_the_heads_share_their_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([0, 3, -1, 2, -1])
    loss, correct, count = classification(logits, labels)
    for head in range(2):
        kept = labels >= 0
        assert loss[head].item() == pytest.approx(F.cross_entropy(logits[head][kept], labels[kept]).item())
        assert correct[head] == (logits[head].argmax(1) == labels).sum()
    assert count == 3 and classification(logits, torch.full((5,), -1))[0].tolist() == [0, 0]
    assert classification(logits.bfloat16(), labels)[0].dtype == torch.float32


# ---- dense consistency ----


def test_retrieval_by_hand():
    image = torch.tensor([0, 0, 0, 1, 1, 2])  # image 2 has one pair and does not count
    left = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0], [0, 1], [1, 0]]), dim=1)
    right = F.normalize(torch.tensor([[1.0, 0], [1, 0.2], [1, 1.1], [1, 0.1], [0, 1], [1, 0]]), dim=1)
    hits = blind = across = 0.0
    matches, others = [], []
    for i in range(5):
        rivals = [j for j in range(6) if image[j] == image[i] and j != i]
        cosine = (left @ right.T).tolist()
        hits += (
            all(cosine[i][j] < cosine[i][i] for j in rivals) / 2 + all(cosine[j][i] < cosine[i][i] for j in rivals) / 2
        )
        everyone = [j for j in range(6) if j != i]
        across += all(cosine[i][j] < cosine[i][i] for j in everyone) / 2
        across += all(cosine[j][i] < cosine[i][i] for j in everyone) / 2
        blind += 1 / (len(rivals) + 1)
        matches.append(cosine[i][i])
        others.append(sum(cosine[i][j] for j in rivals) / len(rivals))
    expected = [hits, blind, across, sum(matches), sum(others), 5, 2]
    torch.testing.assert_close(_scores(left, right, image), torch.tensor(expected, dtype=torch.float64))
    assert _scores(left[:0], right[:0], image[:0]).tolist() == [0] * 7
    constant = torch.ones(3, 2) / 2**0.5
    assert _scores(constant, constant, image[:3])[0] == 0  # a collapsed encoder retrieves nothing


VIEWS = ViewsConfig(size=64, recipe="simple", scale=(0.4, 1.0))
BOXES = BoxesConfig(min_size=16, per_image=6)


def test_an_encoder_that_sees_colours_retrieves_and_a_blind_one_does_not():
    scenes = DemoScenes(24, 96, texture=0.8)
    sees = dense_consistency(identity_encoder().eval(), scenes, VIEWS, BOXES, batch_size=7)
    assert sees.retrieval > 1.7 * sees.chance and sees.cosine_gap > 0 and sees.retrieval_across < sees.retrieval
    blind = identity_encoder().eval()
    nn.init.zeros_(blind.body.conv1.weight)
    nn.init.ones_(blind.body.bn1.bias)
    assert dense_consistency(blind, scenes, VIEWS, BOXES).retrieval == 0
    again = dense_consistency(identity_encoder().eval(), scenes, VIEWS, BOXES, batch_size=24)
    # convolutions of other batches round otherwise, and of two cosines as good as equal the other may be the larger
    assert again.retrieval == pytest.approx(sees.retrieval, abs=2 / sees.pairs) and again.pairs == sees.pairs


def test_without_pairs_there_is_nothing_to_retrieve():
    with pytest.raises(ValueError, match=r"lower --boxes\.min_size=63"):
        dense_consistency(identity_encoder(), DemoScenes(4, 96), VIEWS, BoxesConfig(min_size=63))


def test_similarity_maps_show_the_place_itself():
    """Two equal views: each point is most similar to its own cell."""
    pair = view_pairs(DemoScenes(2, 96, texture=1.0), VIEWS, BOXES, range(2), photometric=False)
    view = pair.views[:1].repeat(2, 1, 1, 1)
    points = torch.tensor([[10.0, 50.0], [33.0, 21.0]])
    maps = similarity_maps(identity_encoder().eval(), view, points)
    assert maps.shape == (2, 16, 16)
    for each, (x, y) in zip(maps, points.long().tolist(), strict=True):
        torch.testing.assert_close(each[y // 4, x // 4], each.max())


# ---- rank, features, cache ----


def test_rank_of_features_that_are_known():
    torch.manual_seed(0)
    spread = rank(torch.linalg.qr(torch.randn(64, 8))[0])
    assert spread.rankme == pytest.approx(8, rel=1e-3) and spread.dead == 0
    flat = rank(torch.ones(64, 8))
    assert (
        flat.rankme == pytest.approx(1, rel=1e-3) and flat.feature_std == pytest.approx(0, abs=1e-6) and flat.dead == 8
    )
    assert spread.healthy_std == pytest.approx(8**-0.5) and (spread.dimensions, spread.images) == (8, 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_pooled_features_are_those_of_centre_crops(workers):
    data = Colours(9, seed=0)
    views = ViewsConfig(recipe="none", size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    found = pooled_features(identity_encoder().eval(), data, ImageLoader(views, 4, workers))
    from PIL import Image

    for i, row in enumerate(found):
        crop = Image.fromarray(data.read(i)[2:30, 2:30]).resize((32, 32), Image.Resampling.BICUBIC)
        expected = (torch.from_numpy(np.array(crop)).float() / 255 - 0.5) / 0.25
        torch.testing.assert_close(row, expected.mean((0, 1)), rtol=0, atol=0.01)


def test_images_that_cannot_be_read_stop_the_evaluation():
    class Broken(Colours):
        def read(self, index):
            raise BadImage(f"picture {index}", "cut off")

    with pytest.raises(UsageError, match="picture 0: cut off"):
        pooled_features(identity_encoder(), Broken(3, seed=0), ImageLoader(ViewsConfig(recipe="none", size=32)))
    assert list(prefetched(lambda x: x * x, range(9), 2)) == [x * x for x in range(9)]


@pytest.mark.parametrize("content", [[1], {}, {"features": [1, 2]}, {"features": {"x": 3}}, b"no archive"], ids=str)
def test_features_that_are_none_are_made_anew(tmp_path, content):
    def get():
        return FeatureCache(str(tmp_path)).get(lambda: ["parts"], lambda: {"x": torch.ones(2)})

    made = get()
    (path,) = tmp_path.glob("features-*.pt")
    path.with_name(path.name + ".sha256").unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert torch.equal(get()["x"], made["x"])


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch):
    def get(folder):
        told = []
        found = FeatureCache(folder, TaskContext(told.append)).get(lambda: ["parts"], lambda: {"x": torch.ones(2)})
        assert torch.equal(found["x"], torch.ones(2)) and len(told) == 1
        return told[0]

    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # in the place of the folder
    assert "not kept" in get("auto") and "not kept" in get(str(tmp_path / "file" / "in"))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)  # a folder that may not be searched
    monkeypatch.setattr("scrl_fast.atomic_files.write_synced", refuse)
    assert "not kept" in get(str(tmp_path / "locked"))


def test_cache_keys_tell_everything_apart():
    encoder = identity_encoder()
    values = [
        [1],
        [1.0],
        ["1"],
        [[1]],
        [1, 1],
        [np.array([1])],
        [np.array([[1]])],
        [torch.ones(2)],
        [torch.ones(2, 1)],
        [torch.ones(2, dtype=torch.float64)],
        [encoder],
    ]
    keys = [key_of(value) for value in values]
    assert len(set(keys)) == len(keys) and keys == [key_of(value) for value in values]
    encoder.body.conv1.to(memory_format=torch.channels_last)
    assert key_of([encoder]) == keys[-1]  # layout is no content
    encoder.body.bn1.running_mean[0] += 1e-6
    assert key_of([encoder]) != keys[-1]


# ---- principal components of dense features ----


def test_components_are_those_of_a_singular_value_decomposition():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    found = principal_components(features)
    rows = F.normalize(features.reshape(-1, 8).double(), dim=1)
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert found.shares == pytest.approx((values.square() / values.square().sum())[:3].tolist())
    projected = (rows - rows.mean(0)) @ directions[:3].T
    for place in range(3):
        colour = found.colours.reshape(-1, 3)[:, place].double()
        inside = (colour > 0) & (colour < 1)
        correlation = torch.corrcoef(torch.stack([colour[inside], projected[inside, place]]))[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-5)
    assert found.colours.shape == (3, 4, 5, 3) and found.cells == 60
    assert torch.equal(principal_components(features).colours, found.colours)


def test_two_kinds_of_cells_get_two_colours_that_hold_in_all_images():
    features = torch.zeros(2, 4, 4, 6)
    features[0, :2, :, 0] = features[0, 2:, :, 1] = features[1, :, :2, 0] = features[1, :, 2:, 1] = 1
    colours = principal_components(features * 7).colours
    assert torch.equal(colours[0, 0, 0], colours[1, 0, 0]) and torch.equal(colours[0, 3, 0], colours[1, 0, 3])
    assert abs(colours[0, 0, 0, 0] - colours[0, 3, 0, 0]) == 1
    assert torch.equal(colours[..., 1:], torch.full((2, 4, 4, 2), 0.5)) or colours[..., 1:].std() < 1e-6


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_a_collapsed_encoder_is_drawn_grey(channels):
    found = principal_components(torch.ones(2, 3, 3, channels))
    assert found.shares == (0.0, 0.0, 0.0) and torch.equal(found.colours, torch.full((2, 3, 3, 3), 0.5))
