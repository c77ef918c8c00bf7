"""Published rows: what others measured of whole engines, as published.json has it with its sources."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.memory_backend.geometry import dtype_bytes, find_model

PUBLISHED = Path(__file__).with_name("published.json")
FIGURES = ("ttft_ms", "tpot_ms", "output_tokens_per_s")
_COUNTS = ("tensor_parallel", "input_tokens", "output_tokens", "concurrency", "requests")


@dataclass(frozen=True)
class PublishedRow:
    """One run of a benchmark: `concurrency` clients, each sends its next request when the last one has ended."""

    model: str
    gpu: str
    tensor_parallel: int
    weight_dtype: str
    kv_dtype: str
    state_dtype: str
    engine: str
    input_tokens: int
    """Of every request, as `output_tokens`."""
    output_tokens: int
    concurrency: int
    requests: int
    """Of all clients together; the first `concurrency` of them start at once."""
    ttft_ms: float | None
    """Mean over requests, as `tpot_ms`. None: not published; at least one of FIGURES is."""
    tpot_ms: float | None
    output_tokens_per_s: float | None
    """Of all clients together."""
    source: str

    def __post_init__(self) -> None:
        find_model(self.model)
        find_gpu(self.gpu)
        for dtype in (self.weight_dtype, self.kv_dtype, self.state_dtype):
            dtype_bytes(dtype)
        for name in _COUNTS:
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected an integer >= 1")
        if self.output_tokens < 2 or self.requests < self.concurrency:
            raise ValueError(
                f"output_tokens is {self.output_tokens} and requests {self.requests}, expected at least 2 and at least "
                f"concurrency {self.concurrency}"
            )
        for name in FIGURES:
            if (value := getattr(self, name)) is not None and not _is_positive(value):
                raise ValueError(f"{name} is {value!r}, expected a number > 0 or null")
        if not self.measured:
            raise ValueError(f"{', '.join(FIGURES)} are all null, expected one number at least")

    @property
    def measured(self) -> dict[str, float]:
        """The figures that were published."""
        return {name: getattr(self, name) for name in FIGURES if getattr(self, name) is not None}

    @property
    def name(self) -> str:
        """Short, for tables."""
        gpus = f"{self.tensor_parallel} x {self.gpu}"
        return f"{self.model} {gpus} {self.input_tokens}/{self.output_tokens} c{self.concurrency}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def read_rows(path: Path) -> list[PublishedRow]:
    """The rows of a JSON file; ValueError names file and row of the first bad one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, list) or len(content) < 2:
        raise ValueError(f"{path}: expected a list of at least two rows, to fit one half and hold out the other")
    return [_read_row(path, number, row) for number, row in enumerate(content)]


def _read_row(path: Path, number: int, row: object) -> PublishedRow:
    fields = [field.name for field in dataclasses.fields(PublishedRow)]
    if not isinstance(row, dict) or sorted(row) != sorted(fields):
        raise ValueError(f"{path}: row {number} is {str(row)[:60]!r}, expected the fields {', '.join(fields)}")
    try:
        return PublishedRow(**row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: row {number}: {error}") from error


def halves(rows: list[PublishedRow]) -> tuple[list[PublishedRow], list[PublishedRow]]:
    """(to fit, held out): every other row, so that each setup is in both as far as it can be."""
    return rows[::2], rows[1::2]
