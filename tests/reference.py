"""A slow oracle, written from the paper's equations loop by loop.

It shares no code with the package.
"""

import torch
from torch import Tensor


def shard_sizes(out_features: int, shards: int) -> list[int]:
    """Rows dealt out one at a time: sizes differ by at most one, larger first."""
    sizes = [0] * shards
    for row in range(out_features):
        sizes[row % shards] += 1
    return sizes


def shard_of(out_features: int, shards: int) -> list[int]:
    """For each row, the number of its shard."""
    rows: list[int] = []
    for shard, size in enumerate(shard_sizes(out_features, shards)):
        rows += [shard] * size
    return rows


def sign(method: str, c: int, rank: int) -> int:
    """That of column ``c`` of the delta: of every other block a minus, if signs alternate."""
    return -1 if method == "alternating" and c // rank % 2 else 1


def unsigned(method: str) -> str:
    """The form of the same terms without signs; of absolute values it bounds the rounding."""
    return "misse" if method == "alternating" else method


def delta(method: str, d: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense delta at scale 1, entry by entry."""
    shard, rank = shard_of(out_features, d.shape[0]), d.shape[1]
    dense = []
    for o in range(out_features):
        row = []
        for c in range(in_features):
            if method == "miss":
                row.append(d[shard[o], c])
            else:
                row.append(sign(method, c, rank) * d[o, c % rank])
        dense.append(torch.stack(row))
    return torch.stack(dense)


def delta_of(method: str, d: Tensor, shape: tuple[int, ...], axes: tuple[int, int]) -> Tensor:
    """The dense delta at scale 1 of a matrix with "out" and "in" at ``axes``, entry by entry.

    If axes of a kernel follow, it is the matrix of each of the kernel's positions.
    """
    if len(shape) > 2:
        positions = [delta_of(method, at, shape[:2], axes) for at in d.flatten(2).unbind(2)]
        return torch.stack(positions, dim=2).reshape(shape)
    if axes == (1, 0):
        return delta(method, d.T, shape[1], shape[0]).T
    return delta(method, d, *shape)


def factor(method: str, rank: int, out_features: int, in_features: int) -> Tensor:
    """The frozen factor, of 0 and 1 (or -1), that makes the form a LoRA.

    It is A, ``(r, in)``, of MiSSe, or B, ``(out, r)``, of MiSS.
    """
    if method != "miss":
        a = torch.zeros(rank, in_features, dtype=torch.float64)
        for c in range(in_features):
            a[c % rank, c] = sign(method, c, rank)
        return a
    b = torch.zeros(out_features, rank, dtype=torch.float64)
    for o, shard in enumerate(shard_of(out_features, rank)):
        b[o, shard] = 1
    return b


def sharded(method: str, x: Tensor, d: Tensor, out_features: int) -> Tensor:
    """``expand(D) x`` for one input vector, as the equations write it.

    MiSSe goes block by block (Eq. 4-7), MiSS shard by shard (Eq. 2-3).
    """
    if method != "miss":
        rank = d.shape[1]
        padded = torch.cat([x, x.new_zeros(-len(x) % rank)])
        starts = range(0, len(padded), rank)
        s = sum(sign(method, start, rank) * padded[start : start + rank] for start in starts)
        return torch.stack([sum(d[o, j] * s[j] for j in range(rank)) for o in range(out_features)])
    rows = []
    for shard, size in enumerate(shard_sizes(out_features, d.shape[0])):
        rows += [sum(d[shard, c] * x[c] for c in range(len(x)))] * size
    return torch.stack(rows)


def output(
    method: str, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float
) -> Tensor:
    """``x (W0 + scale * expand(D))^T + b`` in the dtype of the arguments; call it with float64."""
    y = x @ (weight + scale * delta(method, d, *weight.shape)).T
    return y if bias is None else y + bias
