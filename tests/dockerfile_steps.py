"""Read a Dockerfile with BuildKit's own parser, and carry out one of its targets without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile

SYSTEM = ("apt-get", "chown", "useradd", "rm")
"""Commands that would change this machine, so they are only checked."""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction."""

    name: str
    values: tuple[str, ...]
    flags: tuple[str, ...]
    text: str

    def flag(self, name: str) -> str | None:
        """Return the value of `--name=value`."""
        found = [text.removeprefix(f"--{name}=") for text in self.flags]
        return next((v for v, text in zip(found, self.flags, strict=True) if v != text), None)

    def pairs(self) -> dict[str, str]:
        """Return what an ARG, ENV or LABEL sets; an ARG without a value sets nothing."""
        if self.name == "ARG":
            split = (value.partition("=") for value in self.values)
            return {key: unquote(value) for key, equals, value in split if equals}
        return dict(zip(self.values[::2], map(unquote, self.values[1::2]), strict=True))


@dataclass(slots=True)
class Stage:
    """One FROM and what follows."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def named(self, name: str) -> list[Step]:
        """Return the instructions of one kind."""
        return [step for step in self.steps if step.name == name]


def read_stages(path: Path) -> dict[str, Stage]:
    """Return the stages by name, in order; base images have their ARG values filled in."""
    images: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for item in dockerfile.parse_file(str(path)):
        step = Step(item.cmd.upper(), item.value, item.flags, item.original)
        if step.name == "FROM":
            image, word, name = step.values
            assert word.upper() == "AS"
            stages[name] = Stage(name, expand(image, images))
        elif stages:
            list(stages.values())[-1].steps.append(step)
        else:
            images |= step.pairs()
    return stages


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Fill in ${NAME}; an unknown name is an error, where Docker would fill in nothing."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match.group(1)], text)


def unquote(text: str) -> str:
    return "".join(shlex.split(text))


@dataclass(slots=True)
class Build:
    """Carries out stages in one shared file system: build arguments say where paths lie."""

    context: Path
    root: Path
    arguments: dict[str, str]
    outside: dict[str, str]
    """Environment of the commands beyond what the Dockerfile sets."""
    env: dict[str, str] = field(default_factory=dict)
    workdir: Path = field(init=False)
    checked: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workdir = self.root

    def run(self, stage: Stage, stages: Mapping[str, Stage]) -> None:
        """Carry out a stage's base, then the stage; a base outside the file gives nothing."""
        if stage.base in stages:
            self.run(stages[stage.base], stages)
        scope: dict[str, str] = {}
        for step in stage.steps:
            known = {**self.outside, **scope, **self.env}
            if step.name == "ARG":
                [text] = step.values
                name = text.partition("=")[0]
                scope[name] = self.arguments.get(name, expand(step.pairs()[name], known))
            elif step.name == "ENV":
                self.env |= {key: expand(value, known) for key, value in step.pairs().items()}
            elif step.name == "WORKDIR":
                self.workdir = self.inside(expand(step.values[0], known))
                self.workdir.mkdir(parents=True, exist_ok=True)
            elif step.name == "COPY":
                self.copy(step, known)
            elif step.name == "RUN":
                self.shell(step.values[0], {**self.outside, **scope, **self.env})
            else:
                assert step.name in ("LABEL", "USER", "ENTRYPOINT", "CMD"), step.text

    def copy(self, step: Step, known: Mapping[str, str]) -> None:
        """Copy from the context; between stages, which share a file system, only check."""
        *sources, target = (expand(value, known) for value in step.values)
        if step.flag("from"):
            assert sources == [target]
            assert any(self.inside(target).iterdir()), f"{step.text}: nothing was built there"
            return
        for source in sources:
            place = self.workdir / target
            if (self.context / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(self.context / source, place, ignore=ignore, dirs_exist_ok=True)
            else:
                assert target.endswith("/"), step.text
                shutil.copy(self.context / source, place)

    def shell(self, command: str, env: dict[str, str]) -> None:
        """Run the commands of a RUN, except those that would change this machine."""
        subprocess.run(["sh", "-n"], input=command, text=True, check=True)
        kept = []
        for part in (text.strip() for text in command.split("&&")):
            if part.split()[0] in SYSTEM:
                self.checked.append(expand(part, env))
            else:
                kept.append(part)
        if not kept:
            return
        script = " && ".join(kept)
        for word in shlex.split(expand(script, env)):
            assert not word.startswith("/") or self.inside(word), word
        self.executed.append(script)
        done = subprocess.run(
            ["sh", "-c", script],
            env=env,
            cwd=self.workdir,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"

    def inside(self, path: str) -> Path:
        """Return a path that must lie under the root."""
        assert Path(path).is_relative_to(self.root), f"{path} lies outside {self.root}"
        return Path(path)


def unknown_packages(names: list[str], folder: Path) -> list[str]:
    """Return the packages that the distribution lacks, by a package list of our own."""
    options = [f"-oDir::State={folder}/state", f"-oDir::Cache={folder}/cache"]
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    call = {"capture_output": True, "text": True, "check": True, "env": {**os.environ}}
    subprocess.run(["apt-get", *options, "update"], **call)
    known = subprocess.run(["apt-cache", *options, "pkgnames"], **call).stdout.split()
    return sorted(set(names) - set(known))
