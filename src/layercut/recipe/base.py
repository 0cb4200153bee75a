"""What every part of a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A part of the recipe: unknown keys are errors, types are exact, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def example(cls) -> Self:
        """What ``layercut recipe`` shows of an optional section: its defaults, where those do."""
        return cls()


Count = Annotated[int, Field(ge=1)]
SequenceLength = Annotated[int, Field(ge=2)]
Name = Annotated[str, Field(min_length=1)]
# strict=False: YAML has lists, not tuples; the items stay strict.
Names = Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]
Positive = Annotated[float, Field(gt=0)]


def section_type(annotation: Any) -> type[Config] | None:
    """The section a field holds, be it optional or not; ``None`` for other fields."""
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, Config):
            return kind
    return None
