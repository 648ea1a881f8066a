"""`python -m bench.suite`, or `make bench`: Baton beside its peers on this machine, in the same minutes, as ratios.

rows (what) -> servers + ruler (how) -> bench/results/<row>.json -> render -> docs/performance.md
"""
