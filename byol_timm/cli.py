"""The command line: flags and YAML files to settings, errors to one line and an exit code."""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import errors
from .config import Config
from .errors import ByolTimmError, nearest, one_line


def parse(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The settings that the command line asks for: defaults, then the preset or YAML file of `--config`, then flags.

    Raises `ByolTimmError` for an unknown flag, key or preset (with the nearest valid name) and for a value of the wrong
    type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    named, argv = _take_config(argv)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    _check_flags(argv, names)
    if named is not None:
        switches = {field.name for field in fields if field.type is bool}
        argv = [*_file_arguments(_config_file(named), names, switches), *argv]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config_class, args=argv, use_underscores=True)
    except BrokenPipeError:
        # The help went into a pager that was left. Python would fail once more as it empties stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ByolTimmError(_plain(output.getvalue())) from None


def presets() -> dict[str, Path]:
    """The YAML files that `--config` finds by name: `recipes/presets` of a clone, or what the wheel has of it."""
    package = Path(__file__).parent
    folder = package / "presets"
    if not folder.is_dir():
        folder = package.parent / "recipes" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def output_folder(path: str | Path) -> Path:
    """The folder that --output names, made and written to before the work whose results it takes."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    return folder


def output_file(path: str) -> Path:
    """The file that --output names, in an `output_folder`."""
    file = Path(path)
    if file.is_dir():
        raise ByolTimmError(f"--output takes a file and {file} is a folder. Name a file in it")
    output_folder(file.parent)
    return file


def run(main: Callable[[], Any]) -> None:
    """Call a recipe's `main`, its log on stdout; of `ByolTimmError` or Ctrl-C, one line on stderr and the exit code."""
    package = logging.getLogger(__package__)
    # A notebook runs its cells again.
    package.handlers = [_Console()]
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.CRITICAL)
    try:
        main()
    except ByolTimmError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0" or (not error.agreed and _is_alone()):
            _tell(str(error))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":
            _tell("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None


def _tell(message: str) -> None:
    text = " ".join(f"byol_timm: error: {message}".split())
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)


def _is_alone() -> bool:
    """Whether the first process goes on: had it failed too, the launcher would end this one within that time."""
    time.sleep(errors.ALONE_SECONDS)
    return True


class _Console(logging.Handler):
    """Messages as plain lines on stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "byol_timm: warning: " if record.levelno >= logging.WARNING else ""
        line = f"{prefix}{record.getMessage()}".encode(sys.stdout.encoding or "utf-8", errors="backslashreplace")
        tqdm.write(line.decode(sys.stdout.encoding or "utf-8"), file=sys.stdout)
        sys.stdout.flush()


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    rest, named, index = [], None, 0
    while index < len(argv):
        token = argv[index]
        if token == "--config":
            if index + 1 == len(argv):
                raise ByolTimmError(f"--config takes a YAML file or a preset: {', '.join(presets())}")
            named, index = argv[index + 1], index + 2
        elif token.startswith("--config="):
            named, index = token.partition("=")[2], index + 1
        else:
            rest.append(token)
            index += 1
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


def _check_flags(argv: list[str], names: list[str]) -> None:
    for token in argv:
        if token.startswith("--"):
            flag = token[2:].partition("=")[0].replace("-", "_")
            if flag not in (*names, "help") and flag.removeprefix("no_") not in names:
                raise ByolTimmError(f"unknown flag {token.partition('=')[0]}. {nearest(flag, names)}")


def _file_arguments(path: Path, names: list[str], switches: set[str]) -> list[str]:
    """The settings of a YAML file as command-line arguments, so that both are read by one parser.

    switches: settings that are on or off and take no value on the command line.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ByolTimmError(f"config file {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ByolTimmError(f"config file {path} is not YAML ({one_line(error)})") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ByolTimmError(f"config file {path} must hold `key: value` lines")
    arguments: list[str] = []
    for key, value in settings.items():
        if key not in names:
            raise ByolTimmError(f"unknown key {key!r} in {path}. {nearest(str(key), names)}")
        if isinstance(value, bool) and key in switches:
            arguments.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, dict):
            arguments += [f"--{key}", *(f"{k}={v}" for k, v in value.items())]
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def _plain(message: str) -> str:
    """The first paragraph of a boxed message of the parser, in one line."""
    lines = [line.strip(" │") for line in message.splitlines() if not line.startswith(("╭", "╰"))]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith(("──", "Got errors")) or (paragraph and not line):
            break
        paragraph.append(line)
    return " ".join(paragraph)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)
