"""The authors' own packages as judges: each in an environment of its own, spoken to over pipes.

``install`` makes the environments, ``worker`` runs inside one, ``client`` is the reward on this side.
"""
