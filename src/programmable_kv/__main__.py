"""The entry point of `python -m programmable_kv` and of the `pkv` script."""

from __future__ import annotations

import os
import sys

_MEASURING = ("bench", "lab")
"""Commands that run on an otherwise idle processor."""


def main() -> None:
    """Run the command line; without the `[cli]` extra, print one line on how to install it and exit."""
    if sys.argv[1:2] and sys.argv[1] not in _MEASURING:
        # Threads that spin while they wait are about 1.4 times faster on an idle machine, and ten times slower when
        # other processes run. The variable is read when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from programmable_kv.cli import main as run
    except ModuleNotFoundError as error:
        from programmable_kv.extras import extra_missing_in

        told = extra_missing_in(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    run()


if __name__ == "__main__":
    main()
