"""The battery that every host goes through, with each form: a host's tests inherit `Battery`.

A subclass says how a layer and an input are made and, in plain float64 arithmetic, what the layer
computes with given weights; everything else follows.
"""

import copy
import pickle
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from miss import (
    AdaptedLayer,
    ShapeError,
    StateError,
    TargetError,
    adapter_parameters,
    adapter_state_dict,
    disabled,
    eject,
    inject,
    load,
    load_adapter_state_dict,
    merge,
    save,
    summary,
    unmerge,
    verify,
)
from miss.layers import host_of
from miss.layers.host import base_name, d_name
from miss.tensors import positions
from tests import reference
from tests.installed import ENVIRONMENT, ROOT
from tests.models import snapshot
from tests.strategies import DTYPES, OPTIONS, label_of, methods, tolerance

RUN = """
import sys, torch
sys.path.append(sys.argv[3])  # for the layer's own type
layer, x, y = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(layer(x), y), "another output"
import miss
miss.eject(layer)
assert type(layer).__name__ == sys.argv[2], type(layer)
"""

ranks = pytest.mark.parametrize("rank", [1, 3, "full"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Battery:
    """Inherit, and give the first three."""

    SIZES: ClassVar[tuple[int, int]] = (7, 10)  # of "out" and "in"
    STEP: ClassVar[float | None] = None  # where the layer rounds its weight: to multiples of this
    BLANK: ClassVar[int | None] = None  # a position of "in" at which the delta is zero
    FLOATING: ClassVar[bool] = True  # whether the input is; ids have no gradient, and no sign

    def layer(self, dtype: torch.dtype) -> nn.Module:
        """A fresh layer of `SIZES` with random weights."""
        raise NotImplementedError

    def input(self, dtype: torch.dtype) -> Tensor:
        """A random input."""
        raise NotImplementedError

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """What the layer computes with these Parameters, by its definition, in float64."""
        raise NotImplementedError

    def base(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(self.layer(dtype)).eval()
        return model.requires_grad_(False)  # torch chooses kernels by that flag

    def adapted(self, method: str, rank: int | str, dtype: torch.dtype = torch.float64, **options):
        """An adapted model, its layer, and a random D, of whole steps where the layer rounds."""
        model = self.base(dtype)
        rank = self.SIZES[method != "miss"] if rank == "full" else rank
        inject(model, "0", rank=rank, **{"scale": -0.5} | OPTIONS[method] | options)
        torch.manual_seed(1)
        with torch.no_grad():
            for d in adapter_parameters(model):
                d.copy_(torch.randn(d.shape))
                if self.STEP is not None:
                    d.copy_((d / self.STEP).round() * 2 * self.STEP)
        return model, model[0]

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(2)
        return self.input(dtype)

    def wanted(self, model: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        """An input, and what gradients are taken of: the input if it has one, and each D."""
        x = self.x().requires_grad_(self.FLOATING)
        return x, (*([x] if self.FLOATING else []), *adapter_parameters(model))

    def deltas(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """The dense delta of each Parameter from the loop oracle, in float64."""
        found = {}
        for parameter, config in layer.miss_configs.items():
            d = getattr(layer, d_name(parameter)).detach().double()
            delta = reference.delta_of(label_of(layer), d, config.shape, config.axes)
            found[parameter] = config.scale * self.blanked(delta, config.axes[1])
        return found

    def blanked(self, delta: Tensor, axis: int) -> Tensor:
        """A delta, set to zero in place at `BLANK` of the axis "in"."""
        if self.BLANK is not None:
            delta.select(axis, self.BLANK).zero_()
        return delta

    def exact(self, layer: AdaptedLayer, x: Tensor, size: bool = False) -> Tensor:
        """The output by definition, or the sum of the absolute values of its terms."""
        weights = {}
        for parameter, weight in self.rounded(layer).items():
            weights[parameter] = weight.abs() if size else weight
        for parameter, delta in self.deltas(layer).items():
            weights[parameter] = weights[parameter] + (delta.abs() if size else delta)
        if self.FLOATING:
            x = x.double().abs() if size else x.double()
        return self.output(weights, x)

    def rounded(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """The base's Parameters as it computes with them, in float64."""
        own = {}
        for name, parameter in layer._parameters.items():
            if not name.startswith("miss_D"):
                own[name] = parameter.detach().double()
        for name in layer.miss_configs if self.STEP is not None else ():
            own[name] = (own[name] / self.STEP).round() * self.STEP
        return own

    def bound(self, layer: AdaptedLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
        return tolerance(dtype, self.exact(layer, x, size=True), 2 * sum(self.SIZES))

    @methods
    @ranks
    @dtypes
    def test_zero_d_is_the_base_bit_for_bit(self, method, rank, dtype):
        model, layer = self.adapted(method, rank, dtype)
        layer.miss_reset_adapter()
        y, base = model(self.x(dtype)), self.base(dtype)(self.x(dtype))
        assert torch.equal(y, base)
        assert y.dtype == base.dtype

    @methods
    @ranks
    @dtypes
    def test_forward_equals_the_oracle(self, method, rank, dtype):
        model, layer = self.adapted(method, rank, dtype)
        x = self.x(dtype)
        y = model(x)
        assert y.dtype == dtype
        assert ((y.double() - self.exact(layer, x)).abs() <= self.bound(layer, x, dtype)).all()

    @methods
    @ranks
    def test_gradients_equal_those_of_the_dense_delta(self, method, rank):
        model, layer = self.adapted(method, rank)
        x, wanted = self.wanted(model)
        y = model(x)
        g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        got = torch.autograd.grad(y, wanted, g, retain_graph=True)
        weights = self.rounded(layer)
        for parameter in layer.miss_configs:
            weights[parameter] = weights[parameter] + layer.miss_delta_weight(parameter)
        want = torch.autograd.grad(self.output(weights, x), wanted, g)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    @methods
    def test_derivatives_of_first_and_second_order(self, method):
        model, layer = self.adapted(method, 2)
        names = [d_name(parameter) for parameter in layer.miss_configs]

        x, inputs = self.wanted(model)

        def forward(*inputs: Tensor) -> Tensor:
            ds = dict(zip(names, inputs[-len(names) :]))
            return torch.func.functional_call(layer, ds, (inputs[0] if self.FLOATING else x,))

        assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(forward, inputs)

    @methods
    @ranks
    def test_delta_window_and_positions_are_the_oracles(self, method, rank):
        _, layer = self.adapted(method, rank)
        for parameter, delta in self.deltas(layer).items():
            config = layer.miss_configs[parameter]
            d = config.scale * getattr(layer, d_name(parameter)).detach()
            assert torch.equal(layer.miss_delta_weight(parameter), delta)
            assert torch.equal(config.form.delta(d, config), delta)
            owner = config.form.owner(config.size, config.rank)
            spread = d.index_select(config.shared, owner).movedim(config.shared, -1)
            sign = config.form.sign(config.size, config.rank)
            spread = spread if sign is None else sign * spread
            spread = self.blanked(spread.movedim(-1, config.shared), config.axes[1])
            assert torch.equal(spread, delta)
            places = positions(delta.numel())
            assert torch.equal(config.form.at(d, config, places), delta.flatten()[places])
            for start in range(config.shape[0]):
                for stop in range(start + 1, config.shape[0] + 1):
                    window = config.form.window(d, config, slice(start, stop))
                    assert torch.equal(window, delta[start:stop])

    @methods
    @ranks
    @dtypes
    def test_merge_rounds_once_and_unmerge_restores_every_bit(self, method, rank, dtype):
        model, layer = self.adapted(method, rank, dtype)
        x, y = self.x(dtype), model(self.x(dtype))
        kept = {p: layer._parameters[p].detach().clone() for p in layer.miss_configs}
        deltas = self.deltas(layer)
        plain = eject(copy.deepcopy(model))
        names = {"0"} if len(kept) == 1 else {f"0.{p}" for p in kept}
        assert (set(merge(model)), layer.miss_merged) == (names, True)
        for parameter, base in kept.items():
            weight, exact = layer._parameters[parameter], base.double() + deltas[parameter]
            size = base.double().abs() + deltas[parameter].abs()
            once = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
            wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            assert ((weight.double() - exact).abs() <= once + 2 * wide * size).all()
            assert torch.equal(layer.get_buffer(base_name(parameter)), base)
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        with disabled(model):
            assert torch.equal(model(x), plain(x))
        plain.load_state_dict(state)
        assert torch.equal(model(x), plain(x))
        assert ((model(x) - y).double().abs() <= 2 * self.merged_bound(layer, x, dtype)).all()
        with pytest.raises(StateError, match="unmerge"):
            model.load_state_dict(state)
        with pytest.raises(StateError, match="unmerge"):
            model.train()(x)
        unmerge(model.eval())
        for parameter, base in kept.items():
            weight = layer._parameters[parameter]
            assert torch.equal(weight.view(torch.uint8), base.view(torch.uint8))
        assert torch.equal(model(x), y)

    def merged_bound(self, layer: AdaptedLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`bound`, and a step for each weight, which may be rounded otherwise once it is merged."""
        bound = self.bound(layer, x, dtype)
        if self.STEP is None:
            return bound
        steps = {name: torch.zeros_like(p) for name, p in self.rounded(layer).items()}
        for name in layer.miss_configs if dtype in (torch.bfloat16, torch.float16) else ():
            steps[name] += self.STEP  # the sum itself leaves the grid
        return bound + self.output(steps, x.double().abs())  # only floating inputs round

    @methods
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("merged", [False, True])
    def test_a_file_goes_round(self, method, suffix, merged, tmp_path):
        model, _ = self.adapted(method, 3)
        y = model(self.x())
        if merged:
            merge(model)
        save(model, tmp_path / f"a{suffix}")
        unmerge(model)
        fresh = load(self.base(), tmp_path / f"a{suffix}")
        assert repr(fresh) == repr(model)
        assert torch.equal(fresh(self.x()), y)
        other, _ = self.adapted(method, 3)
        for d in adapter_parameters(other):
            nn.init.zeros_(d)
        load(other, tmp_path / f"a{suffix}")
        assert torch.equal(other(self.x()), y)
        again, _ = self.adapted(method, 3)
        load_adapter_state_dict(again, adapter_state_dict(model))
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(self.x()), y)

    @methods
    def test_disabled_gives_the_base(self, method):
        model, _ = self.adapted(method, 3)
        y, x = model(self.x()), self.x()
        with disabled(model):
            assert torch.equal(model(x), self.base()(x))
            assert torch.equal(copy.deepcopy(model)(x), y)  # a copy is outside
        assert torch.equal(model(x), y)
        verify(model, x)

    @methods
    def test_dropout_acts_on_the_adapter_in_training_only(self, method):
        if not host_of(self.base()[0]).drops:
            with pytest.raises(ShapeError, match="cannot be dropped"):
                self.adapted(method, 3, dropout=0.5)
            return
        model, layer = self.adapted(method, 3, dropout=0.5)
        x = self.x()
        torch.manual_seed(4)
        one = model.train()(x)
        assert not torch.equal(one, model(x))
        torch.manual_seed(4)
        assert torch.equal(one, model(x))
        layer.miss_reset_adapter()
        assert torch.equal(model(x), self.base()(x))

    @methods
    @pytest.mark.parametrize("baked", [False, True])
    def test_eject_leaves_the_layer_as_it_was(self, method, baked):
        model = self.base()
        before = snapshot(model)
        plain = {name: p.detach().clone() for name, p in model.named_parameters()}
        inject(model, "0", rank=3, freeze=False, **OPTIONS[method])
        assert set(model.state_dict()) > set(plain)
        assert isinstance(model[0], AdaptedLayer)
        assert isinstance(model[0], type(self.base()[0]))
        eject(model, merge=baked)
        assert snapshot(model).keys() == before.keys()
        if not baked:
            assert snapshot(model) == before
        assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())

    @methods
    def test_pickle_and_deepcopy_and_a_process_that_registered_nothing(self, method, tmp_path):
        _, layer = self.adapted(method, 3)
        x, y = self.x(), layer(self.x())
        for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            assert repr(other) == repr(layer)
            assert torch.equal(other(x), y)
        if method != "alternating":  # a process takes seconds; this form needs its settings too
            return
        torch.save((layer, x, y), tmp_path / "layer")
        own = type(self.base()[0]).__name__
        command = [sys.executable, "-c", RUN, str(tmp_path / "layer"), own, str(ROOT)]
        run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert run.returncode == 0, run.stderr

    @methods
    @ranks
    def test_compiled_in_one_graph_equals_eager(self, method, rank):
        torch.compiler.reset()
        model, layer = self.adapted(method, rank)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, wanted = self.wanted(model)
        outputs = compiled(x), layer(x)
        torch.testing.assert_close(*outputs)
        for pair in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs)):
            torch.testing.assert_close(*pair)
        with disabled(layer):
            assert torch.equal(compiled(self.x()), self.base()(self.x()))

    @methods
    def test_transforms_of_functorch(self, method):
        _, layer = self.adapted(method, 3)
        x = self.x()
        names = [d_name(parameter) for parameter in layer.miss_configs]
        ds = {name: getattr(layer, name).detach() for name in names}
        many = {name: torch.stack([d, 2 * d, -d]) for name, d in ds.items()}

        def forward(ds: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, ds, (x,))

        def loss(ds: dict[str, Tensor]) -> Tensor:
            return forward(ds, x).square().sum()

        with torch.no_grad():
            got = torch.vmap(forward, (0, None))(many, x)
            want = [forward({name: d[k] for name, d in many.items()}, x) for k in range(3)]
            torch.testing.assert_close(got, torch.stack(want))
        _, tangent = torch.func.jvp(lambda ds: forward(ds, x), (ds,), (ds,))
        layer_base = layer(x)
        with disabled(layer):
            torch.testing.assert_close(tangent, layer_base - layer(x))
        each = torch.vmap(torch.func.grad(loss))(many)
        for k in range(3):
            alone = torch.func.grad(loss)({name: d[k] for name, d in many.items()})
            for name in names:
                torch.testing.assert_close(each[name][k], alone[name])

    @methods
    @half
    def test_autocast_gives_the_bases_dtype(self, method, dtype):
        model, layer = self.adapted(method, 3, torch.float32)
        x = self.x(torch.float32)
        with torch.autocast("cpu", dtype):
            y = model(x)
            with disabled(model):
                assert y.dtype == model(x).dtype
        exact = self.exact(layer, x.detach())
        assert ((y.double() - exact).abs() <= self.bound(layer, x.detach(), dtype)).all()
        y.float().sum().backward()
        assert all(d.grad.dtype == torch.float32 for d in adapter_parameters(model))

    @methods
    def test_only_adapters_are_trained(self, method):
        model, _ = self.adapted(method, 3)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(self.x()).square().sum().backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert p.requires_grad == ("miss_D" in name), name
            assert torch.equal(p, before[name]) != ("miss_D" in name), name

    @methods
    def test_meta_and_initialisers_leave_d_zero(self, method):
        model, layer = self.adapted(method, 3)
        model.to("meta").to_empty(device="cpu")
        assert not any(d.any() for d in adapter_parameters(model))
        model, layer = self.adapted(method, 3)
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
            assert not any(d.any() for d in adapter_parameters(model))
        assert hasattr(layer, "reset_parameters") == hasattr(self.base()[0], "reset_parameters")

    @methods
    def test_another_shape_is_an_error_and_never_another_form(self, method):
        for place in ("parameter", "d"):
            model, layer = self.adapted(method, 3)
            parameter = next(iter(layer.miss_configs))
            name = parameter if place == "parameter" else d_name(parameter)
            grown = nn.Parameter(torch.cat([layer._parameters[name].detach()] * 2))
            layer._parameters[name] = grown
            rule = r"(?s)another shape than when it was adapted.*eject"
            with pytest.raises(ShapeError, match=rule):
                model(self.x())

    @methods
    def test_settings_and_names(self, method):
        dropout = 0.25 if host_of(self.base()[0]).drops else 0.0
        model, layer = self.adapted(method, 3, dropout=dropout)
        configs = layer.miss_configs
        assert list(configs) == list(layer.miss_host.axes)
        for parameter, config in configs.items():
            assert (config.rank, config.scale, config.dropout) == (3, -0.5, dropout)
            assert config.d_shape == tuple(getattr(layer, d_name(parameter)).shape)
        assert (layer.miss_alternate, label_of(layer)) == (method == "alternating", method)
        rows = summary(model).layers
        said = [{"method": row.method, "alternate": row.alternate} for row in rows]
        assert said == [{"alternate": False} | OPTIONS[method]] * len(configs)
        assert ("alternating" in str(summary(model))) == layer.miss_alternate
        if type(layer).__repr__ is nn.Module.__repr__:
            assert repr(layer).count("alternate=True") == len(configs) * layer.miss_alternate
        assert [row.shape for row in rows] == [config.shape for config in configs.values()]
        with pytest.raises(TargetError, match="is not adapted"):
            layer.miss_delta_weight("nothing")
        if len(configs) > 1:
            for name in ("miss_rank", "miss_scale", "miss_dropout"):
                with pytest.raises(StateError, match="miss_configs"):
                    getattr(layer, name)
            return
        layer.miss_scale = 2
        assert (layer.miss_rank, layer.miss_scale, layer.miss_dropout) == (3, 2.0, dropout)
        for wrong in (float("nan"), "1", True):
            with pytest.raises(ShapeError, match="scale"):
                layer.miss_scale = wrong
        assert layer.miss_scale == 2.0

    @methods
    def test_nothing_of_the_layer_is_hidden(self, method):
        names = ("rank", "scale", "merged", "delta_weight", "reset_adapter", "dropout", "alternate")
        for place in ("attribute", "buffer", "Parameter", "child"):
            layer = self.base()[0]
            for name in names:
                value = {"attribute": "own", "child": nn.ReLU()}.get(place, torch.ones(2))
                if hasattr(layer, name):
                    continue
                if place == "buffer":
                    layer.register_buffer(name, value)
                else:
                    setattr(layer, name, nn.Parameter(value) if place == "Parameter" else value)
            own = {name: getattr(layer, name) for name in names}
            y = layer(self.x())
            inject(layer, type(layer), rank=3, **OPTIONS[method])
            assert all(getattr(layer, name) is value for name, value in own.items())
            assert torch.equal(layer(self.x()), y)
            eject(layer)
            assert all(getattr(layer, name) is value for name, value in own.items())
