"""Measurements, each a command that prints what it found and the physical limit or the peer beside it.

`python -m bench.micro`: kernels and transports beside the machine's limits, and cost as work grows.
`python -m bench.pull`: what pulling costs on a running cluster.
`python -m bench.w8a8`: what int8 costs in quality and gives in speed.
"""
