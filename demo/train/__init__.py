"""Trains the demo model: `python -m demo.train --out demo/model`.

Files to read first: `corpus.py` (what is read), `model.py` (what learns), `loop.py` (how), `export.py` (what is left).
"""
