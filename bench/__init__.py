"""Measurements, each a command that prints what it found and the physical limit or the peer beside it.

`python -m bench.w8a8`: what int8 costs in quality and gives in speed.
"""
