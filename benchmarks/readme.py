"""Puts a text between markers of a README, and leaves the rest as it is."""

from __future__ import annotations

from pathlib import Path

MARKERS = ("<!-- benchmark-table -->", "<!-- /benchmark-table -->")


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers.

    Raises:
        SystemExit: The file lacks a marker.
    """
    readme = path.read_text(encoding="utf-8")
    begin, end = MARKERS
    if begin not in readme or end not in readme:
        raise SystemExit(f"{path} has no {begin} and {end} to write between")
    before, after = readme.split(begin)[0], readme.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
