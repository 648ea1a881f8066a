"""The ranks of one node: how each comes up, steps with the others and is woken. Knows no role and no request."""
