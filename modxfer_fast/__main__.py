"""`python -m modxfer_fast`, which is how torchrun starts the command line."""

from modxfer_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
