"""Command line: flags and YAML files to a config, errors to one line and an exit code."""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from .config import ORDERS, REPLACED, Config
from .errors import ByolTimmError, nearest, one_line, report


def parse(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Return the config of a command line: defaults, then the preset or YAML file of `--config`, then flags.

    Raises `ByolTimmError` for an unknown flag, key or preset (with the nearest valid name) and for a value of the wrong
    type.
    """
    import tyro

    named, argv = _take_config(list(sys.argv[1:] if argv is None else argv))
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for token in argv:
        flag = token[2:].partition("=")[0].replace("-", "_")
        if token.startswith("--") and flag in REPLACED:
            raise ByolTimmError(f"--{flag} was removed. {REPLACED[flag]}")
        if token.startswith("--") and flag not in (*names, "help") and flag.removeprefix("no_") not in names:
            raise ByolTimmError(f"unknown flag {token.partition('=')[0]}. {nearest(flag, names)}")
    default = tyro.MISSING_NONPROP if named is None else read_config(config_class, _config_file(named))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config_class, args=argv, default=default, use_underscores=True)
    except BrokenPipeError:
        # The pager that showed the help was closed. Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ByolTimmError(_plain(output.getvalue())) from None


def read_config(config_class: type[Config], path: Path, *, ignore: Collection[str] = ()) -> Config:
    """Return the config of a YAML file, with defaults for what it leaves out.

    ignore: keys to skip. Raises `ByolTimmError` for a file that cannot be read, an unknown key, a value of the wrong
    type, and an order (`ORDERS`), which belongs on the command line.
    """
    import tyro

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ByolTimmError(f"config file {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ByolTimmError(f"config file {path} is not YAML ({one_line(error)})") from error
    if not isinstance(values, dict | None):
        raise ByolTimmError(f"config file {path} must hold `key: value` lines")
    values = {str(key): value for key, value in (values or {}).items() if key not in ignore}
    hints = typing.get_type_hints(config_class)
    for key in values:
        if key in REPLACED:
            raise ByolTimmError(f"{key} in {path} was removed. {REPLACED[key]}")
        if key not in hints:
            raise ByolTimmError(f"unknown key {key!r} in {path}. {nearest(key, list(hints))}")
    if orders := [key for key in values if key in ORDERS]:
        flags = " ".join(f"--{key}" for key in orders)
        raise ByolTimmError(f"config file {path} holds orders ({', '.join(orders)}). Remove these lines; use {flags}")
    for key, value in values.items():
        try:
            values[key] = _typed(value, hints[key])
        except (TypeError, ValueError):
            kind = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            raise ByolTimmError(f"{key} in {path} must be {kind} ({value!r})") from None
    # The command line must give what has no default.
    required = {f.name: tyro.MISSING for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING}  # type: ignore[arg-type]
    return config_class(**{**required, **values})


def _typed(value: Any, hint: Any) -> Any:
    """Return a YAML value as the type of its field, or raise `TypeError` or `ValueError`."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return None if value is None else _typed(value, next(part for part in parts if part is not types.NoneType))
    if kind is tuple:
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        items = value if isinstance(value, list) else [value]
        hints = parts[:1] * len(items) if parts[-1] is Ellipsis else parts
        return tuple(_typed(item, part) for item, part in zip(items, hints, strict=True))
    if (kind is Literal and value in parts) or (hint is bool and isinstance(value, bool)):
        return value
    # YAML takes 1e-6 for a text and 100 for a number.
    if hint in (int, float, str) and isinstance(value, int | float | str) and not isinstance(value, bool):
        if hint is not int or not isinstance(value, float):
            return hint(value)
    raise TypeError


def presets() -> dict[str, Path]:
    """Return the YAML files that `--config` finds by name: `recipes/presets` of a clone, or the wheel's copy."""
    package = Path(__file__).parent
    folder = package / "presets"
    if not folder.is_dir():
        folder = package.parent / "recipes" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def output_folder(path: str | Path) -> Path:
    """Make the folder that --output names and check that it can be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    return folder


def output_file(path: str) -> Path:
    """Return the file that --output names, after making its `output_folder`."""
    file = Path(path)
    if file.is_dir():
        raise ByolTimmError(f"--output must be a file and {file} is a folder. Name a file in it")
    output_folder(file.parent)
    return file


def run(main: Callable[[], Any]) -> None:
    """Call a recipe's `main` with its log on stdout; on `ByolTimmError` or Ctrl-C print one line and exit."""
    package = logging.getLogger(__package__)
    # A notebook may run its cells twice.
    package.handlers = [_Console()]
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.CRITICAL)
    try:
        main()
    except ByolTimmError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        report(error)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            traceback.print_exc()
        interrupted = ByolTimmError("interrupted")
        interrupted.agreed = True
        report(interrupted)
        raise SystemExit(128 + signal.SIGINT) from None


class _Console(logging.Handler):
    """Print messages as plain lines on stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "byol_timm: warning: " if record.levelno >= logging.WARNING else ""
        line = f"{prefix}{record.getMessage()}".encode(sys.stdout.encoding or "utf-8", errors="backslashreplace")
        tqdm.write(line.decode(sys.stdout.encoding or "utf-8"), file=sys.stdout)
        sys.stdout.flush()


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of `--config`, if any, and the other arguments."""
    rest, named, tokens = [], None, iter(argv)
    for token in tokens:
        if token == "--config":
            named = next(tokens, "")
        elif token.startswith("--config="):
            named = token.partition("=")[2]
        else:
            rest.append(token)
    if named == "":
        raise ByolTimmError(f"--config takes a YAML file or a preset: {', '.join(presets())}")
    return named, rest


def _config_file(named: str) -> Path:
    known = presets()
    path = Path(named)
    if named in known:
        return known[named]
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    guess = nearest(named, known)
    others = f" Known: {', '.join(known)};" if guess.startswith("Did") else ";"
    raise ByolTimmError(f"no preset {named!r}. {guess}{others} or give a YAML file")


def _plain(message: str) -> str:
    """Return the first paragraph of tyro's boxed message as one line."""
    lines = [line.strip(" │") for line in message.splitlines() if not line.startswith(("╭", "╰"))]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith(("──", "Got errors")) or (paragraph and not line):
            break
        paragraph.append(line)
    return " ".join(paragraph)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, `1 step` or `1,200 steps`."""
    return f"{number:,} {noun}" + "s" * (number != 1)
