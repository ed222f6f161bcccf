"""Flux.1 in torch terms: diffusers' own classes, T5 without a mask, references as more tokens. training.md §4.4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.keys import u
from simpletuner.data.loader import Batch
from simpletuner.families.base import Draw, ImageRequest
from simpletuner.families.flux.packing import pack, pack_references, position_ids, unpack
from simpletuner.families.parts import Parts
from simpletuner.families.spec import FamilySpec
from simpletuner.families.watching import Watch, watched

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class FluxCaptions:
    """The official pipeline's own text encoding: pooled CLIP, and T5 on a fixed number of tokens without a mask."""

    def __init__(self, pipeline: FluxPipeline, tokens: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._pipeline = pipeline
        self._tokens = tokens

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """`prompt_embeds` (tokens, D) and `pooled_prompt_embeds` (P,) of each caption."""
        embeds, pooled, _ = self._pipeline.encode_prompt(list(captions), max_sequence_length=self._tokens)  # pyright: ignore[reportArgumentType]
        assert embeds is not None and pooled is not None
        rows = zip(embeds.cpu(), pooled.cpu(), strict=True)
        return [{"prompt_embeds": row.clone(), "pooled_prompt_embeds": vector.clone()} for row, vector in rows]

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        return self.encode([prompt])[0]


class Flux:
    """See `families.base.Family`."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, *, shapes_only: bool = False) -> None:
        self.spec = spec
        self._config = config
        self._flavour = spec.flavours[config.model.model_flavour]
        self._tokens = self._flavour.tokens or next(slot.length for slot in spec.text if slot.encoder == "t5")
        self._parts = Parts(config, spec, shapes_only=shapes_only)
        self.weight_dtype = self._parts.weight_dtype
        self.load_autoencoder = self._parts.load_autoencoder
        self.picture_fingerprint = self._parts.picture_fingerprint
        self.load_picture_encoder = self._parts.load_picture_encoder

    def load_denoiser(self, folder: Path | None = None) -> nn.Module:
        return self._parts.load_denoiser(FluxTransformer2DModel, folder)

    def caption_fingerprint(self) -> str:
        return self._parts.text_fingerprint(_TEXT_PARTS, kind="CLIP, T5", tokens=self._tokens)

    def load_text_encoders(self, device: torch.device) -> list[nn.Module]:
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
        return [self._parts.load_text_encoder(kind, part, device) for part, kind in kinds.items()]

    def load_caption_encoder(self, device: torch.device) -> FluxCaptions:
        clip, t5 = self.load_text_encoders(device)
        part = self._parts.repository.part
        tokenizers = CLIPTokenizer.from_pretrained(part("tokenizer")), T5Tokenizer.from_pretrained(part("tokenizer_2"))
        pipeline = FluxPipeline(None, None, clip, tokenizers[0], t5, tokenizers[1], None)  # pyright: ignore[reportArgumentType]
        return FluxCaptions(pipeline, self._tokens, self.caption_fingerprint())

    def longest_caption(self, denoiser: nn.Module) -> dict[str, Tensor]:
        config: Any = denoiser.config
        dtype = self._parts.text_dtype
        return {
            "prompt_embeds": torch.zeros(self._tokens, config["joint_attention_dim"], dtype=dtype),
            "pooled_prompt_embeds": torch.zeros(config["pooled_projection_dim"], dtype=dtype),
        }

    def scheduler_config(self) -> dict[str, Any]:
        return self._parts.repository.config("scheduler")

    def collate_text(self, entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D) and `pooled_prompt_embeds` (B, P): every caption has the same number of tokens."""
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        """ε − x, (B, C, H, W). Tokens of the references are cut off: they are seen, not predicted."""
        dtype, device = self.weight_dtype, noisy_BCHW.device
        height, width = noisy_BCHW.shape[-2:]
        hidden, ids = pack(noisy_BCHW), position_ids(height, width)
        count = hidden.shape[1]
        if batch.references:
            tokens, reference_ids = pack_references(batch.references)
            hidden, ids = torch.cat([hidden, tokens.to(hidden.dtype)], 1), torch.cat([ids, reference_ids])
        embeds = batch.text["prompt_embeds"].to(dtype)
        output = denoiser(
            hidden_states=hidden.to(dtype),
            timestep=t_B.to(dtype) / 1000,
            guidance=self._guidance(denoiser, batch, device),
            pooled_projections=batch.text["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=dtype, device=device),
            img_ids=ids.to(device, dtype, non_blocking=True),
            return_dict=False,
        )[0]
        return unpack(output[:, :count], height, width)

    def _guidance(self, denoiser: nn.Module, batch: Batch, device: torch.device) -> Tensor | None:
        """What each sample is told of guidance, (B,) fp32; None for weights that were made without."""
        if not denoiser.config["guidance_embeds"]:  # pyright: ignore[reportIndexIssue, reportArgumentType]
            return None
        options, seed = self._config.flux, self._config.run.seed
        if options.flux_guidance_mode == "constant":
            return torch.full((len(batch.samples),), options.flux_guidance_value, device=device)
        least, span = options.flux_guidance_min, options.flux_guidance_max - options.flux_guidance_min
        visits = zip(batch.samples, batch.visits, strict=True)
        drawn = [least + span * u("guidance", seed or 0, sample, visit) for sample, visit in visits]
        return torch.tensor(drawn).to(device, non_blocking=True)

    def validation_pipeline(self, denoiser: nn.Module, device: torch.device) -> Draw:
        """The official pipeline of the flavour; references enter as latents, scaled as in training."""
        kind = _ReferencePipeline if self._flavour.edits_references else FluxPipeline
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config())
        vae: Any = self.load_autoencoder(device)
        pipeline: Any = kind(scheduler, vae, None, None, None, None, denoiser)  # pyright: ignore[reportArgumentType]
        pipeline.set_progress_bar_config(disable=True)

        def draw(request: ImageRequest) -> Image.Image:
            return draw_image(pipeline, request, device, self.weight_dtype)

        return draw

    def export_pipeline(self, folder: Path, denoiser: nn.Module) -> None:
        folder.mkdir(parents=True)
        denoiser.save_pretrained(folder / "transformer")  # pyright: ignore[reportCallIssue]
        for part in ("scheduler", "vae", *_TEXT_PARTS):
            source = self._parts.vae if part == "vae" else self._parts.repository
            shutil.copytree(source.part(part), folder / part)
        kind = FluxKontextPipeline if self._flavour.edits_references else FluxPipeline
        index = {
            "_class_name": kind.__name__,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class _ReferencePipeline(FluxKontextPipeline):
    """The official pipeline, which takes one reference; several are put where training puts them."""

    references: tuple[Tensor, ...] = ()

    def prepare_latents(self, image: Any, *args: Any, **keys: Any) -> Any:
        latents, image_latents, ids, image_ids = super().prepare_latents(image, *args, **keys)
        if len(self.references) > 1:
            image_latents, image_ids = pack_references([r.to(latents) for r in self.references])
            image_ids = image_ids.to(ids)
        return latents, image_latents, ids, image_ids


def draw_image(pipeline: Any, request: ImageRequest, device: torch.device, dtype: torch.dtype) -> Image.Image:
    """One image; the start noise is drawn on the CPU, so that a seed means the same everywhere."""
    extra: dict[str, Any] = {}
    if request.references:
        pipeline.references = tuple(reference[None].to(device, dtype) for reference in request.references)
        image = pipeline.references[0]
        extra = {"image": image, "max_area": request.width * request.height, "_auto_resize": False}
    side = pipeline.vae_scale_factor
    rows, columns = (2 * (edge // (2 * side)) for edge in (request.height, request.width))
    with watched(pipeline.scheduler, _unpacking(request.watch, rows, columns)):
        latents = _sample(pipeline, request, device, dtype, extra)
    vae = pipeline.vae
    unscaled = unpack(latents, rows, columns) / vae.config["scaling_factor"] + vae.config["shift_factor"]
    pixels = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]


def _unpacking(watch: Watch | None, rows: int, columns: int) -> Watch | None:
    """The pipeline's latents are tokens; who looks on is shown a picture's."""
    if watch is None:
        return None
    return Watch(watch.steps, lambda step, t, tokens: watch.show(step, t, unpack(tokens, rows, columns)))


def _sample(
    pipeline: Any, request: ImageRequest, device: torch.device, dtype: torch.dtype, extra: dict[str, Any]
) -> Tensor:
    prompt = request.prompt
    return pipeline(
        prompt_embeds=prompt["prompt_embeds"][None].to(device, dtype),
        pooled_prompt_embeds=prompt["pooled_prompt_embeds"][None].to(device, dtype),
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **extra,
    ).images
