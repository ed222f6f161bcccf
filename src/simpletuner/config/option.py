"""What an option is: one field of an `OptionGroup`, declared once, from which every surface is generated.

A field's name is its flat name (`--learning_rate`), its annotation and default are what validation uses, the docstring
under it is its help, and `Ui` says where it stands in a form and how it is spoken of.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Tab = Literal["model", "training", "validation", "publishing", "data", "hardware"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ui:
    """Form placement, and the few facts about an option that its type cannot say.

    `structured`: written as JSON text, an object, a list or the path of a JSON file. `off`: what the empty string means
    when the option is not nullable. `runs_command`: needs the right to run programs on the host. `later`: the values
    other than the default are not built yet, and setting one is an error that says so.
    """

    tab: Tab
    order: int = 100
    structured: bool = False
    off: Any = None
    runs_command: bool = False
    secret: bool = False
    later: bool = False
    path: bool = False


class OptionGroup(BaseModel):
    """A frozen set of options that belong to one component."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


Kind = Literal["boolean", "integer", "number", "string", "choice", "structured"]


@dataclass(frozen=True, slots=True)
class OptionField:
    """A declared option, as the readers, the schemas and the documentation see it."""

    name: str
    group: str
    info: FieldInfo
    ui: Ui

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def default(self) -> Any:
        if self.info.default_factory is not None:
            return self.info.get_default(call_default_factory=True, validated_data={})
        return None if self.info.default is PydanticUndefined else self.info.default

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def annotation(self) -> Any:
        return self.info.rebuild_annotation()

    @property
    def nullable(self) -> bool:
        return type(None) in _members(self.annotation)

    @property
    def choices(self) -> tuple[str, ...]:
        found: list[str] = []
        for member in _members(self.annotation):
            if get_origin(member) is Literal:
                found += [str(value) for value in get_args(member)]
        return tuple(found)

    @property
    def kind(self) -> Kind:
        if self.ui.structured:
            return "structured"
        members = {_bare(member) for member in _members(self.annotation)} - {type(None)}
        if bool in members:
            return "boolean"
        if str in members:
            return "string"
        if float in members:
            return "number"
        if int in members:
            return "integer"
        return "choice" if self.choices else "string"

    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation, config=ConfigDict(allow_inf_nan=False))


def fields_of(group: type[BaseModel], group_name: str) -> list[OptionField]:
    """Every option of a group, in order of declaration. A field without `Ui` is a programmer's mistake."""
    fields: list[OptionField] = []
    for name, info in group.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, Ui)]
        if len(marks) != 1:
            raise TypeError(f"{group.__name__}.{name} needs exactly one Ui marker")
        fields.append(OptionField(name, group_name, info, marks[0]))
    return fields


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, each without its `Annotated` wrapping."""
    annotation = _strip(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _strip(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _bare(annotation: Any) -> Any:
    return get_origin(annotation) or annotation
