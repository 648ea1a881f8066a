"""Micro-benchmarks, each beside the physical limit or the peer of the same run: `python -m bench.micro [name ...]`.

    row.py         what a benchmark finds: one Row per thing measured
    limits.py      what the machine gives in this run: memcpy, GEMM peak
    report.py      rows as a table and as bench/results/micro.json
    __main__.py    the table of benchmarks, by name

A benchmark is a module of this package with `def rows(limits: Limits) -> Iterator[Row]`, and a line in the table of __main__.py.
Nothing here asserts a time.
"""
