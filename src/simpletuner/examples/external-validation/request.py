"""What a training run asks of a script beside this file: the placeholders of its command, as arguments."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from simpletuner.config.prompt import parse_resolutions

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, slots=True)
class Request:
    """Empty where the run had nothing to say."""

    prompt: str
    checkpoint: str
    remote: str
    huggingface: str
    family: str
    model_type: str
    lora_type: str
    step: str
    steps: int
    guidance: float
    seed: int
    sizes: list[tuple[int, int]]
    output: Path

    @property
    def weights(self) -> Path:
        """The adapter file of the local checkpoint."""
        return Path(self.checkpoint) / WEIGHTS

    def file(self, number: int, suffix: str) -> Path:
        self.output.mkdir(parents=True, exist_ok=True)
        return self.output / f"step_{self.step or 'last'}_{number}{suffix}"


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Written `--name={placeholder}`, so that an empty value, or one that begins with a dash, is no puzzle."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--prompt", required=True, help="{validation_prompt}")
    parser.add_argument("--checkpoint", default="", help="{local_checkpoint_path}")
    parser.add_argument("--remote", default="", help="{remote_checkpoint_path}")
    parser.add_argument("--huggingface", default="", help="{huggingface_path}")
    parser.add_argument("--family", default="", help="{model_family}")
    parser.add_argument("--model-type", default="lora", help="{model_type}")
    parser.add_argument("--lora-type", default="standard", help="{lora_type}")
    parser.add_argument("--step", default="", help="{global_step}")
    parser.add_argument("--steps", type=int, default=28, help="{validation_num_inference_steps}")
    parser.add_argument("--guidance", type=float, default=3.5, help="{validation_guidance}")
    parser.add_argument("--seed", default="", help="{validation_seed}")
    parser.add_argument("--resolution", default="1024x1024", help="{validation_resolution}")
    return parser


def read_request(arguments: argparse.Namespace) -> Request:
    resolution: str = arguments.resolution
    return Request(
        prompt=arguments.prompt,
        checkpoint=arguments.checkpoint,
        remote=arguments.remote,
        huggingface=arguments.huggingface,
        family=arguments.family,
        model_type=arguments.model_type,
        lora_type=arguments.lora_type,
        step=arguments.step,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=int(arguments.seed or 0),
        sizes=parse_resolutions(json.loads(resolution) if resolution.startswith("[") else resolution),
        output=arguments.output,
    )


def refuse(message: str) -> NoReturn:
    """End with a message that the run's `training.hook` event will show."""
    print(message, file=sys.stderr)
    raise SystemExit(1)
