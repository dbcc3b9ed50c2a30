"""Is a start worth it? The same detector from several starts, shares of the labels and seeds, with error bars.

``python -m scrl_fast.transfer compare TASK`` is the command. `Comparison` of `scrl_fast.transfer.compare.comparison`
runs the rows; `statistics` and `leaks` know nothing of runs.
"""
