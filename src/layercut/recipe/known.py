"""Names of methods, as recipes have them."""

from __future__ import annotations

from pydantic import AfterValidator

from layercut.errors import suggestion
from layercut.registry import Stage, available


def known(stage: Stage) -> AfterValidator:
    """Accept the names of that stage's methods."""

    def check(name: str) -> str:
        names = available(stage)
        if name not in names:
            hint = suggestion(name, names)
            raise ValueError(f"unknown method '{name}'{hint} (known: {', '.join(names)})")
        return name

    return AfterValidator(check)
