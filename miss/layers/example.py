"""The check of a host by an example of its layer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from miss.errors import MissError, StateError, TargetError
from miss.layers.base import AdaptedLayer
from miss.layers.host import d_name
from miss.layers.swap import largest_rank, new_adapter, swap_

__all__ = ["check_example"]


def check_example(layer_type: type[nn.Module], cls: type[AdaptedLayer], example: Any) -> None:
    """Adapt copies of a layer and compare outputs.

    Args:
        layer_type: the layer's own type.
        cls: the class of its adapted form.
        example: ``(layer, input)``, or ``(layer, (inputs...))``; not changed.

    Raises:
        TargetError: the example is not such a pair.
        StateError: the host does not describe the layer; the message says which check failed.
    """
    if not isinstance(example, tuple) or len(example) != 2 or type(example[0]) is not layer_type:
        expected = f"(a {layer_type.__name__}, its input)"
        raise TargetError("is not of the registered type", expected=expected, actual=repr(example))
    layer, given = example
    args = given if isinstance(given, tuple) else (given,)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _compare(layer, cls, args)
    except MissError:
        raise
    except Exception as error:
        rule = f"raises {type(error).__name__}: {error}"
        raise StateError(
            rule, do="see that axes and product(layer, x, d, parameter) fit"
        ) from error


def _compare(layer: nn.Module, cls: type[AdaptedLayer], args: tuple[Any, ...]) -> None:
    """Compare with a zero D, then with a D of small whole numbers, exact in every dtype."""
    plain, adapted = copy.deepcopy(layer).eval(), copy.deepcopy(layer).eval()
    for parameter in cls.miss_host.axes:
        if plain._parameters.get(parameter) is not None:
            rank = (largest_rank(plain, parameter, cls) + 1) // 2
            swap_(new_adapter(adapted, parameter, cls, rank))
    if not isinstance(adapted, AdaptedLayer):
        expected = ", ".join(cls.miss_host.axes)
        raise StateError("the layer has no Parameter that the host names", expected=expected)
    base: Tensor = plain(*_fresh(args))
    rule = f"the host does not describe the layer ({cls.__name__})"
    if not torch.equal(adapted(*_fresh(args)), base):
        do = "see that the layer computes the same each time, and that product is linear in d"
        raise StateError(f"{rule}: a zero D changes the output", do=do)
    for parameter in adapted.miss_configs:
        d: Any = adapted._parameters[d_name(parameter)]
        d.copy_(torch.randint(-2, 3, d.shape))
        delta = adapted.miss_delta_weight(parameter)
        weight: Any = plain._parameters[parameter]
        weight.add_(delta.to(weight.dtype))
    want, got = plain(*_fresh(args)), adapted(*_fresh(args))
    weights: Any = plain._parameters
    dtypes = {want.dtype, *(weights[parameter].dtype for parameter in adapted.miss_configs)}
    bound = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 * want.abs().max()
    if got.shape != want.shape or not (got - want).abs().max() <= bound:
        gap = "another shape" if got.shape != want.shape else f"{(got - want).abs().max():.3g}"
        do = "see that product is linear in x and in d, and that axes are the Parameter's"
        what = "the output is not that of the layer with the delta in its weights"
        raise StateError(f"{rule}: {what}", expected=f"at most {bound:.3g}", actual=gap, do=do)


def _fresh(args: tuple[Any, ...]) -> list[Any]:
    """Copies of the tensors, because a layer may write to its input."""
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
