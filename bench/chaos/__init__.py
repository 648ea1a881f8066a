"""Real faults on a live cluster under load: `python -m bench.chaos` (`make bench-chaos`).

asks (what is asked), load (who asks it), faults (what goes wrong, and when), strike (doing it), judge (what was promised), report.
docs/chaos.md says how to read what it prints.
"""
