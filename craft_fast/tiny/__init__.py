"""The embedded default: a small world, a small SDXL trained on it, and small judges that know it.

Everything the method needs runs here without a download: 64x64 pictures of one or two coloured shapes.
``python -m craft_fast.tiny.build`` makes every asset again from a seed.
"""
