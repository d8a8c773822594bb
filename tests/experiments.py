"""What the tests of the experiments share."""

import types


def check_figures(script: types.ModuleType, result: dict) -> None:
    """Every axis of a script's figures has labels, and every figure can be drawn.

    An axis that shares that of the first needs no labels.
    """
    for figure in script.figures(result).values():
        first, *others = figure.axes
        labelled = [axis for axis in others if not axis.get_shared_y_axes().joined(axis, first)]
        assert all(axis.get_xlabel() and axis.get_ylabel() for axis in [first, *labelled])
        figure.canvas.draw()
