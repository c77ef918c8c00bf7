"""Fields: a config.json field by field, where whatever is missing or odd is one line with file and field."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

Shape = dict[str, Any]
"""Some of HybridModel's fields."""

MOST = 2**40
"""No field is larger: a count beyond it is damage."""
MOST_LAYERS = 10_000
NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


class Architecture(NamedTuple):
    """How the configs of one `model_type` are read."""

    read: "Callable[[Fields], Shape]"
    defaults: Mapping[str, Any] = NO_DEFAULTS
    """What the model's class in transformers takes for fields that its configs leave out."""


class Fields:
    """The fields of one config.json, or of an object in it. ValueError names file, field, value and what was expected.

    A field that is null counts as missing.
    """

    def __init__(
        self, path: Path, architecture: str, values: Mapping[str, Any], defaults: Mapping[str, Any] = NO_DEFAULTS
    ) -> None:
        self.path, self.architecture, self._defaults = path, architecture, defaults
        self._values = {name: value for name, value in values.items() if value is not None}

    @classmethod
    def read(cls, path: Path, known: Mapping[str, Architecture], refused: Collection[str]) -> "Fields":
        """Those of the file, with those of `text_config` where the language model is nested there.

        The architecture is the file's `model_type`, or that of `text_config` where only this one is in the tables.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no readable config.json ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: a config.json is an object, this is a {type(config).__name__}")
        text = config.get("text_config") or {}
        if not isinstance(text, dict):
            raise ValueError(f"{path}: text_config is {_shown(text)}, expected an object")
        names = [str(part.get("model_type", "")).removesuffix("_text") for part in (config, text)]
        named = next((name for name in names if name in known or name in refused), names[0])
        defaults = known[named].defaults if named in known else NO_DEFAULTS
        return cls(path, named, {**config, **text}, defaults)

    def has(self, name: str) -> bool:
        return name in self._values or name in self._defaults

    def first(self, *names: str) -> str:
        """The first of these names that is given; the last one where none is."""
        return next((name for name in names if self.has(name)), names[-1])

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, self._defaults.get(name, default))
        if value is None:
            raise ValueError(f"{self.path}: field {name!r} of architecture {self.architecture!r} is missing")
        return value

    def wrong(self, name: str, expected: str) -> ValueError:
        """The error that says what was expected in place of the value of `name`."""
        return ValueError(f"{self.path}: {name} is {_shown(self._get(name, ''))}, expected {expected}")

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """An integer from `least` to `most`."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(
                name, f"an integer >= {least}" + (f" and at most {most}" if _is_above(value, most) else "")
            )
        return value

    @property
    def layers(self) -> int:
        """`num_hidden_layers`."""
        return self.count("num_hidden_layers", most=MOST_LAYERS)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def ratio(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(name, "a number above 0")
        return float(value)

    def is_auto(self, name: str) -> bool:
        """Whether `name` is "auto" or left out, so that it follows from other fields."""
        return bool(self._get(name, "auto") == "auto")

    def part(self, name: str) -> "Fields":
        """The object `name` of the config."""
        value = self._get(name, None)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(self.path, self.architecture, value)

    def kinds(self, name: str, *known: Any, spare: int = 0) -> list[Any]:
        """The list or string `name`, a kind per layer, all of them among `known`.

        There must be `num_hidden_layers` of them where the config gives that number, and up to `spare` more, which
        belong to layers that predict further tokens and are left out.
        """
        kinds: Sequence[Any] = self._get(name, None)
        if not isinstance(kinds, list | str) or not kinds:
            raise self.wrong(name, "a list with a kind for each layer")
        strange = [kind for kind in kinds if kind not in known]
        if strange:
            names = ", ".join(map(str, known))
            raise ValueError(f"{self.path}: {name} has a layer {_shown(strange[0])}: known are {names}")
        layers = self.layers if self.has("num_hidden_layers") else len(kinds)
        if not layers <= len(kinds) <= layers + spare:
            raise ValueError(f"{self.path}: {name} has {len(kinds)} layers, but num_hidden_layers is {layers}")
        return list(kinds[:layers])

    def layer_numbers(self, name: str, layers: int, default: list[int] | None = None, *, first: int = 0) -> set[int]:
        """The list `name` of some of `layers` layers, numbered from `first`; also written as a text, '3,4,5'."""
        listed = self._get(name, default)
        if isinstance(listed, str):
            listed = [int(part) if part.strip().isdigit() else part for part in listed.split(",") if part.strip()]
        last = layers + first - 1
        valid = isinstance(listed, list) and all(
            isinstance(number, int) and not isinstance(number, bool) and first <= number <= last for number in listed
        )
        if not valid or len(set(listed)) < len(listed):
            raise self.wrong(name, f"different numbers of layers, {first} to {last}")
        return set(listed)


def _is_above(value: object, most: int) -> bool:
    return isinstance(value, int) and value > most


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
