"""Evaluate scorers on benchmarks: the evaluator, metrics, results, leaderboards, comparisons and plots."""
