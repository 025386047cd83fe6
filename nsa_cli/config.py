"""The user's own defaults for options, in a TOML file; the environment and the command line go before it.

    model = "qwen-nsa"        # for every command that has --model
    max-tokens = 300

    [summarize]
    max-tokens = 1000         # for this one

It is read from the user's configuration directory alone: nothing that is being read can set anything.
"""

import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click

from nsa_cli.settings import config_dir
from nsa_models.errors import InputError

OPTIONS_OF = {"run": "ask"}  # every recipe is a command with these options


class ForEach(dict):
    """The same defaults for every command of a group."""

    def get(self, key: str, default: object = None) -> "ForEach":
        return self


@dataclass(frozen=True)
class Config:
    """What the file says: values for every command by key, and for single ones by command and key."""

    general: dict[str, object] = field(default_factory=dict)
    sections: dict[str, dict[str, object]] = field(default_factory=dict)

    def default_map(self, root: click.Group) -> dict:
        """The same as click takes it."""
        defaults: dict = {}
        for key, setting in settable(root).items() if self.general or self.sections else ():
            for command in setting.commands:
                value = self.sections.get(command, {}).get(key, self.general.get(key))
                if value is not None:
                    of = defaults.setdefault(command, ForEach() if command in OPTIONS_OF else {})
                    of[setting.option.name] = value
        return defaults | defaults.pop("", {})


@dataclass(frozen=True)
class Settable:
    """An option that can be set: its commands, "" being `nsa` itself."""

    option: click.Option
    commands: list[str]


def config_path() -> Path:
    return config_dir() / "config.toml"


def read_config(root: click.Group) -> Config:
    """The user's file, checked; an empty one if there is none. Raises InputError in one line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = config_path()
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Config()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    known, commands = settable(root), root.list_commands(click.Context(root))
    sections = {key: value for key, value in data.items() if isinstance(value, dict)}
    general = {key: value for key, value in data.items() if key not in sections}
    for name, section in sections.items():
        if name not in commands:
            raise InputError(f"{path}: unknown section [{name}]; {nearest(name, commands)}")
        check(path, section, {key: s for key, s in known.items() if name in s.commands}, f" in [{name}]")
    check(path, general, known)
    return Config(general, sections)


def settable(root: click.Group) -> dict[str, Settable]:
    """By key: all options that can also be set by the environment."""
    context = click.Context(root)
    commands = [("", root), *((name, root.get_command(context, name)) for name in root.list_commands(context))]
    found: dict[str, Settable] = {}
    for name, command in commands:
        named = root.get_command(context, OPTIONS_OF[name]) if name in OPTIONS_OF else command
        for option in named.params:
            if isinstance(option, click.Option) and option.envvar:
                key = max(option.opts, key=len).removeprefix("--")
                found.setdefault(key, Settable(option, [])).commands.append(name)
    return found


def check(path: Path, values: dict[str, object], known: dict[str, Settable], where: str = "") -> None:
    """Raise InputError unless there are such options and they take the values."""
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{where}; {nearest(key, known)}")
        option = known[key].option
        try:
            if isinstance(value, bool) != option.is_flag:
                raise ValueError(f"{value!r} where {'true or false' if option.is_flag else 'a value'} is expected")
            option.type_cast_value(click.Context(click.Command("nsa")), value)
        except (click.BadParameter, TypeError, ValueError) as error:
            message = error.message if isinstance(error, click.BadParameter) else str(error)
            raise InputError(f"{path}: {key}{where}: {message}") from None


def nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {near[0]!r}?" if near else "nsa config show lists what there is"


def settings(root: click.Group) -> list[tuple[str, object, str]]:
    """Every setting in force: its key (`command.key` for one command's), its value or None, and where that is from."""
    config, path = read_config(root), str(config_path())
    found = []
    for key, setting in settable(root).items():
        variable = os.environ.get(setting.option.envvar)
        if variable:
            found.append((key, variable, setting.option.envvar))
            continue
        general = config.general.get(key)
        default = setting.option.get_default(click.Context(click.Command("nsa")))
        default = default if isinstance(default, str | int | float) else None  # click's own mark for none
        found.append((key, general, path) if general is not None else (key, default, "default"))
        found += [(f"{name}.{key}", section[key], path) for name, section in config.sections.items() if key in section]
    return found
