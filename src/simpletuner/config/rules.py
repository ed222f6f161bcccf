"""Rules between options. Each finds its problems alone, so that all are answered at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simpletuner.config.adapter_rules import adapter_rule, flux_rule, init_lora_rule, reference_rule
from simpletuner.config.budget import BUDGET_OPTIONS, budget_rule
from simpletuner.config.compute_options import COMPILE_OPTIONS, RECOMPUTE_OPTIONS, compute_rule
from simpletuner.config.device_numbers import DEVICE_OPTIONS, device_rule
from simpletuner.config.disk import DISK_OPTIONS, disk_rule
from simpletuner.config.fsdp_options import FSDP_OPTIONS, fsdp_rule, parts_rule
from simpletuner.config.model_options import QUANTISED
from simpletuner.config.pairing import check_pairs
from simpletuner.config.prompt import parse_resolutions
from simpletuner.config.publish_rules import publish_rule, tracker_rule
from simpletuner.config.release_rule import RELEASE_OPTIONS, in_parts_rule, release_rule
from simpletuner.config.script import SCRIPTS, script_rule
from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.config.storage_options import KEYS_OF_TYPE, place_of
from simpletuner.config.storage_rules import look_at_storage
from simpletuner.errors import Level, Problem, UserError
from simpletuner.families.spec import Capability

OPTIMIZERS = (
    "adamw_bf16", "torch-adamw", "torch-adam", "torch-sgd", "torch-radam", "torch-nadam", "torch-adafactor",
    "optimi-lion", "optimi-stableadamw", "optimi-adamw", "optimi-adam", "optimi-radam", "optimi-ranger",
    "optimi-adan", "optimi-sgd", "ao-adamw8bit", "ao-adamw4bit", "ao-adamwfp8", "bnb-adamw", "bnb-adamw-paged",
    "bnb-adamw8bit", "bnb-adamw8bit-paged", "bnb-adam", "bnb-adam-paged", "bnb-adam8bit", "bnb-adam8bit-paged",
    "bnb-lion", "bnb-lion-paged", "bnb-lion8bit", "bnb-lion8bit-paged", "bnb-ademamix", "bnb-ademamix-paged",
    "bnb-ademamix8bit", "bnb-ademamix8bit-paged", "muon", "prodigy",
    "adamw_schedulefree", "soap",
)  # fmt: skip
"""As in the table of `train.optim`, which this world cannot import."""
_CLIPPING = ("max_grad_norm", "grad_clip_method")
_SCHEDULE = ("lr_scheduler", "lr_end", "lr_num_cycles", "lr_power")
_OF_NO_EFFECT = {
    "optimi-stableadamw": _CLIPPING,
    "prodigy": (*_CLIPPING, "learning_rate", "lr_warmup_steps", *_SCHEDULE),
    "adamw_schedulefree": _SCHEDULE,
}
"""Options that an optimizer has no use for: it limits its own updates, finds its own rate, or needs no schedule."""

FLOW_ONLY = (
    "flow_schedule_shift", "flow_schedule_auto_shift", "flow_sigmoid_scale", "flow_use_uniform_schedule",
    "flow_use_beta_schedule", "flow_beta_schedule_alpha", "flow_beta_schedule_beta",
)  # fmt: skip
DIFFUSION_ONLY = (
    "offset_noise", "snr_gamma", "timestep_bias_strategy", "timestep_bias_multiplier", "timestep_bias_portion",
    "timestep_bias_begin", "timestep_bias_end", "refiner_training", "refiner_training_strength",
    "refiner_training_invert_schedule", "validation_negative_prompt", "validation_noise_scheduler",
)  # fmt: skip


def check(situation: Situation) -> list[Problem]:
    """Every problem of the combination, errors and warnings."""
    return [problem for rule, reads in _RULES if not situation.broken & set(reads) for problem in rule(situation)]


def _run_length(at: Situation) -> Iterator[Problem]:
    steps, epochs = at.values["max_train_steps"], at.values["num_train_epochs"]
    layers = at.layers
    sources = f"max_train_steps: {layers['max_train_steps']}; num_train_epochs: {layers['num_train_epochs']}."
    if steps and epochs and at.given("num_train_epochs"):
        yield error_about(
            "both_epochs_and_steps",
            "max_train_steps",
            f"Both max_train_steps ({steps}) and num_train_epochs ({epochs}) are set.",
            f"Set one of them to 0. {sources}",
        )
    if not steps and not epochs:
        yield error_about(
            "no_run_length",
            "max_train_steps",
            "Neither max_train_steps nor num_train_epochs is above 0.",
            f"Set one of them. {sources}",
        )


def _model_type(at: Situation) -> Iterator[Problem]:
    precision = at.values["base_model_precision"]
    if at.values["model_type"] == "full" and precision in QUANTISED:
        yield error_about(
            "quantised_full",
            "base_model_precision",
            f"A full fine-tune cannot train a base quantised to {precision}.",
            "Use bf16 or fp32, or train an adapter (--model_type lora).",
        )
    elif precision in at.spec.refused_precisions:
        yield error_about(
            "incompatible_options",
            "base_model_precision",
            f"{at.spec.title} cannot be trained over a base in {precision}.",
            "Use int8-quanto.",
        )
    if at.values["model_type"] == "lora" and Capability.LORA not in at.spec.supports:
        yield error_about(
            "option_not_supported_yet",
            "model_type",
            f"Adapters for {at.spec.title} are not supported yet.",
            "Use --model_type full.",
        )
    if "fp16" in (precision, at.values["mixed_precision"]):
        option = "mixed_precision" if at.values["mixed_precision"] == "fp16" else "base_model_precision"
        yield error_about(
            "option_not_supported_yet", option, "Training in fp16 is not supported yet.", "Use bf16 or fp32."
        )


def _webhooks(at: Situation) -> Iterator[Problem]:
    if at.given("webhook_reporting_interval") and not at.values["webhook_config"]:
        message = "--webhook_reporting_interval has no effect: there is no --webhook_config."
        yield warning_about("option_no_effect", "webhook_reporting_interval", message)


def _optimizer(at: Situation) -> Iterator[Problem]:
    name = at.values["optimizer"]
    if name in OPTIMIZERS:
        for option in _OF_NO_EFFECT.get(name, ()):
            if at.given(option):
                yield warning_about("option_no_effect", option, f"--{option} has no effect: --optimizer is {name}.")
        yield from parts_rule(at)
        yield from in_parts_rule(at)
        return
    near = get_close_matches(name, OPTIMIZERS, n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    yield error_about(
        "unknown_optimizer", "optimizer", f"There is no optimizer {name!r}.", f"{guess}Known: {', '.join(OPTIMIZERS)}."
    )


def _wrong_family(at: Situation) -> Iterator[Problem]:
    foreign = FLOW_ONLY if at.spec.objective == "diffusion" else DIFFUSION_ONLY
    for name in foreign:
        if at.given(name):
            yield warning_about(
                "option_no_effect", name, f"--{name} has no effect: {at.spec.title} is a {at.spec.objective} model."
            )
    if at.values["clip_skip"] and not any("clip" in slot.encoder and not slot.pooled for slot in at.spec.text):
        yield warning_about(
            "option_no_effect", "clip_skip", f"--clip_skip has no effect: {at.spec.title} uses no CLIP hidden states."
        )
    is_flow = at.values["prediction_type"] == "flow_matching"
    if at.values["prediction_type"] is not None and is_flow != (at.spec.objective == "flow"):
        message = f"{at.spec.title} is {'a' if at.spec.objective == 'flow' else 'no'} flow-matching family."
        yield error_about("incompatible_options", "prediction_type", message)


_ACTS_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "flow_beta_schedule_alpha": ("flow_use_beta_schedule", (True,)),
    "flow_beta_schedule_beta": ("flow_use_beta_schedule", (True,)),
    "flow_schedule_shift": ("flow_schedule_auto_shift", (False,)),
    "flux_guidance_value": ("flux_guidance_mode", ("constant",)),
    "flux_guidance_min": ("flux_guidance_mode", ("random-range",)),
    "flux_guidance_max": ("flux_guidance_mode", ("random-range",)),
    "ema_decay": ("use_ema", (True,)),
    "ema_validation": ("use_ema", (True,)),
    "huber_c": ("loss_type", ("huber", "smooth_l1")),
    "huber_schedule": ("loss_type", ("huber", "smooth_l1")),
    "noise_offset": ("offset_noise", (True,)),
    "noise_offset_probability": ("offset_noise", (True,)),
    "timestep_bias_multiplier": ("timestep_bias_strategy", ("earlier", "later", "range")),
    "timestep_bias_portion": ("timestep_bias_strategy", ("earlier", "later")),
    "timestep_bias_begin": ("timestep_bias_strategy", ("range",)),
    "timestep_bias_end": ("timestep_bias_strategy", ("range",)),
    "refiner_training_strength": ("refiner_training", (True,)),
    "refiner_training_invert_schedule": ("refiner_training", (True,)),
    "dataloader_prefetch_qlen": ("dataloader_prefetch", (True,)),
    "quantize_via": ("base_model_precision", QUANTISED),
    "lr_end": ("lr_scheduler", ("linear", "cosine", "sine", "cosine_with_restarts", "polynomial")),
    "lr_num_cycles": ("lr_scheduler", ("sine", "cosine_with_restarts")),
    "lr_power": ("lr_scheduler", ("polynomial",)),
    "validation_preview_steps": ("validation_preview", (True,)),
    "validation_image_quality": ("validation_image_format", ("webp", "jpeg")),
}
"""Option → another option and the values of it with which the first one acts."""


def _dependent(at: Situation) -> Iterator[Problem]:
    """Options that act only beside another one."""
    for name, (switch, active) in _ACTS_WITH.items():
        value = at.values[switch]
        if at.given(name) and value not in active:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield warning_about("option_no_effect", name, f"--{name} has no effect: --{switch} is {shown}.")


def _held_out(at: Situation) -> Iterator[Problem]:
    """Giving up needs a loss that is measured."""
    measured = not at.values["eval_loss_disable"] and any(
        entry["dataset_type"] == "eval" and not entry["disabled"] for entry in at.datasets
    )
    if at.given("early_stop_patience") and not measured:
        message = "--early_stop_patience has no effect: no held-out loss is measured."
        hint = 'Add a dataset of "dataset_type": "eval".'
        yield warning_about("option_no_effect", "early_stop_patience", message, hint)


def _alignment(at: Situation) -> Iterator[Problem]:
    if at.given("aspect_bucket_alignment"):
        fixed = at.spec.layer_values(at.values["model_flavour"])["aspect_bucket_alignment"]
        if at.values["aspect_bucket_alignment"] != fixed:
            yield error_about(
                "incompatible_options",
                "aspect_bucket_alignment",
                f"{at.spec.title} fixes --aspect_bucket_alignment at {fixed}.",
            )


def _sizes(at: Situation) -> Iterator[Problem]:
    rows: list[tuple[str, Mapping[str, Any]]] = [("/--", at.values)]
    pairs = zip(at.pointers, at.datasets, strict=True)
    rows += [(f"{pointer}/", entry) for pointer, entry in pairs if "resolution" in entry]
    for prefix, row in rows:
        if row["maximum_image_size"] and not row["target_downsample_size"]:
            yield Problem(
                code="downsample_pair",
                message="maximum_image_size needs target_downsample_size.",
                hint="Say to which size too large pictures are brought.",
                pointer=f"{prefix}maximum_image_size",
            )
        unit = row["resolution_type"]
        for name in ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size"):
            value = row[name]
            if value is not None and (reason := _size_problem(unit, value, nano=at.values["model_flavour"] == "nano")):
                yield Problem(
                    code="size_unit", message=f"{name} {value:g}: {reason}", hint=_UNITS, pointer=f"{prefix}{name}"
                )


_UNITS = "`area` is in megapixels (1.0), `pixel_area` an edge in whole pixels (1024), `pixel` the shorter edge (768)."


def _size_problem(unit: str, value: float, *, nano: bool) -> str:
    if unit == "area" and value > 20:
        return "more than 20 megapixels."
    if unit != "area" and value < (16 if nano else 64):
        return f"fewer than {16 if nano else 64} pixels."
    if unit == "pixel_area" and value != int(value):
        return "an edge is a whole number of pixels."
    return ""


def _timesteps(at: Situation) -> Iterator[Problem]:
    """Settings that leave nothing to draw from."""
    begin, end = at.values["timestep_bias_begin"], at.values["timestep_bias_end"]
    if at.values["timestep_bias_strategy"] == "range" and begin >= end:
        message = f"timestep_bias_begin ({begin}) is not below timestep_bias_end ({end})."
        yield error_about("incompatible_options", "timestep_bias_begin", message, "The end itself is not in the range.")
    strength, inverted = at.values["refiner_training_strength"], at.values["refiner_training_invert_schedule"]
    if at.values["refiner_training"] and strength == (1 if inverted else 0):
        message = f"With a strength of {strength:g} no timestep is left to train on."
        yield error_about(
            "incompatible_options", "refiner_training_strength", message, "Choose a share between 0 and 1."
        )


def _validation_sizes(at: Situation) -> Iterator[Problem]:
    try:
        parse_resolutions(at.values["validation_resolution"])
    except UserError as error:
        yield error_about(error.code, "validation_resolution", error.message, error.hint)


def _warmup(at: Situation) -> Iterator[Problem]:
    steps, warmup = at.values["max_train_steps"], at.values["lr_warmup_steps"]
    if steps and warmup >= steps:
        yield warning_about(
            "warmup_too_long",
            "lr_warmup_steps",
            f"The warm-up of {warmup} steps is as long as the run of {steps}: the full rate is never reached.",
        )


def _datasets(at: Situation) -> Iterator[Problem]:
    if "datasets" not in at.broken and not any(
        entry["dataset_type"] == "image" and not entry["disabled"] for entry in at.datasets
    ):
        yield Problem(code="nothing_to_train_on", message="No dataset of pictures to train on.", pointer="/datasets")
    level = Level.ERROR if at.for_start else Level.WARNING
    owners: dict[str, str] = {}
    text = {entry["cache_dir"]: entry["id"] for entry in at.datasets if entry["dataset_type"] == "text_embeds"}
    for place, entry in zip(at.pointers, at.datasets, strict=True):
        if entry["dataset_type"] == "text_embeds" or entry["disabled"]:
            continue
        pictures = place_of(entry)
        pointer = f"{place}/{KEYS_OF_TYPE[entry['type']][0]}"
        if pictures in owners:
            where = "folder" if entry["type"] == "local" else "place"
            message = f"{entry['id']!r} and {owners[pictures]!r} use the same {where}."
            yield Problem(code="duplicate_dataset_path", message=message, hint=pictures, pointer=pointer)
        owners.setdefault(pictures, entry["id"])
        for folder, owner in text.items() if entry["type"] == "local" else ():
            if Path(folder).is_relative_to(pictures):
                message = f"The text cache {owner!r} lies inside the picture folder of {entry['id']!r}."
                yield Problem(
                    code="cache_inside_dataset", message=message, hint="Move the cache elsewhere.", pointer=pointer
                )
        yield from look_at_storage(entry, place, level)
        yield from _entry(place, entry)


def _pairs(at: Situation) -> Iterator[Problem]:
    yield from check_pairs(at.datasets, at.pointers)


def _entry(pointer: str, entry: dict[str, Any]) -> Iterator[Problem]:
    strategy = entry["caption_strategy"]
    needs_prompt = (
        strategy in ("instanceprompt", "instance_prompt")
        or entry["only_instance_prompt"]
        or entry["prepend_instance_prompt"]
    )
    if needs_prompt and not entry["instance_prompt"]:
        yield Problem(
            code="missing_dataset_key", message="instance_prompt is missing.", pointer=f"{pointer}/instance_prompt"
        )
    if strategy == "parquet" and not entry["parquet"]:
        yield Problem(
            code="missing_dataset_key",
            message="caption_strategy parquet needs the key 'parquet'.",
            pointer=f"{pointer}/parquet",
        )
    if entry["crop_aspect"] in ("closest", "random") and not entry["crop_aspect_buckets"]:
        message = f"crop_aspect {entry['crop_aspect']} needs crop_aspect_buckets."
        yield Problem(code="missing_dataset_key", message=message, pointer=f"{pointer}/crop_aspect_buckets")


def _places(at: Situation) -> Iterator[Problem]:
    output = Path(at.directories.absolute(at.values["output_dir"]))
    folder = output
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(
            code="output_dir_not_writable",
            option="output_dir",
            message=f"The output folder {output} cannot be written: {folder} is not a writable folder.",
            hint="Choose another --output_dir or change its rights.",
            pointer="/--output_dir",
            level=Level.ERROR if at.for_start else Level.WARNING,
        )


_RULES: tuple[tuple[Callable[[Situation], Iterator[Problem]], tuple[str, ...]], ...] = (
    (_run_length, ("max_train_steps", "num_train_epochs")),
    (_model_type, ("base_model_precision", "mixed_precision", "model_type")),
    (adapter_rule, ("model_type", "lora_type", "lycoris_config")),
    (init_lora_rule, ("model_type", "lora_type", "init_lora")),
    (flux_rule, ("i_know_what_i_am_doing", "model_flavour", "flux_fast_schedule", "flux_guidance_min",
                 "flux_guidance_max")),
    (reference_rule, ("i_know_what_i_am_doing", "model_flavour", "datasets")),
    (_optimizer, ("optimizer", "model_type", *FSDP_OPTIONS, "optimizer_release_gradients")),
    (release_rule, RELEASE_OPTIONS),
    (tracker_rule, ("report_to", *SCRIPTS)),
    (publish_rule, ("push_to_hub", "push_checkpoints_to_hub", "hub_model_id", "publishing_config",
                    "model_type", *SCRIPTS)),
    (_webhooks, ("webhook_config",)),
    (_wrong_family, ("clip_skip", "prediction_type")),
    (_dependent, tuple({switch for switch, _ in _ACTS_WITH.values()})),
    (_held_out, ("datasets", "eval_loss_disable", "early_stop_patience")),
    (_alignment, ("aspect_bucket_alignment", "model_flavour")),
    (_sizes, ("resolution", "resolution_type", "maximum_image_size", "target_downsample_size", "minimum_image_size")),
    (_timesteps, ("timestep_bias_strategy", "timestep_bias_begin", "timestep_bias_end", "refiner_training",
                  "refiner_training_strength", "refiner_training_invert_schedule")),
    (_validation_sizes, ("validation_resolution",)),
    (budget_rule, BUDGET_OPTIONS),
    (compute_rule, ("gradient_checkpointing", "dynamo_backend", *RECOMPUTE_OPTIONS, *COMPILE_OPTIONS, *BUDGET_OPTIONS)),
    (device_rule, DEVICE_OPTIONS),
    (disk_rule, DISK_OPTIONS),
    (fsdp_rule, (*FSDP_OPTIONS, "num_processes", "base_model_precision", "dynamo_backend",
                 *BUDGET_OPTIONS)),
    (script_rule, ("validation_method", *SCRIPTS)),
    (_warmup, ("max_train_steps", "lr_warmup_steps")),
    (_datasets, ()),
    (_pairs, ("datasets",)),
    (_places, ("output_dir",)),
)  # fmt: skip
"""Each rule and the options it rests on."""
