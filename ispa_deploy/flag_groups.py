"""Flags in groups: a new flag is one field of one group. Does not import torch by itself.

`grouped` turns a command whose parameters are such groups into one that typer reads flag by flag; `Sections` prints
each group under its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
import typer.core

from ispa_deploy.printing import json_path

MAX_SEED = 2**32

BundleArg = Annotated[Path, typer.Argument(help="Folder written by `quantize`.", show_default=False)]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; progress goes to stderr.")]
StatsOpt = Annotated[
    Path | None, typer.Option("--stats", callback=json_path, help="Also write the JSON document to this file.")
]
SeedOpt = Annotated[int, typer.Option(min=-MAX_SEED, max=MAX_SEED, help="Same seed, same video, on one device.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOpt = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32: what is not quantised runs in it.")]
LastPassOpt = Annotated[
    int, typer.Option(help="Bits of 8-bit linears' activations in a chunk's last pass, last third of layers: 16 or 8.")
]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice.")]
TuneOpt = Annotated[bool, typer.Option(help="On glibc, keep freed memory for reuse: faster, larger resident set.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer wants it: each parameter that is a group replaced by the group's fields, in their order."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    flat: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        group = groups.get(name)
        own = get_type_hints(group, include_extras=True) if group else {name: hints[name]}
        defaults = {field.name: field.default for field in fields(group)} if group else {name: parameter.default}
        for flag, default in defaults.items():
            assert flag not in flat, f"two flags are called {flag}"
            hint = _titled(own[flag], group, flag) if group else own[flag]
            flat[flag] = inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    def called(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**made, **given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(list(flat.values()))  # type: ignore[attr-defined]
    called.__annotations__ = {name: parameter.annotation for name, parameter in flat.items()}
    return called


def _titled(hint: Any, group: type, flag: str) -> Any:
    """The flag's annotation, told which group it belongs to: the class that has the field."""
    kind, option = get_args(hint)[:2]
    owner = next(base for base in group.__mro__ if flag in inspect.get_annotations(base))
    option = copy(option)
    option.rich_help_panel = (owner.__doc__ or owner.__name__).rstrip(".")
    return Annotated[kind, option]


class Sections(typer.core.TyperCommand):
    """A command whose help lists its flags group by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                plain = "Arguments" if param.param_type_name == "argument" else "Output and help"
                sections.setdefault(getattr(param, "rich_help_panel", None) or plain, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
