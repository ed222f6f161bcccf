"""PixArt Sigma in torch terms: diffusers' own classes, text cut to its unmasked tokens. training.md §4.3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.loader import Batch
from simpletuner.families.base import Draw, ImageRequest
from simpletuner.families.parts import Parts
from simpletuner.families.samplers import build_sampler
from simpletuner.families.spec import FamilySpec
from simpletuner.families.watching import watched

TOKENS = 300


class T5Captions:
    """The official pipeline's preparation (captions cleaned twice) and its T5, batched and trimmed."""

    def __init__(self, tokenizer: T5Tokenizer, encoder: T5EncoderModel, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._pipeline = PixArtSigmaPipeline(tokenizer, encoder, None, None, None)  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """One `{"prompt_embeds": (tokens, D)}` a caption, unmasked tokens only: the rest cannot reach the network."""
        cleaned = self._pipeline._text_preprocessing(list(captions), clean_caption=True)  # pyright: ignore[reportPrivateUsage]
        tokens = self._tokenizer(cleaned, padding="longest", max_length=TOKENS, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask
        states = self._encoder(tokens.input_ids.to(self._encoder.device), attention_mask=mask.to(self._encoder.device))[
            0
        ]
        states = states.to("cpu")
        return [{"prompt_embeds": row[: int(keep.sum())].clone()} for row, keep in zip(states, mask, strict=True)]

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """`prompt_embeds` (300, D) and `prompt_attention_mask` (300,)."""
        embeds, mask, _, _ = self._pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, clean_caption=True)
        return {"prompt_embeds": embeds[0].cpu(), "prompt_attention_mask": mask[0].cpu()}


class PixArtSigma:
    """See `families.base.Family`."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, *, shapes_only: bool = False) -> None:
        self.spec = spec
        self._config = config
        self._parts = Parts(config, spec, shapes_only=shapes_only)
        self.weight_dtype = self._parts.weight_dtype
        self.load_autoencoder = self._parts.load_autoencoder
        self.picture_fingerprint = self._parts.picture_fingerprint
        self.load_picture_encoder = self._parts.load_picture_encoder

    def load_denoiser(self, folder: Path | None = None) -> nn.Module:
        return self._parts.load_denoiser(PixArtTransformer2DModel, folder)

    def caption_fingerprint(self) -> str:
        parts = ("text_encoder", "tokenizer")
        return self._parts.text_fingerprint(parts, kind="T5EncoderModel", tokens=TOKENS, cleaning="official ×2")

    def load_text_encoders(self, device: torch.device) -> list[nn.Module]:
        return [self._parts.load_text_encoder(T5EncoderModel, "text_encoder", device)]

    def load_caption_encoder(self, device: torch.device) -> T5Captions:
        tokenizer = T5Tokenizer.from_pretrained(self._parts.repository.part("tokenizer"))
        encoder: Any = self.load_text_encoders(device)[0]
        return T5Captions(tokenizer, encoder, self.caption_fingerprint())

    def longest_caption(self, denoiser: nn.Module) -> dict[str, Tensor]:
        width: int = denoiser.config["caption_channels"]  # pyright: ignore[reportIndexIssue, reportAssignmentType, reportArgumentType]
        return {"prompt_embeds": torch.zeros(TOKENS, width, dtype=self._parts.text_dtype)}

    def scheduler_config(self) -> dict[str, Any]:
        return self._parts.repository.config("scheduler")

    def collate_text(self, entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) padded to the longest of the batch; `prompt_mask` (B, L) unless all are equal."""
        rows = [entry["prompt_embeds"] for entry in entries]
        longest = max(len(row) for row in rows)
        if all(len(row) == longest for row in rows):
            return {"prompt_embeds": torch.stack(rows)}
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            embeds[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        """ε (B, 4, H, W). Of the 8 output channels the last four, a learned variance, are not trained."""
        output = denoiser(
            noisy_BCHW.to(self.weight_dtype),
            encoder_hidden_states=batch.text["prompt_embeds"].to(self.weight_dtype),
            encoder_attention_mask=batch.text.get("prompt_mask"),
            timestep=t_B,
            added_cond_kwargs=self._size_conditions(denoiser, noisy_BCHW),
            return_dict=False,
        )[0]
        return output[:, : noisy_BCHW.shape[1]]

    def validation_pipeline(self, denoiser: nn.Module, device: torch.device) -> Draw:
        """The official pipeline, resolution binning off, so that the size that is asked for is the size that comes."""
        scheduler = build_sampler(
            self.scheduler_config(),
            self._config.validation.validation_noise_scheduler,
            self._config.model.prediction_type,
        )
        vae = self.load_autoencoder(device)
        pipeline = PixArtSigmaPipeline(None, None, vae, denoiser, scheduler)  # pyright: ignore[reportArgumentType]
        pipeline.set_progress_bar_config(disable=True)

        def draw(request: ImageRequest) -> Image.Image:
            return draw_image(pipeline, request, device)

        return draw

    def export_pipeline(self, folder: Path, denoiser: nn.Module) -> None:
        folder.mkdir(parents=True)
        denoiser.save_pretrained(folder / "transformer")  # pyright: ignore[reportCallIssue]
        for part in ("scheduler", "text_encoder", "tokenizer", "vae"):
            source = self._parts.vae if part == "vae" else self._parts.repository
            shutil.copytree(source.part(part), folder / part)
        if self._config.model.prediction_type is not None:
            scheduler = self.scheduler_config() | {"prediction_type": self._config.model.prediction_type}
            (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        index = {
            "_class_name": "PixArtSigmaPipeline",
            "scheduler": [
                "diffusers",
                self.scheduler_config().get("_class_name", DPMSolverMultistepScheduler.__name__),
            ],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "PixArtTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _size_conditions(self, denoiser: nn.Module, noisy_BCHW: Tensor) -> dict[str, Tensor | None]:
        """Height, width and aspect in pixels, for the checkpoints that are conditioned on them."""
        if not denoiser.config["use_additional_conditions"]:  # pyright: ignore[reportIndexIssue, reportArgumentType]
            return {"resolution": None, "aspect_ratio": None}
        batch, _, height, width = noisy_BCHW.shape
        stride = self.spec.latent.stride
        size = torch.tensor([[height * stride, width * stride]], dtype=noisy_BCHW.dtype, device=noisy_BCHW.device)
        aspect = torch.tensor([[height / width]], dtype=noisy_BCHW.dtype, device=noisy_BCHW.device)
        return {"resolution": size.repeat(batch, 1), "aspect_ratio": aspect.repeat(batch, 1)}


def draw_image(pipeline: Any, request: ImageRequest, device: torch.device) -> Image.Image:
    """One image; the start noise is drawn on the CPU, so that a seed means the same everywhere."""
    prompt, negative = request.prompt, request.negative
    with watched(pipeline.scheduler, request.watch):
        images = pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=prompt["prompt_embeds"][None].to(device),
            prompt_attention_mask=prompt["prompt_attention_mask"][None].to(device),
            negative_prompt_embeds=negative["prompt_embeds"][None].to(device),
            negative_prompt_attention_mask=negative["prompt_attention_mask"][None].to(device),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            use_resolution_binning=False,
        ).images
    return images[0]
