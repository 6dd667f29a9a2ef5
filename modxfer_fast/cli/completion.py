"""`modxfer completion SHELL`: the script that lets a shell complete commands and options."""

import argparse
import importlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="to write the script for")


def run(args: argparse.Namespace) -> int:
    import shtab

    from modxfer_fast.cli.main import COMMANDS, add_arguments

    # every command with its arguments in one parser; `main` builds only the one it needs
    parser = argparse.ArgumentParser(prog="modxfer")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add_arguments(importlib.import_module(f"modxfer_fast.cli.{name}"), command)
        for action in command._actions:
            if action.dest in ("config", "output"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # as shtab has it
    print(shtab.complete(parser, args.shell))
    return 0
