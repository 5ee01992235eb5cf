"""Comparisons of objectives: the plan of a grid, its runner, statistics and the report."""
