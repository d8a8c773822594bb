"""The pictures of the documentation are drawn from the library."""

import importlib.util
import itertools
import pathlib
import types

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
DOCS = pathlib.Path(__file__).parent.parent / "docs"


def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = script()
names = pytest.mark.parametrize("name", sorted(pictures.PICTURES))


@names
def test_the_committed_picture_is_what_the_script_draws(tmp_path: pathlib.Path, name: str):
    committed = (DOCS / "figures" / f"{name}.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("drawn with another version of matplotlib")
    assert pictures.save(name, tmp_path).read_text() == committed


@names
def test_the_drawn_matrices_are_d_and_the_delta(name: str):
    form, by_column, rows = pictures.PICTURES[name]
    axes = pictures.figure(name).axes
    assert len(axes) == 2 * len(rows)
    for place, (in_features, out_features, rank, _) in enumerate(rows):
        layer = pictures.layer(form, in_features, out_features, rank)
        colours = {}
        drawn = axes[2 * place : 2 * place + 2]
        for axis, want in zip(drawn, (layer.miss_D, layer.delta_weight())):
            (mesh,) = axis.collections
            assert torch.equal(torch.tensor(mesh.get_array()), want.detach())
            text = {text.get_position(): float(text.get_text()) for text in axis.texts}
            cells = itertools.product(range(want.shape[0]), range(want.shape[1]))
            assert text == {(c + 0.5, o + 0.5): want[o, c].item() for o, c in cells}
            shown = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)
            for number, colour in zip(mesh.get_array().flatten(), map(tuple, shown)):
                # A number has one colour everywhere.
                assert colours.setdefault(float(number), colour) == colour
        pairs = set()
        for number, colour in colours.items():
            row, column = divmod(int(number) - 1, layer.miss_D.shape[1])
            pairs.add((column if by_column else row, colour))
        assert len(pairs) == rank  # as many colours as columns or rows of D
