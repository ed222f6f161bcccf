"""Asks a person, or takes lines of stdin from a script. Passwords are never words of a command."""

from __future__ import annotations

import sys
from getpass import getpass

from simpletuner.cli.refusal import ClientExit, Refusal


def ask_line(question: str) -> str:
    """Raises Refusal `no_input`."""
    if sys.stdin.isatty():
        print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip()
    if not line:
        raise _nothing(question)
    return line


def ask_password(question: str = "Password: ", *, twice: bool = False) -> str:
    """Not shown while it is typed; `twice` for a new one. Raises Refusal `no_input` or `passwords_differ`."""
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        try:
            password = getpass(question)
            again = getpass("Once more: ") if twice else password
        except EOFError as error:
            raise _nothing(question) from error
        if password != again:
            raise Refusal("passwords_differ", "The two passwords differ.", ClientExit.REFUSED)
    if not password:
        raise _nothing(question)
    return password


def _nothing(question: str) -> Refusal:
    message = f"Nothing was given for {question.strip(': ').lower()!r}."
    return Refusal("no_input", message, ClientExit.DENIED, hint="Type it in a terminal, or give it as a line of stdin.")
