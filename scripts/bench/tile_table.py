"""The tables of `_triton/tiles.py` as text between two markers, and put there."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmc_kernels._triton import tiles

BEGIN, END = "# tuned: begin\n", "# tuned: end\n"
_LINE = 100


def render(tables: Mapping[str, tiles.Table]) -> str:
    """The tables as they stand between the markers."""
    lines = ["TABLES: dict[str, Table] = {"]
    for name, table in tables.items():
        lines.append(f"    {json.dumps(name)}: Table(")
        for field in dataclasses.fields(table):
            value = getattr(table, field.name)
            if isinstance(value, str):
                lines += _text(field.name, value)
                continue
            lines.append(f"        {field.name}={{")
            lines += [f"            {_literal(k)}: {_literal(v)}," for k, v in value.items()]
            lines.append("        },")
        lines.append("    ),")
    return "\n".join([*lines, "}\n"])


def _text(name: str, value: str) -> list[str]:
    """A string as an argument, in parentheses where it is too long for a line."""
    line = f"        {name}={json.dumps(value)},"
    if len(line) <= _LINE:
        return [line]
    parts = [json.dumps(part) for part in textwrap.wrap(value, 80, drop_whitespace=False)]
    return [f"        {name}=(", *(f"            {part}" for part in parts), "        ),"]


def _literal(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        inside = ", ".join(f"{name}={_literal(getattr(value, name))}" for name in names)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, tuple):
        inside = ", ".join(map(_literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def rewrite(path: Path, tables: Mapping[str, tiles.Table]) -> None:
    """Put these tables between the markers of a file."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"expected one line {BEGIN.strip()!r} and one {END.strip()!r} in {path.name}, "
            f"got {text.count(BEGIN)} and {text.count(END)}"
        )
    head, rest = text.split(BEGIN)
    new = head + BEGIN + render(tables) + END + rest.split(END)[1]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(new)
    temporary.replace(path)
