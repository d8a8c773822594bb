import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miss import functional
from tests import reference
from tests.strategies import DTYPES, Case, cases, tolerance


@given(cases())
def test_expand_is_the_oracles_delta(case: Case):
    d = case.layer().miss_D.detach()
    if case.method == "miss":
        dense = functional.expand_shards(d, case.out_features)
    else:
        dense = functional.expand_blocks(d, case.in_features, case.method == "alternating")
    expected = reference.delta(case.method, d, case.out_features, case.in_features)
    assert torch.equal(dense, expected)


@given(cases(max_size=7))
def test_oracle_agrees_with_itself(case: Case):
    layer, x = case.layer(), case.input().flatten()[: case.in_features]
    if len(x) < case.in_features:  # an empty batch
        return
    d = layer.miss_D.detach()
    dense = reference.delta(case.method, d, case.out_features, case.in_features)
    torch.testing.assert_close(
        reference.sharded(case.method, x, d, case.out_features), dense @ x, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", ["misse", "alternating"])
@given(st.integers(1, 40), st.data())
def test_block_sum_and_mean(method: str, in_features: int, data: st.DataObject):
    rank = data.draw(st.integers(1, in_features))
    dtype = data.draw(st.sampled_from(DTYPES))
    alternate = method == "alternating"
    x = torch.randn(
        3, in_features, generator=torch.Generator().manual_seed(in_features), dtype=torch.float64
    ).to(dtype)
    zero_one = reference.factor(method, rank, 1, in_features)
    exact, size = x.double() @ zero_one.T, x.double().abs() @ zero_one.abs().T
    bound = tolerance(dtype, size, in_features)
    total, mean = (f(x, rank, alternate) for f in (functional.block_sum, functional.block_mean))
    blocks = functional.block_factor(in_features, rank, torch.float16, alternate)
    assert blocks in (-(-in_features // rank), -(-in_features // (2 * rank)) * 2)
    for result in (total.double(), mean.double() * blocks):
        assert ((result - exact).abs() <= bound).all()
    assert total.dtype == mean.dtype == dtype


@pytest.mark.parametrize(
    ("in_features", "rank", "left"),
    [
        (12, 3, [0, 0, 0]),  # four whole blocks
        (12, 4, [1, 1, 1, 1]),  # three
        (10, 3, [0, 1, 1]),  # three and a short one
        (10, 4, [1, 1, 0, 0]),  # two and a short one
        (5, 5, [1, 1, 1, 1, 1]),
    ],
)
def test_a_common_mean_cancels_out_of_whole_pairs_and_else_counts_once(
    in_features: int, rank: int, left: list[int]
):
    x = torch.randint(-9, 10, (4, in_features)).double()  # whole numbers: every sum is exact
    means = torch.tensor([[1.0], [-3.0], [100.0], [2.0**40]], dtype=torch.float64)
    shifted = functional.block_sum(x + means, rank, alternate=True)
    kept = means * torch.tensor(left, dtype=torch.float64)
    assert torch.equal(shifted, functional.block_sum(x, rank, alternate=True) + kept)


def test_fp16_mean_in_chunks_equals_one_chunk(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(5, 7, 23).half()
    whole = functional.block_mean(x, 4)
    monkeypatch.setattr(functional, "_CHUNK", 50)
    assert torch.equal(functional.block_mean(x, 4), whole)
    assert torch.equal(functional.block_mean(x.transpose(0, 1), 4), whole.transpose(0, 1))
