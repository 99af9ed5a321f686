"""`python -m programmable_kv`: the same as `pkv`."""

from programmable_kv.cli import main

main()
