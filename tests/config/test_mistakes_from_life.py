"""What people really write: each mistake is found at its place, with a hint that mends it. design.md §7."""

from __future__ import annotations

from typing import Any

import pytest
from config_place import Place

PLAIN = '{"id": "pictures", "instance_data_dir": "pictures"}'
FILE = "/--data_backend_config"
FIRST = "/datasets/0"


def entry(more: str) -> str:
    """A file of one dataset with some more text in it."""
    return f"[{PLAIN[:-1]}, {more}}}]"


DATASET_FILES: list[tuple[str, str, str, str]] = [
    # text of the file, code, pointer, part of the hint
    ('[{"id": "pictures", "instance_data_dir": "pictures",}]', "bad_json", FILE, "Remove the comma before the }"),
    (f"[{PLAIN},]", "bad_json", FILE, "Remove the comma before the ]"),
    (f"[\n  // mine\n  {PLAIN}]", "bad_json", FILE, "no comments"),
    ("[{'id': 'pictures'}]", "bad_json", FILE, "double quotes"),
    ('[{id: "pictures"}]', "bad_json", FILE, "double quotes"),
    (entry('"crop": True'), "bad_json", FILE, "Write true, not True"),
    (entry('"caption_strategy": None'), "bad_json", FILE, "Write null, not None"),
    ('[{"id": "a" "instance_data_dir": "b"}]', "bad_json", FILE, "comma is missing"),
    ('[{"id": "a", "instance_data_dir": "C:\\pictures"}]', "bad_json", FILE, "backslash twice"),
    (f"{PLAIN}\n{PLAIN}", "bad_json", FILE, "into one list"),
    (f"[{PLAIN}", "bad_json", FILE, ""),
    ('[{"id": "a', "bad_json", FILE, ""),
    ("", "bad_json", FILE, "An empty list is []"),
    (" \n\t" * 2000, "bad_json", FILE, "An empty list is []"),
    (PLAIN, "bad_dataset_file", FILE, "Put [ and ] around it"),
    (f'{{"datasets": [{PLAIN}]}}', "bad_dataset_file", FILE, "only what stands in 'datasets'"),
    (f"[[{PLAIN}]]", "bad_dataset", FIRST, "Remove one pair of [ ]"),
    ('["pictures"]', "bad_dataset", FIRST, '{"id"'),
    (entry('"crop": "yes please"'), "bad_boolean", f"{FIRST}/crop", "true or false"),
    (entry('"resolution": "1024px"'), "bad_value", f"{FIRST}/resolution", "such as 1024"),
    (
        entry('"resolution": 1024, "resolution_type": "area"'),
        "size_unit",
        f"{FIRST}/resolution",
        "megapixels",
    ),
    (entry('"captionStrategy": "textfile"'), "unknown_dataset_key", f"{FIRST}/captionStrategy", "caption_st"),
    (entry('"--resolution": 512'), "unknown_dataset_key", f"{FIRST}/--resolution", "'resolution'"),
    (entry('"caption_strategy": "text"'), "bad_value", f"{FIRST}/caption_strategy", "'textfile'"),
    (entry('"conditioning_data": "refs"'), "unknown_conditioning", f"{FIRST}/conditioning_data", "none"),
    ('[{"id": "a", "instance_data_dir": "C:\\\\me"}]', "dataset_path_missing", f"{FIRST}/instance_data_dir", "Windows"),
    ('[{"id": "a", "instance_data_dir": "D:/me"}]', "dataset_path_missing", f"{FIRST}/instance_data_dir", "Windows"),
    ('[{"id": "a", "instance_data_dir": "pictures "}]', "dataset_path_missing", f"{FIRST}/instance_data_dir", "space"),
    (
        '[{"id": "a", "instance_data_dir": "picture"}]',
        "dataset_path_missing",
        f"{FIRST}/instance_data_dir",
        "/pictures?",
    ),
    ('[{"id": "a", "instance_data_dir": "data.json"}]', "dataset_path_missing", f"{FIRST}/instance_data_dir", "a file"),
    ('[{"id": "a", "instance_data_dir": "heic"}]', "no_pictures", f"{FIRST}/instance_data_dir", "JPEG or PNG"),
    ('[{"id": "a", "instance_data_dir": "zip"}]', "no_pictures", f"{FIRST}/instance_data_dir", "Unpack"),
    (
        '[{"id": "a", "instance_data_dir": "named", "caption_strategy": "textfile"}]',
        "no_captions",
        f"{FIRST}/caption_strategy",
        "rename them to .txt",
    ),
]

OPTIONS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"learning_rat": 1}, "unknown_field", "/--learning_rat", "--learning_rate"),
    ({"learningRate": 1}, "unknown_field", "/--learningRate", "--learning_rate"),
    ({"learning_rate": "1,e-4"}, "bad_value", "/--learning_rate", "rate"),
    ({"optimizer": "adamw_bf61"}, "unknown_optimizer", "/--optimizer", "'adamw_bf16'"),
    ({"model_family": "pixart"}, "unknown_family", "/--model_family", "'pixart_sigma'"),
    ({"model_flavour": "900M-1024"}, "unknown_flavour", "/--model_flavour", "900M-1024-v0.6"),
    ({"mixed_precision": "bfloat16"}, "bad_choice", "/--mixed_precision", "bf16"),
    ({"validation_resolution": "1024*1024"}, "bad_resolution", "/--validation_resolution", "1024x1024"),
    ({"num_train_epochs": 2}, "both_epochs_and_steps", "/--max_train_steps", "Set one of them to 0"),
    ({"data_backend_config": "nope.json"}, "data_backend_config_missing", FILE, "looked for"),
    ({"base_model_precision": "int8-quanto"}, "quantised_full", "/--base_model_precision", "adapter"),
    ({"webhook_config": "{'webhook_type': 'raw'}"}, "bad_json", "/--webhook_config", "double quotes"),
]


@pytest.mark.parametrize(("text", "code", "pointer", "hint"), DATASET_FILES)
def test_a_dataset_file_is_mended_by_its_hint(place: Place, text: str, code: str, pointer: str, hint: str) -> None:
    for folder, files in {"heic": ["a.heic", "b.heic"], "zip": ["all.zip"], "named": ["a.png", "a.caption"]}.items():
        (place.workspace / folder).mkdir()
        for file in files:
            (place.workspace / folder / file).touch()
    found = place.with_datasets(text)
    assert [problem.hint for problem in found.problems if (problem.code, problem.pointer) == (code, pointer)][0:1] == [
        next(problem.hint for problem in found.problems if hint in problem.hint)
    ]


@pytest.mark.parametrize(("options", "code", "pointer", "hint"), OPTIONS)
def test_an_option_is_mended_by_its_hint(
    place: Place, options: dict[str, Any], code: str, pointer: str, hint: str
) -> None:
    found = place.resolve(**options)
    problem = next(problem for problem in found.problems if (problem.code, problem.pointer) == (code, pointer))
    assert hint in problem.hint


def test_the_mark_that_windows_editors_put_first_is_no_mistake(place: Place) -> None:
    assert place.with_datasets(f"\ufeff[{PLAIN}]").errors == []
