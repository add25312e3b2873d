"""``python -m adareduce.bench``: how fast, and how right, the collectives are on this machine."""
