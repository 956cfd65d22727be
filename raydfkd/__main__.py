"""``python -m raydfkd``: the command line without its console script."""

from raydfkd.cli import main

main()
