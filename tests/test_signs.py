"""What the explanation of alternating signs says of their sums."""

import pytest
import torch

from miss.functional import block_sum
from tests import reference

DRAWS = 200_000


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize(("k", "r"), [(12, 3), (15, 3), (14, 4), (5, 4)])
def test_the_expected_square_of_the_sums(k: int, r: int, alternate: bool):
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(k, generator=generator) + 0.5, torch.rand(k, generator=generator)
    noise = torch.randn(DRAWS, k, generator=generator, dtype=torch.float64)
    squares = block_sum(mean + variance.sqrt() * noise, r, alternate).square()
    for j in range(r):
        places = range(j, k, r)
        signs = [(-1) ** (c // r) if alternate else 1 for c in places]
        mean_part = sum(sign * float(mean[c]) for sign, c in zip(signs, places)) ** 2
        expected = mean_part + sum(float(variance[c]) for c in places)
        error = squares[:, j].std() / DRAWS**0.5
        assert abs(squares[:, j].mean() - expected) < 5 * error


@pytest.mark.parametrize("blocks", [2, 3, 8, 9])
def test_one_mean_for_all_inputs(blocks: int):
    mean = torch.full((blocks * 4,), 0.75, dtype=torch.float64)
    assert torch.allclose(block_sum(mean, 4), torch.full((4,), 0.75 * blocks).double())
    left = 0.75 if blocks % 2 else 0.0
    assert torch.equal(block_sum(mean, 4, alternate=True), torch.full((4,), left).double())


def test_signs_add_up_what_cancels_in_plain_sums():
    x = torch.tensor([1.0, 2.0, 3.0])
    opposite = torch.cat([x, -x, x, -x])
    assert torch.equal(block_sum(opposite, 3), torch.zeros(3))
    assert torch.equal(block_sum(opposite, 3, alternate=True), 4 * x)
    assert [reference.sign("alternating", c, 3) for c in range(6)] == [1, 1, 1, -1, -1, -1]
