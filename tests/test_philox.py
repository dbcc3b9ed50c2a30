import numpy as np
import pytest

from scrl_fast.ops.philox import permutation, philox4x32, uniforms


def test_known_answers() -> None:
    # the vectors that the authors publish with Random123
    zeros, ones = np.zeros((4, 1), np.uint64), np.full((4, 1), 0xFFFFFFFF, np.uint64)
    assert philox4x32(zeros, zeros[:2, 0])[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32(ones, ones[:2, 0])[:, 0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_number_depends_on_its_own_key_only() -> None:
    together = uniforms(7, 3, [5, 9, 5, 1 << 40], 13)
    assert np.array_equal(together[1], uniforms(7, 3, [9], 13)[0])
    assert np.array_equal(together[1, :4], uniforms(7, 3, [9], 4)[0])
    assert np.array_equal(together[0], together[2])
    assert not np.isin(together[3], together[:3]).any()


def test_long_draws_are_worked_through_in_parts() -> None:
    long = uniforms(7, 3, np.arange(9000), 5)
    assert np.array_equal(long[8190:8195], uniforms(7, 3, np.arange(8190, 8195), 5))
    assert np.array_equal(long[4095:4098], uniforms(7, 3, np.arange(4095, 4098), 5))


def test_everything_that_should_tell_draws_apart_does() -> None:
    draws = [
        uniforms(0, 0, [0], 8),
        uniforms(1, 0, [0], 8),
        uniforms(1 << 40, 0, [0], 8),
        uniforms(-1, 0, [0], 8),
        uniforms(0, 1, [0], 8),
        uniforms(0, 0, [1], 8),
        uniforms(0, 0, [1 << 32], 8),
        uniforms(0, 0, [0], 8, stream=1),
        uniforms(0, 0, [0], 8, purpose=1),
    ]
    assert len(np.unique(np.concatenate(draws))) == 8 * len(draws)


def test_uniform() -> None:
    u = uniforms(3, 2, np.arange(20_000), 5)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.size) ** 0.5
    assert abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.03
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 120  # chi-square, 63 degrees of freedom


def test_permutation() -> None:
    order = permutation(0, 5, 1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, permutation(0, 6, 1000))
    assert not np.array_equal(order, permutation(1, 5, 1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    assert permutation(0, 0, 8).tolist() == [5, 0, 1, 6, 7, 2, 3, 4]  # of every machine and version


@pytest.mark.parametrize("bad", [{"epoch": -1}, {"epoch": 1 << 29}, {"stream": 8}, {"stream": -1}])
def test_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        uniforms(**{"seed": 0, "epoch": 0, "keys": [0], "count": 4, **bad})
