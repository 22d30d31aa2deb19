"""Tables from a benchmark: the evaluator, metrics, results, leaderboards, comparisons and plots."""
