"""Recipes called in the process of a test, as if typed on a command line: a fresh process costs seconds of imports."""

import contextlib
import importlib
import logging
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.state import AcceleratorState

from byol_timm.cli import run


@contextlib.contextmanager
def fresh_process():
    """Leave nothing of a recipe to what this process does next: neither Accelerate's state nor handlers of the log."""
    logger = logging.getLogger("byol_timm")
    before = logger.handlers, logger.level
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        logger.handlers, logger.level = before


def type_recipe(recipe, *arguments):
    """Call a recipe's `main` with these arguments. Errors reach the caller."""
    with patch.object(sys, "argv", [str(recipe), *arguments]), fresh_process():
        return importlib.import_module(Path(recipe).stem).main()


def exit_code_of(recipe, *arguments):
    """Call a recipe as its last line does, with one line on stderr for an error, and return the exit code."""
    with fresh_process():
        try:
            run(lambda: type_recipe(recipe, *arguments))
        except SystemExit as stop:
            return stop.code or 0
    return 0


def type_command(command, *more):
    """Call the recipe of a command of the docs, with or without a launcher, on the CPU."""
    words = shlex.split(command) if isinstance(command, str) else command
    place = next(number for number, word in enumerate(words) if Path(word).parts[-2:-1] == ("recipes",))
    with patch.dict("os.environ", ACCELERATE_USE_CPU="true"):
        return type_recipe(words[place], *words[place + 1 :], *more)
