"""What the recipe's section ``heal`` refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from layercut.recipe.heal import HealConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither is set; give either minutes or steps"),
        ({"minutes": 1.0, "steps": 3}, "set together; give either minutes or steps"),
        ({"minutes": 0.0}, "minutes or steps"),
        ({"steps": 3, "learning_rat": 1.0}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        HealConfig(**given)
