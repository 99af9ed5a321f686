"""`python -m programmable_kv`, and what the `pkv` script runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the `[cli]` extra, say in one line how to install it."""
    try:
        from programmable_kv.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "click", "rich"):
            raise
        from programmable_kv.extras import missing_message

        print(f"error: {missing_message('cli', [str(error.name)])}", file=sys.stderr)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
