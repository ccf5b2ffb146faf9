"""``craft-fast bench sdxl``: the whole engine on a full-size SDXL with random weights, beside a reference loop.

problem (the work) -> cases (what is measured) -> ours, baselines (who does it) -> measure -> run -> gates, table.
"""
