"""The faces: they parse, call, print and show. No mathematics here."""

import sys

MISSING = 3
"""The exit code where a package is not installed."""


def lacking(error: ModuleNotFoundError) -> str:
    """What to do where a package is not installed. Raises the error again, if the module is one of ours."""
    if (error.name or "nonexpansive").startswith("nonexpansive"):
        raise error
    return f"error: this needs the package {error.name}, which is not installed: pip install 'nonexpansive[app,train,attack]' has all"


def main() -> None:
    """The command line, or what to install for it."""
    try:
        from nonexpansive.app import cli
    except ModuleNotFoundError as error:
        print(lacking(error), file=sys.stderr)
        sys.exit(MISSING)
    cli.main()
