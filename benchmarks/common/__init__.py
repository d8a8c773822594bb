"""What the experiments share.

The methods they compare, one runner with one record of a run, and one style of plot.
"""
