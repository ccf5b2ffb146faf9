"""What is measured: one module an op, each with ``cases()``."""
