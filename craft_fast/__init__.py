"""craft-fast: align SDXL to human preference on one GPU by CRAFT (arXiv 2603.18991)."""

__version__ = "0.1.0"
