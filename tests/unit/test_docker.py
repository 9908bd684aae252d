"""The images and the compose file: what they promise, checked without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_steps import Build, Stage, read_stages, unknown_packages
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from sqlalchemy import make_url

from rlhf.cli import parse
from rlhf.compose import load

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = ("cpu", "cuda")
SOURCE = {"conf", "jobs", "rlhf"}


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_stages(DOCKER / "Dockerfile")


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    found = {}
    for line in (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line).groups()
            assert name not in found, f"{name} is pinned twice"
            assert name == canonicalize_name(name)
            found[name] = Version(version)
    return found


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that the dev extra installs beside this Python."""
    path = Path(sys.executable).parent / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)


# Dockerfile


def test_linter_finds_nothing() -> None:
    done = tool("hadolint", "--no-color", str(DOCKER / "Dockerfile"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_linter_is_told_to_ignore_only_with_a_reason() -> None:
    lines = (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    ignored = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
    assert {lines[number] for number in ignored} == {"# hadolint ignore=DL3008"}
    assert "exact pin" in lines[ignored[0] - 1]


def test_both_targets_exist_and_cpu_is_the_default(stages: dict[str, Stage]) -> None:
    assert set(TARGETS) <= set(stages)
    assert list(stages)[-1] == "cpu"


def test_base_images_are_pinned_in_one_place(
    stages: dict[str, Stage], pins: dict[str, Version]
) -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    outside = {name: stage.base for name, stage in stages.items() if stage.base not in stages}
    assert set(outside) == {"cpu-base", "cuda-base"}
    for image in outside.values():
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+(@sha256:[0-9a-f]{64})?", image)
        assert text.count(image) == 1
    python = re.match(r"python:([\d.]+)-", outside["cpu-base"]).group(1)
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])
    cuda = re.match(r"nvidia/cuda:([\d.]+)-devel-", outside["cuda-base"]).group(1)
    assert Version(cuda).release[:3] == pins["cuda-toolkit"].release[:3]


@pytest.mark.parametrize("target", TARGETS)
def test_runs_as_a_user_without_rights(target: str, stages: dict[str, Stage]) -> None:
    stage = stages[target]
    users = [step.values for step in stage.named("USER")]
    assert users == [("${UID}:${UID}",)]
    [uid] = [step.pairs()["UID"] for step in stage.named("ARG") if "UID" in step.pairs()]
    assert int(uid) >= 10000
    assert [step.name for step in stage.steps[-3:]] == ["USER", "ENTRYPOINT", "CMD"]


@pytest.mark.parametrize("target", TARGETS)
def test_entry_point_labels_and_environment(target: str, stages: dict[str, Stage]) -> None:
    stage = stages[target]
    [entry], [command], [label], [env] = map(stage.named, ("ENTRYPOINT", "CMD", "LABEL", "ENV"))
    assert entry.values == ("rlhf",)
    assert command.values == ("--help",)
    arguments = {key: value for step in stage.named("ARG") for key, value in step.pairs().items()}
    assert arguments["VERSION"] == PROJECT["version"]
    labels = label.pairs()
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert labels["org.opencontainers.image.revision"] == "${REVISION}"
    assert env.pairs()["HF_HUB_OFFLINE"] == "1"
    assert env.pairs()["PATH"].startswith("${VENV}/bin:")


@pytest.mark.parametrize("target", TARGETS)
def test_dependencies_come_before_the_source(target: str, stages: dict[str, Stage]) -> None:
    steps = stages[f"{target}-build"].steps
    copied = [(n, set(step.values[:-1])) for n, step in enumerate(steps) if step.name == "COPY"]
    first_source = min(number for number, sources in copied if sources & SOURCE)
    installs = [n for n, step in enumerate(steps) if "--requirement" in step.text]
    assert installs == [n for n in installs if n < first_source] != []
    before = set().union(*(sources for number, sources in copied if number < first_source))
    assert before == {
        "docker/constraints.txt",
        "docker/requirements.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert min(n for n, sources in copied if "README.md" in sources) > installs[0]
    assert all("type=cache" in (step.flag("mount") or "") for step in steps if step.name == "RUN")


def test_targets_differ_only_where_they_must(stages: dict[str, Stage]) -> None:
    def others(name: str) -> set[str]:
        return {step.text for step in stages[name].steps}

    build = others("cpu-build") ^ others("cuda-build")
    assert {text.partition("=")[0] for text in build} == {"ARG PIP_EXTRA_INDEX_URL"}

    def settings(name: str) -> set[tuple[str, str]]:
        steps = [step for step in stages[name].steps if step.name in ("LABEL", "ENV")]
        return {pair for step in steps for pair in step.pairs().items()}

    assert {key for key, _ in settings("cpu") ^ settings("cuda")} == {
        "org.opencontainers.image.description",
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
    }
    different = others("cpu") ^ others("cuda")
    assert {text for text in different if not text.startswith(("LABEL", "ENV"))} == {
        f"COPY --from={name}-build ${{VENV}} ${{VENV}}" for name in TARGETS
    }


def test_builder_receives_what_is_copied_and_nothing_else(stages: dict[str, Stage]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    copied = {
        source
        for stage in stages.values()
        for step in stage.named("COPY")
        if not step.flag("from")
        for source in step.values[:-1]
    }
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


# Pins


def test_every_direct_dependency_has_a_pin_that_fits(pins: dict[str, Version]) -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["vllm"], *extras["service"]]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in docker/constraints.txt"
        assert pins[name] in requirement.specifier, f"{requirement} refuses {pins[name]}"


def test_requirements_are_those_of_the_project() -> None:
    script = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml")]
    plain = subprocess.run(script, capture_output=True, text=True, check=True)
    assert plain.stdout.splitlines() == PROJECT["dependencies"]
    more = subprocess.run([*script, "service"], capture_output=True, text=True, check=True)
    service = PROJECT["optional-dependencies"]["service"]
    assert more.stdout.splitlines() == [*PROJECT["dependencies"], *service]
    wrong = subprocess.run([*script, "servce"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "no extra servce: choose from dev, service, vllm" in wrong.stderr


# Compose


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


def test_compose_file_fits_the_official_schema() -> None:
    file = str(DOCKER / "compose.yaml")
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["rlhf", "rlhf-gpu"])
def test_services_are_locked_down_and_keep_their_data(name: str, stages: dict[str, Stage]) -> None:
    whole = compose()
    service = whole["services"][name]
    assert service["command"] == ["run", "recipe=quickstart"]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["network_mode"] == "none"
    assert service["tmpfs"][0].startswith("/tmp:")
    assert service["shm_size"] == "2gb"
    mounts = dict(text.split(":") for text in service["volumes"])
    assert set(mounts) < set(whole["volumes"])
    stage = stages[service["build"]["target"]]
    [data] = [step.pairs()["DATA"] for step in stage.named("ARG") if "DATA" in step.pairs()]
    assert set(mounts.values()) == {f"{data}/runs", f"{data}/store", f"{data}/home"}
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}


def test_only_the_gpu_profile_asks_for_a_device() -> None:
    services = compose()["services"]
    assert services["rlhf-gpu"]["profiles"] == ["gpu"]
    [device] = services["rlhf-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "profiles" not in services["rlhf"]
    assert "reservations" not in services["rlhf"]["deploy"]["resources"]


SERVICES = ("service", "token", "database")


@pytest.mark.parametrize("name", SERVICES)
def test_what_the_service_needs_is_locked_down(name: str) -> None:
    found = compose()["services"][name]
    assert found["read_only"] is True
    assert found["init"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in found
    assert any(text.startswith("/tmp:") for text in found["tmpfs"])
    assert set(found["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert found["profiles"]


def test_the_service_is_published_to_this_machine_only_and_its_database_to_nobody() -> None:
    whole = compose()
    services = whole["services"]
    assert services["service"]["ports"] == ["127.0.0.1:8400:8400"]
    assert [name for name in services if "ports" in services[name]] == ["service"]
    assert services["database"]["networks"] == ["database"]
    assert whole["networks"]["database"] == {"internal": True}
    assert set(services["service"]["networks"]) == {"outside", "database"}


def test_the_password_is_a_file_outside_the_repository() -> None:
    whole = compose()
    [(name, secret)] = whole["secrets"].items()
    assert set(secret) == {"file"}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"docker/{Path(secret['file']).parent}/" in ignored
    place = f"/run/secrets/{name}"
    for service in SERVICES:
        found = whole["services"][service]
        assert found["secrets"] == [name]
        passwords = {k: v for k, v in found["environment"].items() if "PASSWORD" in k}
        assert len(passwords) == 1
        assert all(k.endswith("_FILE") and v == place for k, v in passwords.items())


def test_the_service_waits_for_its_database_and_both_are_looked_after() -> None:
    services = compose()["services"]
    waits = {"database": {"condition": "service_healthy"}}
    assert services["service"]["depends_on"] == services["token"]["depends_on"] == waits
    for name in ("service", "database"):
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    [check] = [text for text in services["service"]["healthcheck"]["test"] if "urlopen" in text]
    compile(check, "healthcheck", "exec")
    assert "--host=127.0.0.1" in services["database"]["healthcheck"]["test"]
    assert services["database"]["user"] == "999:999"


def test_images_of_the_service_have_its_extra_and_its_folder(stages: dict[str, Stage]) -> None:
    services = compose()["services"]
    image = re.fullmatch(r"postgres:(\d+)\.\d+-bookworm", services["database"]["image"])
    # From 18 on the image keeps its data elsewhere.
    assert int(image[1]) < 18
    assert services["database"]["volumes"] == ["database:/var/lib/postgresql/data"]
    for name in ("service", "token"):
        build = services[name]["build"]
        assert build["args"] == {"EXTRAS": "service"}
        assert build["args"]["EXTRAS"] in PROJECT["optional-dependencies"]
        places = {text.partition(":")[2] for text in services[name]["volumes"]}
        [made] = [s.text for s in stages[build["target"]].named("RUN") if "mkdir" in s.text]
        folders = {place.replace("/data", "${DATA}") for place in places}
        assert folders == set(re.findall(r"\$\{DATA\}/\w+", made.partition("&&")[0]))


def test_the_commands_of_the_service_are_ones_that_rlhf_takes() -> None:
    services = compose()["services"]
    serve = parse(services["service"]["command"])
    assert serve.name == "serve"
    config = load(serve.overrides, needs_run=False)
    assert (config.service.host, config.service.port) == ("0.0.0.0", 8400)
    assert config.service.needs_tokens
    assert config.service.folder == "service"
    program, *words = services["token"]["entrypoint"]
    token = parse([*words, "olga", "role=operator"])
    assert (program, token.name, token.positionals) == ("rlhf", "token", ("olga",))
    assert token.extra["role"] == "operator"
    assert load(token.overrides, needs_run=False).service.database == config.service.database
    url = make_url(config.service.database)
    assert (url.host, url.password) == ("database", None)
    environment = services["database"]["environment"]
    assert (url.username, url.database) == (
        environment["POSTGRES_USER"],
        environment["POSTGRES_DB"],
    )


# The steps themselves


@pytest.fixture(scope="module")
def image(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Carry out the cpu target's instructions in a temporary folder.

    Executed as written: every ARG, ENV, WORKDIR and COPY from the context, the virtual environment,
    both pip installs. Not executed, because they would change this machine: apt-get (the packages'
    existence is looked up in the distribution), useradd and chown (syntax and options). Stages
    share one file system, so COPY --from only checks that something lies there; the build folder
    is deleted before the command runs. torch comes from the index of this machine, not from
    PIP_EXTRA_INDEX_URL's default. Base images, layers, caches, USER and volumes need an engine.
    """
    root = tmp_path_factory.mktemp("image")
    here = ("PIP_", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy")
    python = Path(os.path.realpath(sys.executable)).parent
    outside = {
        **{key: value for key, value in os.environ.items() if key.startswith(here)},
        "PATH": f"{python}:/usr/local/bin:/usr/bin:/bin",
        "HOME": os.environ["HOME"],
    }
    arguments = {key: str(root / key.lower()) for key in ("VENV", "BUILD", "DATA")}
    arguments["PIP_EXTRA_INDEX_URL"] = os.environ.get("PIP_EXTRA_INDEX_URL", "")
    build = Build(ROOT, root, arguments, outside)
    build.run(stages["cpu-build"], stages)
    assert build.workdir == root / "build"
    shutil.rmtree(build.workdir)
    finished = Build(ROOT, root, arguments, outside)
    finished.run(stages["cpu"], stages)
    yield finished
    shutil.rmtree(root / "venv")  # More than a GB, which pytest would keep.


def call(image: Build, *words: str) -> str:
    """Run a command in the image's environment and working folder; it must succeed."""
    done = subprocess.run(
        words, cwd=image.workdir, env=image.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_entry_point_works_outside_the_checkout(image: Build, stages: dict[str, Stage]) -> None:
    [entry], [command] = map(stages["cpu"].named, ("ENTRYPOINT", "CMD"))
    assert image.workdir == image.root / "data"
    assert "usage: rlhf" in call(image, *entry.values, *command.values)
    assert call(image, *entry.values, "--version") == f"rlhf {PROJECT['version']}\n"
    assert "round-02/evaluate" in call(image, *entry.values, "plan", "recipe=quickstart")
    assert "all needed parts are there" in call(image, *entry.values, "doctor")
    written = sorted(str(path.relative_to(image.workdir)) for path in image.workdir.rglob("*"))
    assert [path for path in written if not path.startswith("home/")] == [
        *("home", "runs", "service", "store")
    ]


@pytest.mark.slow
def test_operators_can_be_compiled_into_the_home_volume(image: Build) -> None:
    assert call(image, str(image.root / "venv/bin/ninja"), "--version")
    where = "import rlhf; from torch.utils import cpp_extension as operators; "
    where += "print(rlhf.__file__, operators.get_default_build_root())"
    package, operators = call(image, "python", "-c", where).split()
    assert Path(package).is_relative_to(image.root / "venv")
    assert Path(operators).is_relative_to(image.workdir / "home")


@pytest.mark.slow
def test_everything_that_was_installed_is_pinned(image: Build, pins: dict[str, Version]) -> None:
    listed = call(image, "python", "-m", "pip", "list", "--format=freeze", "--exclude=pip").split()
    found = {canonicalize_name(name): v for name, v in (line.split("==") for line in listed)}
    assert found.pop("rlhf") == PROJECT["version"]
    found.pop("setuptools", None)  # Where venv puts one in, it is the interpreter's own.
    assert {n: v for n, v in found.items() if Version(v.split("+")[0]) != pins.get(n)} == {}


@pytest.mark.slow
def test_system_packages_and_options_exist(image: Build, tmp_path: Path) -> None:
    programs = [text.split()[0] for text in image.checked]
    assert programs == ["apt-get", "apt-get", "rm", "useradd", "chown"]
    _, install, _, useradd, _ = (text.split() for text in image.checked)
    assert install[1] == "install"
    names = [word for word in install[2:] if not word.startswith("-")]
    assert names == ["g++"]
    if shutil.which("apt-get"):
        assert unknown_packages(names, tmp_path) == []
    if shutil.which("useradd"):
        asked = subprocess.run(["useradd", "--help"], capture_output=True, text=True, check=False)
        assert [w for w in useradd if w.startswith("--") and w not in asked.stdout] == []
