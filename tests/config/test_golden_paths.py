"""The API tutorial's runs are accepted as they stand. training.md §1, golden paths; acceptance 1, 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from config_place import Place, errors, warnings

from simpletuner.config.lycoris import FILE, generated_text
from simpletuner.config.model_options import AdapterOptions
from simpletuner.config.resolve import Resolution, freeze, resolve
from simpletuner.config.sources import layer_from_pairs
from simpletuner.config.train_config import option_fields

PIXART_DATA = """[
  {
    "id": "pixart-camera",
    "id": "pixart-camera",
    "type": "local",
    "dataset_type": "image",
    "instance_data_dir": "/data/datasets/pseudo-camera-10k",
    "caption_strategy": "filename",
    "resolution": 1.0,
    "resolution_type": "area",
    "minimum_image_size": 0.25,
    "maximum_image_size": 1.0,
    "target_downsample_size": 1.0,
    "cache_dir_vae": "/data/cache/vae/pixart/pseudo-camera-10k",
    "crop": true,
    "crop_style": "random",
    "crop_aspect": "square",
    "metadata_backend": "discovery"
  },
  {
    "id": "pixart-text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "/data/cache/text/pixart/pseudo-camera-10k",
    "write_batch_size": 128
  }
]"""
PIXART = {
    "--model_family": "pixart_sigma",
    "--model_flavour": "900M-1024-v0.6",
    "--model_type": "full",
    "--output_dir": "/workspace/output/pixart900m",
    "--train_batch_size": 2,
    "--gradient_accumulation_steps": 2,
    "--learning_rate": 0.0001,
    "--optimizer": "adamw_bf16",
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 500,
    "--max_train_steps": 1800,
    "--num_train_epochs": 0,
    "--validation_prompt": "a studio portrait of <token> wearing a leather jacket",
    "--validation_guidance": 3.8,
    "--validation_resolution": "1024x1024",
    "--validation_num_inference_steps": 28,
    "--cache_dir_vae": "/data/cache/vae/pixart",
    "--seed": 1337,
    "--resume_from_checkpoint": "latest",
    "--base_model_precision": "bf16",
    "--dataloader_prefetch": True,
    "--report_to": "none",
    "--checkpoints_total_limit": 4,
    "--validation_seed": 12345,
    "--data_backend_config": "pixart-api-demo/multidatabackend.json",
}
INLINE_DATA = """[
  {
    "id": "demo-images",
    "type": "local",
    "dataset_type": "image",
    "instance_data_dir": "/data/datasets/demo",
    "caption_strategy": "textfile",
    "resolution": 1024,
    "resolution_type": "pixel_area"
  },
  {
    "id": "demo-text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "/data/cache/text/demo"
  }
]"""
INLINE = [
    ("__active_tab__", "model"),
    ("--model_family", "pixart_sigma"),
    ("--model_type", "full"),
    ("--model_flavour", "900M-1024-v0.6"),
    ("--pretrained_model_name_or_path", "terminusresearch/pixart-900m-1024-ft-v0.6"),
    ("--output_dir", "/workspace/output/inline-demo"),
    ("--data_backend_config", "config/multidatabackend-once.json"),
    ("--train_batch_size", "1"),
    ("--learning_rate", "0.0001"),
    ("--max_train_steps", "200"),
    ("--num_train_epochs", "0"),
    ("--validation_prompt", "test shot of <token>"),
]
KONTEXT_DATA = """[
  {
    "id": "kontext-edit",
    "type": "local",
    "dataset_type": "image",
    "instance_data_dir": "/data/datasets/kontext/edit",
    "conditioning_data": ["kontext-reference"],
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "caption_strategy": "textfile",
    "minimum_image_size": 768,
    "maximum_image_size": 1536,
    "target_downsample_size": 1024,
    "cache_dir_vae": "/data/cache/vae/kontext/edit",
    "crop": true,
    "crop": true,
    "crop_style": "random",
    "crop_aspect": "square"
  },
  {
    "id": "kontext-reference",
    "type": "local",
    "dataset_type": "conditioning",
    "instance_data_dir": "/data/datasets/kontext/reference",
    "conditioning_type": "reference_strict",
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "/data/cache/vae/kontext/reference"
  },
  {
    "id": "kontext-text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "/data/cache/text/kontext"
  }
]"""
KONTEXT = {
    "--model_family": "flux",
    "--model_flavour": "kontext",
    "--model_type": "lora",
    "--lora_type": "lycoris",
    "--lycoris_config": "kontext-api-demo/lycoris_config.json",
    "--output_dir": "/workspace/output/kontext",
    "--train_batch_size": 1,
    "--gradient_accumulation_steps": 4,
    "--learning_rate": 0.00001,
    "--optimizer": "optimi-lion",
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 200,
    "--max_train_steps": 12000,
    "--num_train_epochs": 0,
    "--validation_prompt": "a cinematic 1024px product photo of <token>",
    "--validation_guidance": 2.5,
    "--validation_resolution": "1024x1024",
    "--validation_num_inference_steps": 30,
    "--cache_dir_vae": "/data/cache/vae/kontext",
    "--seed": 777,
    "--resume_from_checkpoint": "latest",
    "--base_model_precision": "int8-quanto",
    "--dataloader_prefetch": True,
    "--report_to": "wandb",
    "--lora_rank": 16,
    "--lora_dropout": 0.05,
    "--conditioning_multidataset_sampling": "combined",
    "--clip_skip": 2,
    "--data_backend_config": "kontext-api-demo/multidatabackend.json",
}
PICTURES = {"/datasets/0/instance_data_dir": "dataset_path_missing"}


def test_pixart_full(place: Place, golden: Callable[[Path, str], None]) -> None:
    folder = place.config / "pixart-api-demo"
    folder.mkdir()
    (folder / "multidatabackend.json").write_text(PIXART_DATA)
    request = layer_from_pairs(
        [("__active_tab__", "model"), ("--num_train_epochs", "0")], name="request", known=option_fields()
    )
    found = resolve([place.object(PIXART, "environment:pixart-api-demo"), request], place.directories)
    assert errors(found) == {}
    unwritable = {"/--output_dir": "output_dir_not_writable"}
    assert {pointer: code for pointer, code in warnings(found).items() if unwritable.get(pointer) != code} == {
        "/datasets/0/id": "duplicate_key",
        **PICTURES,
    }
    config, _, datasets = freeze(found)
    config["data_backend_config"] = Path(config["data_backend_config"]).name
    config["cache_dir_text"] = Path(config["cache_dir_text"]).name
    lines = [f"{name} = {value!r}" for name, value in config.items()]
    lines += [f"{entry['id']}.{key} = {value!r}" for entry in datasets for key, value in entry.items()]
    golden(Path(__file__).parents[1] / "goldens/pixart_full.txt", "\n".join(lines) + "\n")


def kontext(place: Place) -> tuple[Resolution, Path]:
    folder = place.config / "kontext-api-demo"
    folder.mkdir(exist_ok=True)
    (folder / "multidatabackend.json").write_text(KONTEXT_DATA)
    file = folder / FILE
    if not file.exists():
        file.write_bytes(generated_text(AdapterOptions()))
    request = layer_from_pairs([("--num_train_epochs", "0")], name="request", known=option_fields())
    return resolve([place.object(KONTEXT, "environment:kontext-api-demo"), request], place.directories), file


def test_kontext_lycoris(place: Place, golden: Callable[[Path, str], None]) -> None:
    found, file = kontext(place)
    assert errors(found) == {}
    of_this_machine = {"/--output_dir": "output_dir_not_writable", "/--report_to": "tracker_unavailable"}
    assert {pointer: code for pointer, code in warnings(found).items() if of_this_machine.get(pointer) != code} == {
        "/datasets/0/crop": "duplicate_key",
        "/--clip_skip": "option_no_effect",
        **PICTURES,
        "/datasets/1/instance_data_dir": "dataset_path_missing",
    }
    config, _, datasets = freeze(found)
    written = json.loads(file.read_text())
    assert written == config["lycoris_config"], "a file that nobody edited follows the options"
    assert (written["linear_dim"], written["linear_alpha"], written["dropout"]) == (16, 16, 0.05)
    config["data_backend_config"] = Path(config["data_backend_config"]).name
    config["cache_dir_text"] = Path(config["cache_dir_text"]).name
    lines = [f"{name} = {value!r}" for name, value in config.items()]
    lines += [f"{entry['id']}.{key} = {value!r}" for entry in datasets for key, value in entry.items()]
    golden(Path(__file__).parents[1] / "goldens/kontext_lycoris.txt", "\n".join(lines) + "\n")


def test_an_edited_lycoris_file_decides(place: Place) -> None:
    _, file = kontext(place)
    file.write_text(json.dumps({"algo": "lokr", "factor": 8}))
    found, _ = kontext(place)
    assert errors(found) == {}
    told = warnings(found)
    assert told["/--lora_rank"] == told["/--lora_dropout"] == "option_no_effect"
    config, _, _ = freeze(found)
    assert config["lycoris_config"] == {"algo": "lokr", "factor": 8} == json.loads(file.read_text())


def test_inline_demo(place: Place) -> None:
    (place.workspace / "config").mkdir()
    (place.workspace / "config/multidatabackend-once.json").write_text(INLINE_DATA)
    found = resolve([layer_from_pairs(INLINE, name="request", known=option_fields())], place.directories)
    assert errors(found) == {}
    assert set(warnings(found).values()) <= {"dataset_path_missing", "output_dir_not_writable"}
    config = found.require()
    assert (config.run.train_batch_size, config.run.max_train_steps, config.run.num_train_epochs) == (1, 200, 0)
    assert config.validation.validation_prompt == "test shot of <token>"


def test_inline_demo_with_webhook(place: Place) -> None:
    (place.workspace / "config").mkdir()
    (place.workspace / "config/multidatabackend-once.json").write_text(INLINE_DATA)
    hook = '[{"webhook_type":"raw","callback_url":"https://example.com/simpletuner","log_level":"info","ssl_no_verify":false}]'
    pairs = [*INLINE, ("--webhook_config", hook), ("--webhook_reporting_interval", "10")]
    found = resolve([layer_from_pairs(pairs, name="request", known=option_fields())], place.directories)
    assert errors(found) == {}
    config, _, _ = freeze(found)
    assert config["webhook_config"][0]["callback_url"] == "https://example.com/simpletuner"
    assert config["webhook_reporting_interval"] == 10


def test_the_tutorials_mistakes(place: Place) -> None:
    (place.workspace / "config").mkdir()
    (place.workspace / "config/multidatabackend-once.json").write_text(INLINE_DATA)
    pairs = [*INLINE[:-3], ("--max_train_steps", "0"), ("--num_train_epochs", "0"), ("--learning_rat", "1")]
    found = resolve([layer_from_pairs(pairs, name="request", known=option_fields())], place.directories)
    assert errors(found) == {"/--max_train_steps": "no_run_length", "/--learning_rat": "unknown_field"}
    assert any("--learning_rate" in problem.hint for problem in found.errors)
