"""Microbenchmarks of the ops in ``craft_kernels``: what ``craft-fast bench kernels`` runs."""
