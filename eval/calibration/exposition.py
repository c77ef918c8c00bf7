"""Scrapes of a /metrics page: Prometheus' text format, as it was saved with curl, and when that was.

The format is text format 0.0.4 as Prometheus documents it, and what OpenMetrics adds to it: exemplars and `# EOF`.
A page has no clock of its own. The best there is, in this order: times of samples, which Prometheus' /federate gives;
the Date of the HTTP header, which `curl -i` saves; the time at which the file was written, which copying may lose.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]
CLOCKS = ("sample times", "Date header", "file times")
"""Best first; `Scrape.times` has them by these names."""
_SAMPLE = re.compile(
    r"""(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
        (?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?
        [ \t]+(?P<value>\S+)
        (?:[ \t]+(?P<time>-?[0-9.]+))?
        (?:[ \t]*\#.*)?""",
    re.VERBOSE,
)
_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Scrape:
    """What one scrape says."""

    path: Path
    samples: Mapping[Key, float]
    """By name and sorted labels."""
    times: Mapping[str, float]
    """Seconds since 1970, by clock; the file's is always there."""


def read_scrape(path: Path) -> Scrape:
    """Raises ValueError with one line for a file that cannot be read, or that is not in the format."""
    try:
        text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}): save a scrape of /metrics") from error
    head, page = _split(text)
    times = {"file times": written}
    if date := re.search(r"(?im)^date:(.*)$", head):
        times["Date header"] = _seconds(path, date[1])
    samples, stamps = {}, []
    for number, line in enumerate(page.split("\n"), 1 + head.count("\n")):
        if line.strip() and not line.lstrip().startswith("#"):
            key, samples[key], stamp = _sample(f"{path}:{number}", line.strip())
            stamps += [] if stamp is None else [stamp]
    if stamps:
        times["sample times"] = max(stamps) / (1.0 if page.rstrip().endswith("# EOF") else 1e3)
    return Scrape(path, samples, times)


def _split(text: str) -> tuple[str, str]:
    """What `curl -i` wrote before the page, if it did, and the page."""
    head = ""
    while text.startswith("HTTP/"):
        first, blank, text = text.partition("\n\n")
        head += first + blank
    return head, text


def _seconds(path: Path, date: str) -> float:
    try:
        return parsedate_to_datetime(date.strip()).timestamp()
    except ValueError as error:
        raise ValueError(f"{path}: Date header is {date.strip()!r}, no date: remove the HTTP header") from error


def _sample(place: str, line: str) -> tuple[Key, float, float | None]:
    """Name and labels, value, and time in the format's own unit."""
    found = _SAMPLE.fullmatch(line)
    try:
        if found is None:
            raise ValueError
        labels = tuple(sorted(_labels(found["labels"] or "")))
        return (found["name"], labels), float(found["value"]), float(found["time"]) if found["time"] else None
    except ValueError:
        shown = line if len(line) <= 60 else f"{line[:60]}..."
        raise ValueError(
            f"{place}: is {shown!r}, no sample of Prometheus' text format: save /metrics with curl"
        ) from None


def _labels(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _LABEL.match(text, at)
        if found is None:
            raise ValueError
        yield found[1], _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], found[2])
        at = found.end()
