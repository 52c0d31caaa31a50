"""Benchmarks: registered cases, one runner, baselines beside our own method. `python -m bench list` names the cases."""
