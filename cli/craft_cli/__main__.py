"""``python -m craft_cli`` is the same as ``craft-fast``."""

from craft_cli.main import main

main()
