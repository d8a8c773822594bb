"""The life of an adapter as a state machine.

Whatever the order of calls, outputs are those of a model of what they should be.
"""

import copy
import io
import pathlib
import pickle
import tempfile
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from torch import Tensor, nn

from miss import (
    CheckpointError,
    StateError,
    adapted_modules,
    adapter_parameters,
    adapter_state_dict,
    combine,
    disabled,
    eject,
    inject,
    load,
    load_adapter_state_dict,
    merge,
    save,
    unmerge,
)
from tests import reference
from tests.strategies import DTYPES, FORMS, OPTIONS, tolerance

SHAPES = {"a": (7, 10), "b": (12, 4), "c": (3, 9)}  # out, in
names = st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)
Settings = dict[str, tuple[str, int, float]]  # layer -> method, rank, scale


def kinds(config: Settings, state: dict[str, Tensor]) -> dict[str, tuple[str, torch.Size]]:
    """The form and the shape of each D of a state."""
    return {key: (config[key.split(".")[1]][0], d.shape) for key, d in state.items()}


class Bag(nn.Module):
    """Linear layers side by side, so that each output has a rounding error that can be bounded.

    One layer has two names.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(*SHAPES[name][::-1]) for name in SHAPES})
        self.alias = self.layers["a"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x[:, : layer.in_features]) for name, layer in self.layers.items()}


class Life(RuleBasedStateMachine):
    """A model of what the real one should be.

    It is ``base``, ``settings``, ``adapters``, ``merged`` and ``depth``.
    """

    states = Bundle("states")
    checkpoints = Bundle("checkpoints")

    @initialize(dtype=st.sampled_from(DTYPES))
    def build(self, dtype: torch.dtype):
        torch.manual_seed(0)
        self.model, self.x = Bag().to(dtype), torch.randn(2, 10).to(dtype)
        self.base = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.settings: Settings = {}
        self.adapters: dict[str, Tensor] = {}
        self.merged: set[str] = set()
        self.contexts: list[ExitStack] = []
        self.folder = tempfile.TemporaryDirectory()
        self.files = 0

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule(
        chosen=names,
        method=st.sampled_from(list(FORMS)),
        rank=st.integers(1, 3),
        scale=st.sampled_from([1.0, -0.5]),
    )
    def inject(self, chosen: set[str], method: str, rank: int, scale: float):
        targets = [f"layers.{name}" for name in sorted(chosen)]
        if chosen & set(self.settings):
            with pytest.raises(StateError):
                inject(self.model, targets, rank=rank)
            return
        inject(self.model, targets, rank=rank, **OPTIONS[method], scale=scale)
        for name in chosen:
            self.settings[name] = (method, rank, scale)
            self.adapters[name] = torch.zeros_like(self.layer(name).miss_D)
        self.leave_all()  # a new layer is outside of the contexts that are open

    @rule(bake=st.booleans())
    def eject(self, bake: bool):
        before = {name: self.layer(name).weight.detach().clone() for name in self.merged}
        expected = self.weights()
        eject(self.model, merge=bake)
        for name in self.settings if bake else ():
            self.assert_rounded(self.layer(name).weight, *expected[name])
            assert name not in before or torch.equal(self.layer(name).weight, before[name])
            for prefix in self.prefixes(name):
                self.base[f"{prefix}.weight"] = self.layer(name).weight.detach().clone()
        assert not adapted_modules(self.model)
        self.settings, self.adapters, self.merged = {}, {}, set()
        self.leave_all()

    @rule()
    def merge(self):
        if not self.settings:
            with pytest.raises(StateError, match="merge: the model has no adapter"):
                merge(self.model)
            return
        expected = self.weights()
        errors = merge(self.model)
        assert set(errors) == {f"layers.{name}" for name in self.settings}
        for name in self.settings:
            self.assert_rounded(self.layer(name).weight, *expected[name])
            delta = expected[name][0] - self.base[f"layers.{name}.weight"].double()
            lost = (self.layer(name).weight.double() - expected[name][0]).norm()
            error = float(lost / delta.norm()) if delta.any() else 0.0
            assert errors[f"layers.{name}"] == pytest.approx(error, rel=1e-3, abs=1e-6)
        self.merged = set(self.settings)

    @rule(name=st.sampled_from(sorted(SHAPES)))
    def merge_one(self, name: str):
        if name not in self.settings:
            with pytest.raises(StateError, match="merge: the model has no adapter"):
                merge(self.layer(name))
            return
        assert list(merge(self.layer(name))) == [""]
        self.merged.add(name)

    @rule()
    def unmerge(self):
        unmerge(self.model)
        self.merged = set()

    @rule()
    def enter_disabled(self):
        self.contexts.append(ExitStack())
        self.contexts[-1].enter_context(disabled(self.model))

    @rule()
    def leave_disabled(self):
        if self.contexts:
            self.contexts.pop().close()

    @rule(seed=st.integers(0, 99))
    def train_step(self, seed: int):
        if self.merged:
            with pytest.raises(StateError, match="unmerge"):
                self.model.train()(self.x)
            return
        y = self.model.train()(self.x)
        target, loss = torch.Generator().manual_seed(seed), torch.zeros(())
        for out in y.values():
            loss = loss + (out.float() * torch.randn(out.shape, generator=target)).sum()
        if self.contexts or not self.settings:
            return
        for d in adapter_parameters(self.model):
            d.grad = None
        loss.backward()
        torch.optim.SGD(adapter_parameters(self.model), lr=0.1).step()
        for name in self.settings:
            new = self.layer(name).miss_D.detach().clone()
            assert not torch.equal(new, self.adapters[name])
            self.adapters[name] = new

    @rule(target=states)
    def take_state(self):
        return dict(self.settings), adapter_state_dict(self.model)

    @rule(state=states)
    def put_state(self, state: tuple[Settings, dict[str, Tensor]]):
        own = {f"layers.{name}.miss_D": d for name, d in self.adapters.items()}
        fits = kinds(self.settings, own) == kinds(*state)
        if not fits or self.merged:
            with pytest.raises(StateError if self.merged else CheckpointError):
                load_adapter_state_dict(self.model, state[1])
            return
        load_adapter_state_dict(self.model, state[1])
        self.adapters = {key.split(".")[1]: d.clone() for key, d in state[1].items()}

    @rule(target=states, one=states, other=states, weight=st.sampled_from([1.0, -0.25]))
    def combine(
        self,
        one: tuple[Settings, dict[str, Tensor]],
        other: tuple[Settings, dict[str, Tensor]],
        weight: float,
    ):
        if not one[1] or kinds(*one) != kinds(*other):
            with pytest.raises(CheckpointError):
                combine([(one[1], weight), (other[1], 2.0)])
            return multiple()
        total = combine([(one[1], weight), (other[1], 2.0)])
        for key, d in total.items():
            exact = weight * one[1][key].double() + 2.0 * other[1][key].double()
            assert torch.equal(d, exact.to(d.dtype))
        return one[0], total

    @rule(target=checkpoints, suffix=st.sampled_from([".pt", ".safetensors"]))
    def save(self, suffix: str):
        path = pathlib.Path(self.folder.name, f"{self.files}{suffix}")
        self.files += 1
        if not self.settings:
            with pytest.raises(StateError, match="no adapter"):
                save(self.model, path)
            assert not path.exists()
            return multiple()
        save(self.model, path)
        return path, dict(self.settings), {name: d.clone() for name, d in self.adapters.items()}

    @rule(checkpoint=checkpoints)
    def load(self, checkpoint: tuple[pathlib.Path, Settings, dict[str, Tensor]]):
        path, config, adapters = checkpoint
        if self.merged or (self.settings and self.settings != config):
            with pytest.raises(StateError if self.merged else CheckpointError):
                load(self.model, path, any_base=True)
            return
        if not self.settings:
            self.leave_all()
        assert load(self.model, path, any_base=True) is self.model
        self.settings, self.adapters = (
            dict(config),
            {name: d.clone() for name, d in adapters.items()},
        )

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, how: str):
        if how == "deepcopy":
            model = copy.deepcopy(self.model)
        elif how == "pickle":
            model = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            model = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        self.leave_all()
        self.model = model

    @precondition(lambda self: self.merged and self.merged == set(self.settings))
    @rule()
    def deploy(self):
        """The state of a merged model is a plain model's."""
        plain = Bag().to(self.x.dtype)
        plain.load_state_dict(self.model.state_dict())
        self.leave_all()
        with torch.no_grad():
            outputs, on = plain(self.x), self.model.eval()(self.x)
        assert all(torch.equal(outputs[name], on[name]) for name in SHAPES)

    @rule()
    def load_base(self):
        state = self.model.state_dict()
        if self.merged:
            with pytest.raises(StateError, match="unmerge"):
                self.model.load_state_dict(state)
        else:
            self.model.load_state_dict(state)

    @invariant()
    def outputs_and_base_are_what_they_should_be(self):
        state, on = self.model.state_dict(), self.weights()
        own = {}
        for name in self.merged:
            own |= {f"{prefix}.weight": name for prefix in self.prefixes(name)}
        for key, tensor in self.base.items():
            if key in own:  # while merged, the sum
                self.assert_rounded(state[key], *on[own[key]])
                assert torch.equal(self.layer(own[key]).miss_base, tensor), key
            else:
                assert torch.equal(state[key], tensor), key
        keys = set(self.base)
        for name in set(self.settings) - self.merged:
            keys |= {f"{prefix}.miss_D" for prefix in self.prefixes(name)}
        assert set(state) == keys
        for name, d in self.adapters.items():
            assert torch.equal(self.layer(name).miss_D, d)
        assert {name for name in self.settings if self.layer(name).merged} == self.merged
        with torch.no_grad():
            outputs = self.model(self.x)
        for name, (weight, size) in self.weights(off=bool(self.contexts)).items():
            x, b = self.x[:, : weight.shape[1]].double(), self.layer(name).bias.double()
            bound = tolerance(self.x.dtype, x.abs() @ size.T + b.abs(), weight.shape[1] + 1)
            assert ((outputs[name].double() - (x @ weight.T + b)).abs() <= bound).all(), name
            if self.contexts or name not in self.settings:
                plain = nn.functional.linear(
                    self.x[:, : weight.shape[1]],
                    self.base[f"layers.{name}.weight"],
                    self.layer(name).bias,
                )
                assert torch.equal(outputs[name], plain)

    def layer(self, name: str) -> nn.Linear:
        return self.model.layers[name]

    @staticmethod
    def prefixes(name: str) -> tuple[str, ...]:
        """The names of a layer."""
        return (f"layers.{name}", "alias") if name == "a" else (f"layers.{name}",)

    def leave_all(self):
        while self.contexts:
            self.contexts.pop().close()

    def weights(self, off: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """What each layer's weight is in effect, from the oracle in float64.

        With it comes the sum of its terms' absolute values.
        """
        result = {}
        for name, (out_features, in_features) in SHAPES.items():
            weight = self.base[f"layers.{name}.weight"].double()
            delta = torch.zeros_like(weight)
            if name in self.settings and not off:
                method, _, scale = self.settings[name]
                delta = scale * reference.delta(
                    method, self.adapters[name].double(), out_features, in_features
                )
            result[name] = weight + delta, weight.abs() + delta.abs()
        return result

    def assert_rounded(self, weight: Tensor, exact: Tensor, size: Tensor):
        """``weight`` is ``exact``, summed in fp32 or wider and rounded to its dtype once."""
        wide = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
        bound = (
            torch.finfo(weight.dtype).eps / 2 * exact.abs()
            + 3 * wide * size
            + torch.finfo(weight.dtype).tiny
        )
        assert ((weight.detach().double() - exact).abs() <= bound).all()


TestLife = Life.TestCase
TestLife.settings = settings(settings.default, stateful_step_count=30)
