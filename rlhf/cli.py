"""The `rlhf` command: one subcommand, its positionals, then Hydra overrides.

Exit codes: 0 done, 1 failed node, 2 bad configuration or data, 75 stopped on request. Subcommand
and positionals are taken off before Hydra sees the rest, because Hydra reads every positional as an
override.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from rlhf.errors import (
    DISK_FULL,
    STOPPED_EXIT,
    ConfigError,
    RlhfError,
    Stopped,
    UserError,
    is_disk_full,
)
from rlhf.processes import STOP


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what `rlhf --help` says, its positionals, and keys that are not settings.

    `repeated`: any number of positionals; `optional`: also none.
    """

    summary: str
    positionals: tuple[str, ...] = ()
    repeated: bool = False
    optional: bool = False
    unless: str = ""
    """A setting that takes the place of the positionals."""
    extra: dict[str, str] = field(default_factory=dict)
    needs_run: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed command line."""

    name: str
    positionals: tuple[str, ...]
    extra: dict[str, str]
    overrides: tuple[str, ...]


COMMANDS = {
    "run": Command("run every node that is not done, here, in order"),
    "launch": Command(
        "submit the same plan as jobs", extra={"dry_run": "false", "detach": "false"}
    ),
    "cancel": Command("end the jobs of a run", extra={"node": ""}),
    "stage": Command("run one node of a run's frozen plan", ("NODE",)),
    "plan": Command("print nodes, inputs, state and expected cost"),
    "status": Command("print where each node stands", extra={"verify": "false"}),
    "ingest": Command(
        "validate files and add them to the store; ingest.retract=IDS withdraws rows",
        ("FILE",),
        repeated=True,
        unless="ingest.retract",
        needs_run=False,
    ),
    "drift": Command(
        "tell what changed in batches, or in files not ingested yet",
        ("BATCH|FILE",),
        repeated=True,
        optional=True,
        extra={"against": ""},
        needs_run=False,
    ),
    "quality": Command(
        "tell how annotators or sources judge",
        ("BATCH",),
        repeated=True,
        optional=True,
        extra={"by": "annotator"},
        needs_run=False,
    ),
    "report": Command(
        "print tables, write report.json and report.html; or compare two runs",
        ("RUN",),
        repeated=True,
        optional=True,
    ),
    "promote": Command("overrule a decision", ("VERSION",), extra={"reason": ""}),
    "export": Command("copy a version with a card of its origin", ("VERSION", "DIR")),
    "clean": Command("delete what no later node needs"),
    "serve": Command("API, dashboard, annotation page, inbox watcher", needs_run=False),
    "token": Command(
        "make a token for somebody who uses the service",
        ("NAME",),
        extra={"role": "", "days": "", "revoke": "false"},
        needs_run=False,
    ),
    "doctor": Command("check this environment", needs_run=False),
}

HELP = """rlhf - the Llama 2-Chat recipe as a service

usage: rlhf COMMAND [POSITIONAL...] [key=value...]

{commands}

First steps:
  rlhf run recipe=quickstart         the toy world: fine-tuning, two rounds, a report
  rlhf run run=quickstart rounds.limit=3   one more round of the same run

Every command takes Hydra overrides; `rlhf COMMAND --help` lists the settings, `--cfg job` prints
the composed configuration, `--multirun` sweeps. Exit codes: 0 done, 1 failed node, 2 bad input, 75
stopped on request (state saved).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"rlhf {version('rlhf')}\n")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if arguments[0] == "stage":
        # A scheduler may warn a job in its first second.
        STOP.listen()
    else:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return execute(parse(arguments))
    except UserError as error:
        return _say(str(error), 2)
    except Stopped as error:
        return _say(str(error), STOPPED_EXIT)
    except RlhfError as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on where this one ended", STOPPED_EXIT)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if is_disk_full(error):
            return _say(f"{DISK_FULL} ({error})", 1)
        return _say(f"this is a bug in rlhf; please report it\n{traceback.format_exc()}", 1)


def help_text() -> str:
    """Return the text of `rlhf --help`."""
    rows = [(f"{name} {_usage(command)}".strip(), command) for name, command in COMMANDS.items()]
    lines = (f"  {left:34}{command.summary}" for left, command in rows)
    return HELP.format(commands="\n".join(lines))


def parse(arguments: Sequence[str]) -> Call:
    """Split a command line; raises ConfigError for an unknown command or missing positionals."""
    name, rest = arguments[0], list(arguments[1:])
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"unknown command {name}: choose one of {', '.join(COMMANDS)}")
    extra = dict(command.extra)
    positionals: list[str] = []
    overrides: list[str] = []
    room = len(command.positionals)
    is_value = False
    for text in rest:
        key, equals, value = text.partition("=")
        if equals and key in extra:
            extra[key] = value
        elif is_value or text.startswith(("-", "+", "~")) or (equals and "/" not in key):
            overrides.append(text)
        elif command.repeated or len(positionals) < room:
            positionals.append(text)
        else:
            raise ConfigError(f"{text} is not key=value: write rlhf {name} {_usage(command)}")
        is_value = text in ("--cfg", "-c", "--package", "-p", "--info", "-i")
    wants_help = any(text in ("--help", "-h", "--hydra-help", "--cfg", "-c") for text in overrides)
    is_replaced = any(text.partition("=")[0] == command.unless for text in overrides)
    is_missing = len(positionals) < room and not command.optional and not is_replaced
    if is_missing and not wants_help:
        missing = " ".join(command.positionals[len(positionals) :])
        raise ConfigError(f"{missing} is missing: write rlhf {name} {_usage(command)}")
    return Call(name, tuple(positionals), extra, tuple(overrides))


def execute(call: Call) -> int:
    """Compose the configuration and run the command."""
    from rlhf import commands
    from rlhf.compose import load

    handler: Callable[..., int] = commands.HANDLERS[call.name]
    if any(text.startswith("-") for text in call.overrides):
        from rlhf import hydra_app

        return hydra_app.run(call.name, call.positionals, call.extra, call.overrides, handler)
    command = COMMANDS[call.name]
    needs_run = command.needs_run and not (command.optional and call.positionals)
    config = load(call.overrides, needs_run=needs_run)
    return handler(config, *call.positionals, **call.extra)


def _usage(command: Command) -> str:
    names = [f"{name}..." if command.repeated else name for name in command.positionals]
    names = [f"[{name}]" if command.optional else name for name in names]
    return " ".join([*names, *(f"{key}=..." for key in command.extra)])


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"rlhf: {message}\n")
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
