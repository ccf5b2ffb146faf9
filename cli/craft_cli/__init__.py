"""The ``craft-fast`` command: thin calls into ``craft_fast`` and everything a person sees of them."""
