"""Rules about adapters, and about families that edit reference pictures. training.md §1, §4.4, §4.6."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from simpletuner.config.flux_options import FluxOptions
from simpletuner.config.lycoris import check_base, check_lycoris_config, is_unedited
from simpletuner.config.model_options import QUANTISED
from simpletuner.config.pairing import MASKS
from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.errors import Level, Problem, UserError
from simpletuner.families.adapter_header import family_of_header, read_header

_ADAPTER_ONLY = ("lora_type", "lora_rank", "lora_alpha", "lora_dropout", "lycoris_config", "init_lora")
_RANK_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout")


def adapter_rule(at: Situation) -> Iterator[Problem]:
    """Options that describe an adapter need one; of peft and lycoris each has its own."""
    if at.values["model_type"] != "lora":
        for name in _ADAPTER_ONLY:
            if at.given(name):
                yield warning_about("option_no_effect", name, f"--{name} has no effect: --model_type is full.")
        return
    if at.values["lora_type"] == "standard" and at.given("lycoris_config"):
        message = "--lycoris_config has no effect: --lora_type is standard."
        yield warning_about("option_no_effect", "lycoris_config", message, "Set --lora_type lycoris.")
    if at.values["lora_type"] == "lycoris" and at.given("flux_lora_target"):
        message = "--flux_lora_target has no effect: --lora_type is lycoris."
        yield warning_about("option_no_effect", "flux_lora_target", message, "Its preset names the modules.")
    if at.values["lora_type"] == "lycoris" and isinstance(at.values["lycoris_config"], dict):
        yield from _lycoris(at, at.values["lycoris_config"])


def init_lora_rule(at: Situation) -> Iterator[Problem]:
    """The file to start from must be there, for this family, and of this kind of adapter."""
    if at.values["model_type"] != "lora" or at.values["init_lora"] is None:
        return
    path = at.directories.locate(at.values["init_lora"])
    try:
        header = read_header(path)
    except UserError as error:
        # Whoever validates may not be on the machine that trains.
        level = Level.WARNING if not at.for_start and not path.exists() else Level.ERROR
        yield replace(error_about(error.code, "init_lora", error.message, error.hint), level=level)
        return
    stated = family_of_header(header.metadata)
    if stated is not None and stated != at.spec.name:
        message = f"{path.name} is an adapter for {stated}, not for {at.spec.name}."
        yield error_about("adapter_other_family", "init_lora", message)
    elif header.lora_type != (wanted := at.values["lora_type"]):
        found = f"of --lora_type {header.lora_type}" if header.lora_type else "in another tool's spelling"
        hint = "Set --lora_type, or convert the file: `simpletuner export`."
        yield error_about("adapter_other_kind", "init_lora", f"{path.name} is {found}, not of {wanted}.", hint)


def _lycoris(at: Situation, config: dict[str, Any]) -> Iterator[Problem]:
    yield from check_lycoris_config(config)
    if (precision := at.values["base_model_precision"]) in QUANTISED:
        yield from check_base(config, precision)
    if is_unedited(config):
        return
    for name in _RANK_OPTIONS:
        if at.given(name):
            yield warning_about("option_no_effect", name, f"--{name} has no effect: --lycoris_config decides.")
    if config.get("algo") in ("lokr", "loha") and config.get("dropout"):
        message = f"dropout has no effect on {config['algo']}: the algorithm has none."
        yield warning_about("option_no_effect", "lycoris_config", message)


def flux_rule(at: Situation) -> Iterator[Problem]:
    """Flux's own options act on Flux; schnell is trained at its four levels."""
    if at.spec.name != "flux":
        for name in FluxOptions.model_fields:
            if at.given(name):
                yield warning_about("option_no_effect", name, f"--{name} has no effect: {at.spec.title} is not Flux.")
        return
    if at.values["model_flavour"] == "schnell" and not at.values["flux_fast_schedule"]:
        message = "Schnell is distilled to four noise levels: trained at others it loses them."
        guard = error_about("incompatible_options", "flux_fast_schedule", message, "Set --flux_fast_schedule true.")
        yield replace(guard, level=at.guard_level)
    if at.values["flux_guidance_min"] > at.values["flux_guidance_max"]:
        message = "flux_guidance_min is above flux_guidance_max."
        yield error_about("incompatible_options", "flux_guidance_min", message)


def reference_rule(at: Situation) -> Iterator[Problem]:
    """An edit family learns nothing from pictures without a reference."""
    images = [
        (pointer, entry)
        for pointer, entry in zip(at.pointers, at.datasets, strict=True)
        if entry["dataset_type"] in ("image", "eval") and not entry["disabled"]
    ]
    yield from _without_references(at, [entry for _, entry in images])
    if at.spec.flavours[at.values["model_flavour"]].edits_references:
        for pointer, entry in images:
            if not entry["conditioning_data"]:
                yield Problem(
                    code="conditioning_required",
                    message=f"{at.spec.title} {at.values['model_flavour']} edits reference pictures, and dataset "
                    f"{entry['id']!r} has none.",
                    hint='Add a dataset of "dataset_type": "conditioning" and name it in "conditioning_data".',
                    pointer=f"{pointer}/conditioning_data",
                    level=at.guard_level,
                )
    wanted = at.values["eval_dataset_id"]
    if wanted is not None and wanted not in [entry["id"] for _, entry in images]:
        names = ", ".join(entry["id"] for _, entry in images)
        yield error_about(
            "bad_choice", "eval_dataset_id", f"There is no image or eval dataset {wanted!r}.", f"There are: {names}."
        )


def _without_references(at: Situation, images: list[dict[str, Any]]) -> Iterator[Problem]:
    """Options about references and masks, in a run that has none."""
    idle: dict[str, str] = {}
    if not at.spec.flavours[at.values["model_flavour"]].edits_references:
        reason = f"{at.spec.title} {at.values['model_flavour']} does not draw on references"
        idle |= {"eval_dataset_id": reason, "num_eval_images": reason}
    used = {name for entry in images for name in entry["conditioning_data"]}
    if not used:
        idle["conditioning_multidataset_sampling"] = "no dataset names a conditioning set"
    if not any(entry["id"] in used and entry.get("conditioning_type") in MASKS for entry in at.datasets):
        idle["masked_loss_probability"] = "there is no mask"
    for name, reason in idle.items():
        if at.given(name):
            yield warning_about("option_no_effect", name, f"--{name} has no effect: {reason}.")
