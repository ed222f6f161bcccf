"""What other programs and people rely on: a difference here is a decision. `make goldens` writes them anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simpletuner.config.dataset_options import KNOWN_DATASET_TYPES, KNOWN_TYPES, LATER_KEYS, MODELS, NO_EFFECT_KEYS
from simpletuner.config.export import describe_all, json_schema, options_markdown
from simpletuner.config.reserved import LATER, LATER_PREFIXES, NEGATED, NO_EFFECT, OLD_VALUES, RENAMED
from simpletuner.events import PAYLOADS, Event
from simpletuner.families.registry import family_names, load_spec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Golden = Callable[[Path, str], None]


def rows(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n"


def test_options(golden: Golden) -> None:
    golden(HERE / "options.json", rows([{k: v for k, v in row.items() if k != "help"} for row in describe_all()]))


def test_names_without_a_type(golden: Golden) -> None:
    known = {
        "later": sorted(LATER),
        "later_prefixes": sorted(LATER_PREFIXES),
        "no_effect": sorted(NO_EFFECT),
        "renamed": RENAMED,
        "negated": NEGATED,
        "old_values": OLD_VALUES,
    }
    golden(HERE / "reserved.json", rows(known))


def test_dataset_keys(golden: Golden) -> None:
    known: dict[str, Any] = {
        kind: {
            key: "required" if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
            for key, info in model.model_fields.items()
        }
        for kind, model in MODELS.items()
    }
    known |= {"later": sorted(LATER_KEYS), "no_effect": sorted(NO_EFFECT_KEYS)}
    known |= {"types": KNOWN_TYPES, "dataset_types": KNOWN_DATASET_TYPES}
    golden(HERE / "dataset_keys.json", rows(known))


def test_events(golden: Golden) -> None:
    schemas = {"envelope": Event.model_json_schema()}
    schemas |= {kind.value: model.model_json_schema() for kind, model in PAYLOADS.items()}
    golden(HERE / "events.json", rows(schemas))


def test_families(golden: Golden) -> None:
    found = {
        name: {
            flavour: {
                key: value for key, value in load_spec(name).layer_values(flavour).items() if not _is_place(value)
            }
            for flavour in load_spec(name).flavours
        }
        for name in family_names()
    }
    golden(HERE / "families.json", rows(found))


def _is_place(value: object) -> bool:
    return isinstance(value, str) and value.startswith("/")


def test_the_options_page_is_current(golden: Golden) -> None:
    golden(ROOT / "docs/OPTIONS.md", options_markdown())


def test_the_options_page_names_every_option() -> None:
    page = (ROOT / "docs/OPTIONS.md").read_text()
    assert [row["name"] for row in describe_all() if f"`{row['name']}`" not in page] == []
    assert str(ROOT) not in page


def test_the_schema_has_every_option() -> None:
    properties = json_schema()["properties"]
    assert set(properties) == {f"--{row['name']}" for row in describe_all()}
    assert all(schema["description"] for schema in properties.values())
