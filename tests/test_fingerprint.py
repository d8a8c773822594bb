"""The oracles are loops over Python numbers, and share no code with the package."""

import itertools
import json
import math
import struct

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from miss import CheckpointError, MiSSeLinear, inject, merge, unmerge
from miss.fingerprint import KEY, check, differing, taken
from miss.tensors import positions
from miss.tree import Tree
from tests.models import Decoder

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = getattr(torch, "float8_e8m0fnu", E5M2)  # since torch 2.7
INF, NAN = math.inf, math.nan

SMALL = [(576, 576), (192, 576), (384, 1536), (1536, 576), (64, 3, 7, 7), (4, 8, 16), (64, 64)]
SMALL += [(131, 67), (3, 1000), (1, 129), (65, 1), (10, 10), (7, 5), (2, 64), (64, 2)]
LARGE = [(30522, 384), (49152, 576)]


class Weights(nn.Module):
    """Parameters by name, frozen."""

    def __init__(self, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def fingerprint(model: nn.Module, held=()):
    """As it is after a file."""
    description, values = taken(Tree(model), held)
    description = json.loads(json.dumps(description))
    check(description, values)
    return description, values


def apart(model: nn.Module, other: nn.Module) -> list[str]:
    """The names that differ in ``other``, by the fingerprint of ``model``."""
    return differing(Tree(other), *fingerprint(model))


def places(count: int, samples: int) -> list[int]:
    """The formula of the positions, in Python's integers."""
    n = min(samples, count)
    jumps = [i * (i + 1) // 2 * 7919 + i * 104729 for i in range(n)]
    return [i * count // n + jump % (count // n) for i, jump in enumerate(jumps)]


def elements(tensor: Tensor) -> list[float]:
    """In the order of the shape, whatever the strides are."""
    if tensor.dim() == 0:
        return [tensor.item()]
    found: list[float] = []
    for part in tensor:
        found += elements(part)
    return found


FORMATS = {F64: "d", F32: "f", F16: "e"}


def as_bytes(value: float, dtype: torch.dtype) -> bytes:
    if dtype == BF16:
        return struct.pack("=f", value)[2:]  # on little-endian machines, the upper half
    return struct.pack("=" + FORMATS[dtype], value)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(9, 13), (4, 8, 16), (3, 2, 5, 5), (2, 3), (1, 65)], ids=str)
def test_taken_is_the_description_and_the_bytes_at_the_positions(shape, dtype):
    flipped = torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])
    strided = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    weights = {"a": torch.randn(shape).to(dtype), "b": flipped, "c": strided}
    weights["d"] = torch.randn(shape[-1]).to(dtype).expand(shape)
    description, values = fingerprint(Weights(**weights))
    name = str(dtype).removeprefix("torch.")
    assert description == {key: [name, *shape] for key in weights}
    samples = 32 if dtype == F64 else 64
    expected = b""
    for tensor in weights.values():
        flat = elements(tensor)
        expected += b"".join(as_bytes(flat[i], dtype) for i in places(len(flat), samples))
    assert values.dtype == torch.uint8
    assert bytes(values.tolist()) == expected
    for key, tensor in weights.items():
        alike = Weights(**{key: tensor.contiguous()})
        assert differing(Tree(alike), *fingerprint(Weights(**{key: tensor}))) == []


@pytest.mark.parametrize("samples", [64, 32])
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_positions_spread_over_rows_and_columns(shape, samples):
    count, rows, columns = math.prod(shape), shape[0], shape[-1]
    found = places(count, samples)
    n = min(count, samples)
    assert len(set(found)) == n
    assert 0 <= min(found) <= max(found) < count
    assert len({i // (count // rows) for i in found}) == min(rows, n)
    assert len({i % columns for i in found}) >= min(columns, n) / 2
    if columns > 1:
        assert n / 3 <= sum(i % columns % 2 for i in found) <= 2 * n / 3


def test_a_parameter_takes_at_most_400_bytes():
    shapes = {"q": (576, 576), "up": (1536, 576), "embed": (49152, 576), "conv": (512, 512, 3, 3)}
    for dtype in (F64, F32, BF16, E4M3):
        model = nn.Module()
        for key, shape in shapes.items():
            weight = torch.zeros(1, dtype=dtype).expand(shape)
            inner = model
            for part in ("model", "layers", "29", f"self_attn_{key}_proj"):
                inner.add_module(part, inner._modules.get(part) or nn.Module())
                inner = inner._modules[part]
            inner.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        description, values = fingerprint(model)
        assert list(description) == [f"model.layers.29.self_attn_{k}_proj.weight" for k in shapes]
        assert values.numel() == 4 * min(256, 64 * dtype.itemsize)
        # A .safetensors file holds the text once more as JSON.
        assert len(json.dumps(json.dumps(description))) + values.numel() <= 4 * 400


def test_what_is_taken():
    model = inject(Decoder(), ["q_proj", "alias"], rank=2)
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    expected = []
    for name, parameter in model.named_parameters():  # the first name of each
        if parameter.dim() > 1 and not name.endswith("miss_D"):
            expected.append(names[id(parameter)])
    description, _ = fingerprint(model)
    ties = {name: entry for name, entry in description.items() if isinstance(entry, str)}
    assert [name for name in description if name not in ties] == expected
    assert ties == {"lm_head.weight": "embed.weight"}  # an alias of a module is no tie
    held = ["alias.weight", "lm_head.weight", "layers.0.mlp.0.weight"]  # any name
    without = {"layers.1.mlp.2.weight", "embed.weight", "layers.0.mlp.0.weight"}
    assert list(fingerprint(model, held)[0]) == [k for k in expected if k not in without]
    assert taken(Tree(model), expected) == ({}, None)
    check({}, None)
    assert differing(Tree(model), {}, None) == []
    assert KEY not in Decoder().state_dict()
    # Memory that two Parameters share is one too; other elements of it are not.
    weight = torch.randn(8, 8)
    views = Weights(a=weight, b=weight.view(8, 8), c=weight.T, d=weight[:4])
    assert [k for k, entry in fingerprint(views)[0].items() if entry != "a"] == ["a", "c", "d"]
    assert fingerprint(views)[0]["b"] == "a"
    assert list(fingerprint(views, ["b"])[0]) == ["c", "d"]


def test_names_are_looked_up_among_all_that_the_model_has():
    tied, untied = Decoder(), Decoder()
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    untied.load_state_dict(tied.state_dict())
    assert apart(untied, tied) == apart(tied, untied) == []  # lm_head.weight is in one file only
    with torch.no_grad():
        untied.lm_head.weight.add_(1)
    assert apart(untied, tied) == apart(tied, untied) == ["lm_head.weight"]
    wrapped = nn.DataParallel(tied)
    assert apart(tied, wrapped) == apart(wrapped, tied) == []
    del untied.layers[1], untied.alias
    missing = [name for name in fingerprint(tied)[0] if name.startswith("layers.1.")]
    assert len(missing) == 6
    assert apart(tied, untied) == ["lm_head.weight", *missing]


def test_while_merged_the_base_is_taken_and_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    description, values = fingerprint(model)
    inject(model, "0", rank=4)
    assert isinstance(model[0], MiSSeLinear)
    nn.init.normal_(model[0].miss_D)
    for verb in (merge, unmerge):
        verb(model)
        again, bits = fingerprint(model)
        assert (again, bits.tolist()) == (description, values.tolist())
        assert differing(Tree(model), description, values) == []
    merge(model)
    merged = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    merged.load_state_dict(model.state_dict())
    assert apart(model, merged) == ["0.weight"]


class Packed(nn.Parameter):
    """As of a library that packs weights in a subclass."""


def test_what_has_no_plain_values_is_neither_written_nor_checked():
    plain = Weights(a=torch.randn(4, 4), b=torch.randn(4, 4))
    shapeless = nn.parameter.UninitializedParameter(requires_grad=False)
    others = [
        nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False),
        nn.Parameter(torch.ones(8, 2, dtype=torch.int8), requires_grad=False),
        nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False),
        Packed(torch.ones(8, 2), requires_grad=False),
        shapeless,
    ]
    for other in others:
        model = Weights(a=plain.a.clone())
        model.register_parameter("b", other)
        assert list(fingerprint(model)[0]) == ["a"]
        assert apart(plain, model) == []
        assert apart(model, plain) == []
    empty = Weights(a=torch.empty(0, 4), b=torch.randn(4), c=torch.randn(()))
    assert taken(Tree(empty), ()) == ({}, None)
    assert apart(plain, Weights(a=plain.a[:3], b=plain.b.flatten())) == ["a", "b"]
    assert apart(plain, Weights(a=plain.a.view(2, 8), b=plain.b)) == ["a"]
    assert apart(plain, Weights(b=plain.b)) == ["a"]
    description, values = fingerprint(plain)
    other = Weights(a=torch.ones(4, 4), b=torch.ones(4, 4))
    with torch.device("meta"):  # nothing is made on the default device
        assert len(set(positions(100).tolist())) == 64
        assert [bits.tolist() for bits in fingerprint(plain)[1:]] == [values.tolist()]
        assert differing(Tree(other), description, values) == ["a", "b"]


def bits(value: int, dtype: torch.dtype) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = 8 * dtype.itemsize
    signed = value - (1 << size) if size > 8 and value >> (size - 1) else value
    return torch.tensor(signed, dtype=kinds[dtype.itemsize]).view(dtype)


EQUAL = [
    # one dtype: bit for bit, and NaN equals NaN
    (F32, 1.0, F32, 1.0, True),
    (F32, 1.0, F32, 1 + 2**-23, False),
    (F32, 0.0, F32, -0.0, False),
    (F32, INF, F32, INF, True),
    (F32, INF, F32, -INF, False),
    (F32, 2**-149, F32, 2**-149, True),
    (F32, 2**-149, F32, 0.0, False),
    (F32, NAN, F32, 1.0, False),
    (F32, bits(0x7FC00000, F32), F32, bits(0xFFC00001, F32), True),
    (F64, 1.0, F64, 1 + 2**-52, False),
    (F64, 5e-324, F64, 5e-324, True),
    (F64, 5e-324, F64, 0.0, False),
    (F64, NAN, F64, bits(0xFFF8000000000001, F64), True),
    (F16, 2**-24, F16, 2**-24, True),
    (F16, 2**-24, F16, 0.0, False),
    (F16, 0.0, F16, -0.0, False),
    (F16, bits(0x7E00, F16), F16, bits(0xFE01, F16), True),
    (BF16, 1.0, BF16, 1 + 2**-7, False),
    (BF16, 2**-133, BF16, 0.0, False),
    (BF16, bits(0x7FC0, BF16), BF16, bits(0xFFC1, BF16), True),
    # two: after a cast to the one of fewer significand bits
    (F32, 0.1, F16, 0.1, True),
    (F32, 0.1, F16, 0.1001, False),
    (F32, 1 + 2**-11, F16, 1.0, True),  # ties to even
    (F32, 1 + 2**-11 + 2**-23, F16, 1.0, False),
    (F32, 70000.0, F16, INF, True),
    (F32, -70000.0, F16, INF, False),
    (F32, 65519.0, F16, 65504.0, True),
    (F32, 65519.0, F16, INF, False),
    (F32, 65520.0, F16, INF, True),
    (F32, 2**-24, F16, 2**-24, True),
    (F32, 2**-25, F16, 0.0, True),
    (F32, 1e-9, F16, -0.0, False),
    (F32, -1e-9, F16, -0.0, True),
    (F32, NAN, F16, NAN, True),
    (F32, NAN, F16, INF, False),
    (F32, 0.1, BF16, 0.1, True),
    (F32, 1 + 2**-8, BF16, 1.0, True),
    (F32, 1 + 2**-8, BF16, 1 + 2**-7, False),
    (F32, 3.4028e38, BF16, INF, True),
    (F32, 2**-133, BF16, 2**-133, True),
    (F32, 2**-149, BF16, 0.0, True),
    (F64, 0.1, F32, 0.1, True),
    (F64, 0.1 + 1e-8, F32, 0.1, False),
    (F64, 1e300, F32, INF, True),
    (F64, 1e-300, F32, 0.0, True),
    (F64, 2**-149, F32, 2**-149, True),
    (F64, 0.1, F16, 0.1, True),
    (F64, 0.1, BF16, 0.1, True),
    (F64, 0.1, BF16, 0.101, False),
    # fp16 against bf16
    (F16, 0.1, BF16, 0.1, True),
    (F16, 0.1, BF16, 0.101, False),
    (F16, 1 + 4 * 2**-10, BF16, 1 + 2**-7, True),  # apart by 4 units, and the bound is 4.5
    (F16, 1 + 3 * 2**-10, BF16, 1 + 2**-7, False),
    (F16, 254 / 128, BF16, 255 / 128, True),  # apart by 8 units, and the bound is 8.97
    (F16, 1 + 338 / 1024, BF16, 1 + 43 / 128, True),  # the larger one counts
    (F16, 1 + 117 / 1024, BF16, 1 + 14 / 128, True),
    (F16, 1.0, BF16, -1.0, False),
    (F16, 0.0, BF16, -0.0, True),
    (F16, 0.0, BF16, 2**-24, True),
    (F16, 0.0, BF16, 2**-23, False),
    (F16, 2**-24, BF16, 2**-133, True),
    (F16, 65504.0, BF16, 65536.0, True),
    (F16, INF, BF16, 65536.0, True),
    (F16, INF, BF16, 3e38, True),
    (F16, INF, BF16, 65280.0, False),
    (F16, INF, BF16, -65536.0, False),
    (F16, INF, BF16, INF, True),
    (F16, INF, BF16, -INF, False),
    (F16, 65504.0, BF16, INF, False),
    (F16, 1.0, BF16, INF, False),
    (F16, NAN, BF16, NAN, True),
    (F16, NAN, BF16, 1.0, False),
    (F16, INF, BF16, NAN, False),
    (F16, NAN, BF16, INF, False),
    # fp8 only with the same fp8
    (E4M3, 1.0, E4M3, 1.0, True),
    (E4M3, 1.0, E4M3, 1.125, False),
    (E4M3, 0.0, E4M3, -0.0, False),
    (E4M3, 2**-9, E4M3, 2**-9, True),
    (E4M3, 2**-9, E4M3, 0.0, False),
    (E4M3, bits(0x7F, E4M3), E4M3, bits(0xFF, E4M3), True),
    (E5M2, bits(0x7D, E5M2), E5M2, bits(0xFE, E5M2), True),
    (E5M2, INF, E5M2, -INF, False),
    (E5M2, NAN, E5M2, INF, False),
    (E8M0, 2.0, E8M0, 2.0, True),
    (E8M0, 2.0, E8M0, 4.0, False),
    (E4M3, 1.0, E5M2, 1.0, False),
    (E4M3, 1.0, BF16, 1.0, False),
    (E4M3, 1.0, F32, 1.0, False),
    (E5M2, 1.0, F16, 1.0, False),
]


def of_value(value, dtype: torch.dtype) -> Weights:
    """Three Parameters; one element of the second is ``value``, all others are 1."""
    odd = torch.ones(2, 3, dtype=F32).to(dtype)
    element = value if isinstance(value, Tensor) else torch.tensor(value, dtype=F64).to(dtype)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    odd.view(kind)[1, 1] = element.view(kind)
    return Weights(a=torch.ones(3, 2), b=odd, c=torch.ones(70, 2))


@pytest.mark.parametrize(("one", "x", "two", "y", "same"), EQUAL)
def test_what_equal_means(one, x, two, y, same):
    models = of_value(x, one), of_value(y, two)
    for a, b in itertools.permutations(models):
        assert apart(a, b) == ([] if same else ["b"])


def test_copies_of_one_base_in_other_dtypes_are_one_base():
    torch.manual_seed(0)
    sizes = torch.logspace(-46, 38, 64).repeat_interleave(8)[:, None]  # all that fp32 has
    base, usual = torch.randn(512, 64).mul(sizes), 0.02 * torch.randn(512, 64)
    dtypes = (F64, F32, F16, BF16)
    copies = [Weights(a=base.to(dtype), b=usual.to(dtype)) for dtype in dtypes]
    for one, two in itertools.product(copies, copies):
        assert apart(one, two) == []


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_base_that_was_rounded_and_widened_is_another(dtype):
    base = Weights(a=torch.randn(32, 32))
    half = Weights(a=base.a.to(dtype))
    wide = Weights(a=half.a.float())
    assert apart(base, wide) == apart(wide, base) == ["a"]
    assert apart(half, wide) == apart(wide, half) == apart(half, base) == []


@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_a_sibling_is_noticed(shape):
    for seed in range(30 if shape in SMALL else 2):
        torch.manual_seed(seed)
        weight = 0.02 * torch.randn(shape)
        sibling = torch.randn(shape).mul_(1e-3).add_(1).mul_(weight)
        for dtype in (F32, F16, BF16):
            if dtype == F32 or weight.numel() >= 64:
                before, after = Weights(a=weight.to(dtype)), Weights(a=sibling.to(dtype))
                assert apart(before, after) == ["a"], (seed, dtype)


@pytest.mark.parametrize(
    "shape", [(576, 576), (64, 3, 7, 7), (4, 8, 16), (131, 67), (7, 5)], ids=str
)
def test_a_sibling_that_has_one_row_or_column_in_common_is_noticed(shape):
    model = Weights(a=torch.randn(shape))
    file = fingerprint(model)
    for axis, size in enumerate(shape):
        for i in range(size):
            other = Weights(a=model.a + 1)
            other.a.select(axis, i).copy_(model.a.select(axis, i))
            assert differing(Tree(other), *file) == ["a"], (axis, i)


def test_a_sibling_that_has_eight_rows_of_576_in_common_is_noticed():
    model = Weights(a=torch.randn(576, 576))
    file = fingerprint(model)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(576, generator=generator)[:8]
        start = int(torch.randint(569, (), generator=generator))
        for kept in (rows, torch.arange(start, start + 8)):
            other = Weights(a=model.a + 1)
            other.a[kept] = model.a[kept]
            assert differing(Tree(other), *file) == ["a"]


def changed(model: nn.Module, rows: list[Tensor]) -> nn.Module:
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight, own in zip(weights.values(), rows):
        weight[own] *= 1.001
    return Weights(**weights)


def test_changed_rows_are_noticed_as_often_as_64_values_can():
    """Each value lies in a row of its own, so of 576 rows 64 are seen, one in every nine."""
    missed = math.comb(512, 8) / math.comb(576, 8)  # all of eight, in one layer
    model = Weights(**{f"layer_{i}": torch.randn(576, 576) for i in range(7)})
    file, models, noticed, unseen = fingerprint(model), 200, 0, 0
    for seed in range(models):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(576, generator=generator)[:8] for _ in range(7)]
        found = differing(Tree(changed(model, rows)), *file)
        noticed, unseen = noticed + len(found), unseen + (not found)
    spread = math.sqrt(missed * (1 - missed) / (7 * models))
    assert noticed / (7 * models) == pytest.approx(1 - missed, abs=4 * spread)
    assert unseen <= 3  # 0.26 are expected, and more than 3 about once in 6,000 times
    one = Weights(a=model.layer_0)
    for start in range(576 - 16):  # 17 in a row hold all of some nine
        rows = [torch.arange(start, start + 17)]
        assert differing(Tree(changed(one, rows)), *fingerprint(one)) == ["a"]


BYTES = torch.zeros(6 * 4, dtype=torch.uint8)
GOOD = {"a": ["float32", 2, 3]}
MALFORMED = [
    (None, None),
    ([], None),
    ("a", BYTES),
    ({"a": None}, BYTES),
    ({"a": "float32"}, BYTES),
    ({"a": []}, BYTES),
    ({"a": ["float32"]}, BYTES),
    ({"a": ["float32", 6]}, BYTES),
    ({"a": ["float32", [2, 3]]}, BYTES),
    ({"a": {"float32": 0, "x": 2, "y": 3}}, BYTES),
    ({"a": [2, 3, "float32"]}, BYTES),
    ({"a": ["float32", 2, "3"]}, BYTES),
    ({"a": ["float32", 2, 3.0]}, BYTES),
    ({"a": ["float32", 6, True]}, BYTES),
    ({"a": ["float32", 2, None]}, BYTES),
    ({"a": ["float32", -2, -3]}, BYTES),
    ({"a": ["float32", 0, 3]}, BYTES[:0]),
    ({"a": ["float32", 2, 10**30]}, torch.zeros(64 * 4, dtype=torch.uint8)),
    ({"a": ["int32", 2, 3]}, BYTES),
    ({"a": ["complex64", 2, 3]}, BYTES),
    ({"a": ["Tensor", 2, 3]}, BYTES),
    ({"a": ["torch.float32", 2, 3]}, BYTES),
    ({"a": [["float32"], 2, 3]}, BYTES),
    ({1: ["float32", 2, 3]}, BYTES),
    (GOOD, None),
    (GOOD, [0] * 24),
    (GOOD, BYTES[:-1]),
    (GOOD, torch.zeros(25, dtype=torch.uint8)),
    (GOOD, BYTES.view(torch.int8)),
    (GOOD, BYTES.view(torch.float32)),
    (GOOD, BYTES[None]),
    (GOOD, BYTES.to("meta")),
    (GOOD, BYTES.to_sparse()),
    (GOOD | {"b": ["float64", 9, 9]}, BYTES),
    ({}, BYTES),
    ({"a": ["float16", 2, 3]}, BYTES),
    ({"a": ["float64", 4, 9]}, torch.zeros(36 * 8, dtype=torch.uint8)),
]


@pytest.mark.parametrize(("description", "values"), MALFORMED)
def test_a_malformed_fingerprint_is_refused(description, values):
    with pytest.raises(CheckpointError, match="fingerprint"):
        check(description, values)


def test_a_fingerprint_of_any_size_is_checked_and_compared():
    check(GOOD, BYTES)
    huge = {"a": ["float64", 2**62, 2**62], "b": ["float8_e5m2", 1, 1, 1]}
    values = torch.zeros(32 * 8 + 1, dtype=torch.uint8)
    check(huge, values)
    assert differing(Tree(Weights(a=torch.ones(2, 2))), huge, values) == ["a", "b"]


class Calls(TorchDispatchMode):
    """Which operations run, and how often."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_device_once_for_each_parameter():
    """On an accelerator these wait: a copy to or from it, a number or a size that is read."""
    waiting = {"_to_copy", "copy_", "_local_scalar_dense", "item", "nonzero", "lift_fresh"}
    waiting |= {"masked_select", "equal", "unique_dim", "_unique2", "cat"}
    found = []
    for count in (1, 30):
        dtypes = itertools.cycle([F32, BF16, F64])
        weights = {f"w{i}": torch.randn(9, 9 + i % 2).to(next(dtypes)) for i in range(3 * count)}
        weights |= {f"t{i}": torch.randn(9, 9).T for i in range(count)}
        model = Weights(**weights)
        with Calls() as calls:
            assert apart(model, model) == []
        found.append({name: calls.counts.get(name, 0) for name in waiting})
    assert found[0] == found[1]
