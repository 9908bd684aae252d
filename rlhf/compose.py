"""From a command line to one typed, checked Config; Hydra and OmegaConf stop here.

A run that exists is the base of its own configuration: what the command line says goes on top of
its run.yaml. Everything else starts from conf/run.yaml. Hydra is imported only where it is needed:
a command line of plain values goes without it, in a third of the time.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config import Config
from rlhf.defaults import PRIMARY, stack
from rlhf.errors import ConfigError
from rlhf.fingerprint import effects, flatten, plain_tree, read_tree

FROZEN = "frozen"
RUN_FILE = "run.yaml"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
PLAIN = re.compile(
    r"(?P<key>[a-z_]+(\.[a-z_]+)*)="
    r"((?P<number>0|-?[1-9][0-9]{0,15})|(?P<word>[A-Za-z/][A-Za-z0-9_./-]*))"
)
"""Overrides that need no grammar: a whole number, or a word that may be a path."""
LITERALS = {"null": None, "true": True, "false": False}
FLOATS = ("inf", "nan")
HYDRA_SETTINGS = [
    {"override hydra/job_logging": "none"},
    {"override hydra/hydra_logging": "none"},
]


def conf_dir() -> Path:
    """Find the configuration files: beside the package in a checkout, inside it in a wheel."""
    packaged = Path(__file__).parent / "_conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def recipes() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))


def groups() -> list[str]:
    """Return the configuration groups other than recipe that a command line can choose from."""
    chosen = {path.parent.name for path in conf_dir().glob("*/*.yaml")}
    return sorted(chosen - {"recipe", "paper"})


def load(overrides: Sequence[str], *, needs_run: bool = True) -> Config:
    """Compose, convert and check; raises ConfigError.

    `needs_run=False` is for commands that work without a run, such as ingest.
    """
    known = load_plain(overrides)
    return known if known is not None else load_composed(overrides, needs_run=needs_run)


def load_plain(overrides: Sequence[str]) -> Config | None:
    """Load without Hydra; None where that takes Hydra.

    That is: an override that is no plain value of a setting, a new run without a recipe, and
    whatever Hydra refuses.
    """
    given = plain_values(overrides)
    if given is None:
        return None
    folder = base_folder(given)
    if folder is None:
        chosen = {name: str(given.pop(name)) for name in ("recipe", *groups()) if name in given}
        trees = stack(conf_dir(), chosen)
        if trees is None:
            return None
        changed = given
    else:
        if "${" in (folder / RUN_FILE).read_text(encoding="utf-8"):
            return None
        trees = [read_tree(folder / RUN_FILE)]
        changed = {"paths.runs": str(folder.parent), "run": folder.name, **given}
        if changed.pop("recipe", trees[0].get("recipe")) != trees[0].get("recipe"):
            return None
    if not changed.keys() <= effects().keys():
        return None
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), *trees)
        for key, value in changed.items():
            OmegaConf.update(tree, key, value)
        return to_config(tree)
    except OmegaConfBaseException:
        return None


def load_composed(overrides: Sequence[str], *, needs_run: bool = True) -> Config:
    """Load with Hydra: any configuration, any override."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    try:
        primary, kept = choose_base(overrides)
        if GlobalHydra.instance().is_initialized():
            composed = compose(primary, overrides=kept)
        else:
            with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
                composed = compose(primary, overrides=kept)
        return to_config(composed, needs_run=needs_run)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def to_config(composed: Any, *, needs_run: bool = True) -> Config:
    """Turn a composed configuration into a checked Config; raises ConfigError."""
    if OmegaConf.is_missing(composed, "recipe"):
        if needs_run and not OmegaConf.is_interpolation(composed, "run"):
            raise ConfigError(
                f"run={composed.run} does not exist in paths.runs={composed.paths.runs} (there: "
                f"{', '.join(known_runs(Path(composed.paths.runs))) or 'none'}): "
                f"start it with recipe=NAME, one of {', '.join(recipes())}"
            )
        if needs_run:
            raise ConfigError(
                f"no recipe given: add recipe=NAME, one of {', '.join(recipes())}, "
                "or run=NAME for a run that exists"
            )
        composed.recipe = "none"
    for key in flatten(OmegaConf.to_container(composed, enum_to_str=True)):  # type: ignore[arg-type]
        if key not in effects():
            raise ConfigError(f"unknown setting {key}: {_nearest(key)}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    if not RUN_NAME.fullmatch(config.run):
        raise ConfigError(
            f"run={config.run} cannot name a run: use up to 80 letters, digits, dots, dashes and "
            "underscores"
        )
    return config


def run_dir(config: Config) -> Path:
    """Return the folder of a run."""
    return Path(config.paths.runs) / config.run


def known_runs(runs: Path) -> list[str]:
    """Return the names of the runs that have started in a folder."""
    return sorted(path.parent.name for path in runs.glob(f"*/{RUN_FILE}"))


def freeze(config: Config) -> str:
    """Return the text of run.yaml."""
    return OmegaConf.to_yaml(plain_tree(config))


def load_frozen(folder: Path) -> Config:
    """Read the run.yaml of a run's folder; `paths.runs` is where the folder lies now."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), read_tree(folder / RUN_FILE))
    except FileNotFoundError as error:
        raise ConfigError(
            f"run={folder.name} does not exist in paths.runs={folder.parent}: "
            "start it with `rlhf run recipe=NAME`"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{folder / RUN_FILE}: {explain(error)}") from error
    tree.paths.runs = str(folder.parent)
    return to_config(tree)


def choose_base(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Pick conf/run.yaml or the run.yaml of a run that exists; returns its name and the overrides.

    Naming another recipe for a run that exists is a ConfigError.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    given = simple_values(overrides)
    folder = base_folder(given)
    if folder is None:
        return PRIMARY, list(overrides)
    frozen = read_tree(folder / RUN_FILE)
    recipe = given.get("recipe")
    if recipe is not None and recipe != frozen.get("recipe"):
        raise ConfigError(
            f"recipe={recipe} cannot be used for run={folder.name}, which started as "
            f"recipe={frozen.get('recipe')}: leave the recipe out, or choose another run=NAME"
        )
    paths = {**frozen.get("paths", {}), "runs": str(folder.parent)}
    tree = {**frozen, "run": folder.name, "paths": paths}
    optional: list[Any] = [{group: None} for group in groups()]
    defaults = ["schema", "driver", "_self_", *optional, *HYDRA_SETTINGS]
    ConfigStore.instance().store(name=FROZEN, node={"defaults": defaults, **tree})
    return FROZEN, [text for text in overrides if not text.startswith("recipe=")]


def base_folder(given: Mapping[str, object]) -> Path | None:
    """Return the folder of the run that settings name; None where that run has not started."""
    name = given.get("run", given.get("recipe"))
    folder = Path(str(given.get("paths.runs", Config().paths.runs))) / str(name)
    return folder if name is not None and (folder / RUN_FILE).is_file() else None


def plain_values(overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return key to value as Hydra reads them; None where it takes Hydra's grammar to do so."""
    found: dict[str, Any] = {}
    for text in overrides:
        match = PLAIN.fullmatch(text)
        if match is None:
            return None
        word, number = match["word"], match["number"]
        if word is None:
            found[match["key"]] = int(number)
        elif word.lower() in FLOATS:
            return None
        else:
            found[match["key"]] = LITERALS.get(word.lower(), word)
    return found


def simple_values(overrides: Sequence[str]) -> dict[str, str]:
    """Return key to value of the overrides that set one plain value (no sweep, no deletion)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not override.is_delete() and not override.is_sweep_override():
            found[override.key_or_group] = str(override.value())
    return found


def sweeps(overrides: Sequence[str], key: str) -> bool:
    """Tell whether an override gives several values for a key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return any(item.key_or_group == key and item.is_sweep_override() for item in parsed)


def explain(error: Exception) -> str:
    """Say in one line which key and value Hydra refused, and what to do."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(str(item) for item in chain)
    first = " ".join(str(chain[0]).split())
    override = _search(r"override '?([^\s']+=[^\n]*?)'?$", str(chain[0]))
    unknown = _search(r"Could not override '([^']+)'", text)
    if unknown:
        value = _search(r"config use \++\S*?=([^\n]*)", text)
        shown = f"{unknown}={value}" if value else unknown
        return f"unknown setting {shown}: {_nearest(unknown)}"
    stray = _search(r"Key '([^']+)' (?:is )?not in", text)
    full_key = _search(r"full_key: (\S+)", text)
    if stray:
        return f"unknown setting {full_key or stray}: {_nearest(full_key or stray)}"
    group = _search(r"Could not find '([^']+)'", text)
    if group:
        folder = group.rpartition("/")[0]
        options = ", ".join(sorted(path.stem for path in (conf_dir() / folder).glob("*.yaml")))
        return f"{group.replace('/', '=', 1)} does not exist: choose one of {options}"
    if full_key:
        reason = " ".join(str(chain[-1]).split("\n", maxsplit=1)[0].split())
        return f"{override or full_key} cannot work: {reason}; {_remedy(full_key)}"
    return f"{first}; see `rlhf run --help` for the settings there are"


def _remedy(key: str) -> str:
    plain = key.partition("[")[0]
    tree = OmegaConf.structured(Config)
    default = OmegaConf.select(tree, plain)
    if default is None:
        return "give a value of its type"
    if OmegaConf.is_dict(default):
        return f"set single values, such as {plain}.{next(iter(default))}"
    shown = default
    if OmegaConf.is_list(default):
        shown = "[" + ",".join(str(getattr(item, "name", item)) for item in default) + "]"
    return f"give a value like the default, {plain}={getattr(shown, 'name', shown)}"


def _nearest(key: str) -> str:
    known = [*effects(), *groups(), "recipe"]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = {name.rpartition(".")[2]: name for name in known}
        near = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    if near:
        return f"did you mean {near[0]}?"
    return "`rlhf run --help` lists the settings there are"


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text, flags=re.MULTILINE)
    return match.group(1) if match else ""
