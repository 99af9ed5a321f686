"""`python -m programmable_kv`, and what the `pkv` script runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the `[cli]` extra, say in one line how to install it."""
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
