"""``craft-fast bench rewards``: the published judges at full size, beside those who are known to be right.

cases (what is measured) -> models (networks, pictures) -> rivals (the authors' packages, plain transformers) -> compare
(before anything is timed) -> measure -> run -> gates, table.
"""
