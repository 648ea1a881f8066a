"""Trains the demo model: `python -m demo.train --out demo/model`.

Files to read first: `corpus.py` (what is read), `model.py` (what learns), `loop.py` (how), `export.py` (what is left).
`held_out.py` writes what was not read as `demo/held_out.txt`, for measurements.
"""
