import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miss import functional
from tests import reference
from tests.strategies import DTYPES, Case, cases, tolerance


@given(cases())
def test_expand_is_the_oracles_delta(case: Case):
    layer = case.layer()
    expand = functional.expand_blocks if case.method == "misse" else functional.expand_shards
    size = case.in_features if case.method == "misse" else case.out_features
    expected = reference.delta(
        case.method, layer.miss_D.detach(), case.out_features, case.in_features
    )
    assert torch.equal(expand(layer.miss_D.detach(), size), expected)


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


@given(st.integers(1, 40), st.data())
def test_block_sum_and_mean(in_features: int, data: st.DataObject):
    rank = data.draw(st.integers(1, in_features))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.randn(
        3, in_features, generator=torch.Generator().manual_seed(in_features), dtype=torch.float64
    ).to(dtype)
    exact = torch.stack([x.double()[:, j::rank].sum(-1) for j in range(rank)], -1)
    bound = tolerance(
        dtype,
        torch.stack([x.double()[:, j::rank].abs().sum(-1) for j in range(rank)], -1),
        in_features,
    )
    blocks = -(-in_features // rank)
    for result in (
        functional.block_sum(x, rank).double(),
        functional.block_mean(x, rank).double() * blocks,
    ):
        assert ((result - exact).abs() <= bound).all()
    assert functional.block_sum(x, rank).dtype == functional.block_mean(x, rank).dtype == dtype


def test_fp16_mean_in_chunks_equals_one_chunk(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(5, 7, 23).half()
    whole = functional.block_mean(x, 4)
    monkeypatch.setattr(functional, "_CHUNK", 50)
    assert torch.equal(functional.block_mean(x, 4), whole)
    assert torch.equal(functional.block_mean(x.transpose(0, 1), 4), whole.transpose(0, 1))
