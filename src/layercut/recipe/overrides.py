"""Single recipe keys set from outside the recipe: ``--set`` flags and environment variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercut.errors import RecipeError
from layercut.recipe import strict_yaml

PREFIX = "LAYERCUT__"
"""Of environment variables: ``LAYERCUT__CALIBRATION__SEQ_LEN`` is ``calibration.seq_len``."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key's value, and which flag or variable it comes from."""

    path: tuple[str, ...]
    value: Any
    origin: str


def from_environment(environ: Mapping[str, str]) -> tuple[list[Setting], list[str]]:
    """Settings in ``environ``, and what is wrong with the others."""
    texts = [
        (tuple(name.removeprefix(PREFIX).lower().split("__")), text, name)
        for name, text in sorted(environ.items())
        if name.startswith(PREFIX)
    ]
    return _parse(texts)


def from_flags(flags: Sequence[str]) -> tuple[list[Setting], list[str]]:
    """Settings in ``a.b=c`` flags, and what is wrong with the others."""
    texts = []
    problems = []
    for flag in flags:
        key, equals, text = flag.partition("=")
        if equals:
            texts.append((tuple(key.strip().split(".")), text, f"--set {key.strip()}"))
        else:
            problems.append(f"--set {flag}: should read KEY=VALUE")
    settings, more_problems = _parse(texts)
    return settings, problems + more_problems


def merge(
    data: dict[str, Any],
    settings: Sequence[Setting],
    *,
    alternatives: tuple[str, Sequence[str]],
) -> dict[str, str]:
    """Set each setting in ``data``.

    Args:
        data: nested mappings; changed in place.
        settings: all of one precedence.
        alternatives: a section and its keys that spell one setting: a value for one of them
            replaces what weaker sources said with another.

    Returns:
        key path → origin.
    """
    section_name, keys = alternatives
    section = data.get(section_name)
    if isinstance(section, dict) and any(
        s.path[0] == section_name and s.path[-1] in keys and s.value is not None for s in settings
    ):
        data[section_name] = {k: v for k, v in section.items() if k not in keys}
    for setting in settings:
        section = data
        for part in setting.path[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[setting.path[-1]] = setting.value
    return {".".join(setting.path): setting.origin for setting in settings}


def _parse(texts: Sequence[tuple[tuple[str, ...], str, str]]) -> tuple[list[Setting], list[str]]:
    """Read each (key path, YAML text, origin)."""
    settings = []
    problems = []
    for path, text, origin in texts:
        try:
            settings.append(Setting(path, strict_yaml.load(text, origin), origin))
        except RecipeError as error:
            problems.append(str(error))
    return settings, problems
