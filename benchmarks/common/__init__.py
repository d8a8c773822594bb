"""What the experiments share: the methods they compare, one runner with one record of a run, one style of plot."""
