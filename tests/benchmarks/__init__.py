"""How fast, as ratios side by side in one run: PYTHONPATH=tests python -m benchmarks (make bench)."""
