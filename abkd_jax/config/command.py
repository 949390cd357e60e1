"""The flag `--config` of every command, refused in one sentence where it cannot be read."""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from abkd_jax.binding import nearest

flags.disclaim_key_flags()  # the flag is the command's, whose --help lists it
_ARGV: list[str] = []  # of `parse`, where the flag --config finds its overrides
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


def define_config(default: str | None = None) -> flags.FlagHolder:
    """The flag: a config file with its argument, whose values further flags override.

    Args:
        default: path of a config file; None for none.

    Returns:
        The flag's holder, with the config as its value.
    """
    help_ = "The config file, and its argument; --config.KEY=VALUE overrides one of its values."
    return config_flags.DEFINE_config_file("config", default, help_, sys_argv=_ARGV)


def parse(argv: list[str], *, known: Sequence[str]) -> list[str]:
    """Parses all flags of a command; what cannot be read leaves by SystemExit, with one sentence.

    Args:
        argv: the command's name and arguments.
        known: the flags of the command, for the refusal of another.

    Returns:
        What is left of them.
    """
    overrides = [part for part in argv if _OVERRIDE.match(part)]
    _ARGV[:] = [part for part in argv if part not in overrides]
    rest = _parsed(_ARGV, known)  # the config as it is in its file, to check overrides against
    if not overrides or not flags.FLAGS.config:
        return rest
    for part in overrides:
        _check_override(part, flags.FLAGS.config)
    _ARGV[:] = argv
    flags.FLAGS.unparse_flags()  # or the values of a flag that may be given twice would double
    return _parsed(argv, known)


def define_fields(kind: Any, help_: str) -> Callable[[], Any]:
    """A flag for each field of a NamedTuple of plain values; a function of none gives it."""
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define |= {bool: flags.DEFINE_bool}
    holders = {
        name: define[type(default)](name, default, help_)
        for name, default in kind._field_defaults.items()
    }
    return lambda: kind(**{name: holder.value for name, holder in holders.items()})


def required(*holders: flags.FlagHolder) -> None:
    """Refuses a command without one of some flags."""
    for holder in holders:
        if not holder.value:
            raise ValueError(f"--{holder.name} is missing.")


def entry(main: Callable[[], None]) -> Callable[[list[str]], None]:
    """The function of a command, called with what is left of its arguments, which is to be nothing.

    What the library refuses, and what fails, leaves by SystemExit with its sentence.
    """

    @functools.wraps(main)
    def called(argv: list[str]) -> None:
        if argv[1:]:
            sys.exit(f"unknown arguments: {' '.join(argv[1:])}; every option starts with --.")
        silence()
        try:
            main()
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"{error}")

    return called


def run(main: Callable[[], None]) -> None:
    """Runs the `main` of a script: see `parse`, with the flags that it defines, and `entry`."""
    known = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    with interruptible():
        keep_programs()
        app.run(entry(main), flags_parser=functools.partial(parse, known=known))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Where a KeyboardInterrupt would end the command: a line, and the exit status of SIGINT."""
    try:
        yield
    except KeyboardInterrupt:
        line = "SIGINT: ended at once; the same command goes on from what is saved."
        print(line, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def keep_programs() -> None:
    """Compiled programs outlive a command: the same one compiles them once on this machine.

    They are kept in the user's cache folder, unless JAX was told where or whether to keep them
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE). A program that cannot be read is
    compiled anew.
    """
    import jax  # not at the top: who reads flags alone has no need of it

    told = jax.config.jax_compilation_cache_dir is not None
    if not told and jax.config.jax_enable_compilation_cache:
        with contextlib.suppress(RuntimeError):  # of a user without a home
            jax.config.update("jax_compilation_cache_dir", str(_programs()))


def _programs() -> pathlib.Path:
    """The folder of programs for processors such as this one.

    A home may be that of several machines, and what is compiled for a processor may end a process
    on another.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    about, path = [platform.machine(), platform.processor()], pathlib.Path("/proc/cpuinfo")
    with contextlib.suppress(OSError):
        lines = path.read_text().splitlines()
        about += sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    kind = hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]
    return cache / "abkd_jax" / "programs" / kind


def silence() -> None:
    """Leaves to a command's own sentence what orbax and tensorstore log, for it is raised, too."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("fsspec").setLevel(logging.WARNING)  # of a bucket: a line for each file
    sys.unraisablehook = _unraisable


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Python's hook, but for what threads of tensorstore say after a failed write."""
    if f"{found.exc_value}" != "Event loop is closed":
        sys.__unraisablehook__(found)


def _parsed(argv: list[str], known: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        sys.exit(
            f"unknown flag --{error.flagname}{nearest(error.flagname, known)}; the flags are "
            f"{', '.join(f'--{name}' for name in known)}"
            f"{', and --config.KEY=VALUE' if 'config' in known else ''}."
        )
    except Exception as error:  # a config file is a program, which may raise anything
        *above, line = f"{error}".strip().splitlines() or [""]
        if isinstance(error, flags.Error) and not above:
            sys.exit(f"{line.removeprefix('flag ').rstrip('.')}; mend this flag.")
        # absl wraps some exceptions of the file: their last line is that of the traceback.
        kind, _, reason = line.partition(": ") if above else (type(error).__name__, "", line)
        if kind == "ValueError":  # a sentence of this library
            sys.exit(f"--config: {reason}")
        sys.exit(f"--config: {_place(error, argv)} raises {kind} ({reason}); mend it.")
    if "config" not in flags.FLAGS or not flags.FLAGS["config"].present:
        return rest
    path = flags.FLAGS["config"].config_filename.partition(":")[0]
    if not pathlib.Path(path).is_file():
        sys.exit(f"--config: there is no file {path!r}; give one, such as configs/digits.py.")
    if not isinstance(flags.FLAGS.config, ConfigDict | Mapping):
        sys.exit(f"--config: get_config of {path} must return a ConfigDict.")
    return rest


def _place(error: BaseException | None, argv: Sequence[str]) -> str:
    """The config file, and the line of it at which it raised, where there is one."""
    given = next((part for part in argv if part.lstrip("-").startswith("config=")), "")
    path = given.partition("=")[2].partition(":")[0]
    line = getattr(error, "lineno", None)  # of a SyntaxError
    while error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [x.lineno for x in frames if os.path.abspath(x.filename) == os.path.abspath(path)]
        line, error = (own or [line])[-1], error.__cause__ or error.__context__
    return path if line is None else f"{path}:{line}"


def _check_override(part: str, config: ConfigDict | None) -> None:
    """Refuses the override of a key that the config does not have."""
    path = _OVERRIDE.match(part)[1]
    group = config
    for key in path.split("."):
        key = key.partition("[")[0]
        known = list(group) if isinstance(group, ConfigDict | Mapping) else []
        if key not in known:
            sys.exit(
                f"--config.{path}: the config has no {key!r} there{nearest(key, known)}"
                f"{'; it has ' + ', '.join(known) if known else ''}."
            )
        group = group[key]
