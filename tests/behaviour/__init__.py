"""What the package promises of every strategy on every family, over both registries.

A strategy that is registered is tested here, and so is a family, whose tiny pipeline stands in `tests/models.py`.
Making is tested for every pair that works. What happens to an erasure afterwards depends on its carriers and not on
who made it, so it is tested with one case for each carrier on every family (`ATTACHED`), and what does not depend on
the family with each on the first one.
"""
