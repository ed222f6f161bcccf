"""What is looked at while training: images and the held-out loss. training.md §2.8."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from simpletuner.config.option import OptionGroup, Ui


class ValidationOptions(OptionGroup):
    validation_prompt: Annotated[str | None, Ui(tab="validation", order=1)] = None
    """Prompt that is drawn at each validation."""

    user_prompt_library: Annotated[str | dict[str, Any] | None, Ui(tab="validation", order=2, structured=True)] = None
    """More prompts by short name: `{name: "prompt"}`, as JSON or the path of a JSON file."""

    validation_negative_prompt: Annotated[str, Ui(tab="validation", order=3, off="")] = "blurry, cropped, ugly"
    """What guidance steers away from."""

    validation_step_interval: Annotated[NonNegativeInt, Ui(tab="validation", order=4)] = 100
    """Validate every so many steps; 0: not by steps."""

    validation_epoch_interval: Annotated[PositiveInt | None, Ui(tab="validation", order=5)] = None
    """Validate at the end of every so many epochs."""

    validation_num_inference_steps: Annotated[PositiveInt, Ui(tab="validation", order=6)] = 30
    """Sampler steps of an image."""

    validation_guidance: Annotated[NonNegativeFloat, Ui(tab="validation", order=7)] = 4.5
    """Guidance scale."""

    validation_resolution: Annotated[
        str | int | float | list[str | int | float], Ui(tab="validation", order=8, structured=True)
    ] = "1024x1024"  # fmt: skip
    """`WxH`, an edge, or a list of them; numbers below 128 are megapixels."""

    validation_seed: Annotated[Annotated[int, Field(ge=0, lt=2**62)] | None, Ui(tab="validation", order=9)] = None
    """Seed of the images; empty: from `seed`, fixed for the run."""

    num_validation_images: Annotated[PositiveInt, Ui(tab="validation", order=10)] = 1
    """Images per prompt and resolution; image i uses seed + i."""

    validation_noise_scheduler: Annotated[
        Literal["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"] | None, Ui(tab="validation", order=11)
    ] = None  # fmt: skip
    """Sampler; empty: the repository's."""

    validation_on_startup: Annotated[bool, Ui(tab="validation", order=12)] = False
    """Validate before the first step, also when a run is resumed."""

    validation_disable: Annotated[bool, Ui(tab="validation", order=13)] = False
    """Draw no images at all."""

    validation_disable_unconditional: Annotated[bool, Ui(tab="validation", order=14)] = False
    """Leave out the image of the empty prompt."""

    disable_benchmark: Annotated[bool, Ui(tab="validation", order=15)] = False
    """Do not draw the base model's images before training."""

    validation_image_format: Annotated[Literal["png", "webp", "jpeg"], Ui(tab="validation", order=16)] = "png"
    """File format of the images."""

    validation_image_quality: Annotated[int, Field(ge=1, le=100), Ui(tab="validation", order=17)] = 90
    """Quality of `webp` and `jpeg`."""

    validation_preview: Annotated[bool, Ui(tab="validation", order=20)] = False
    """Show images while they are sampled."""

    validation_preview_steps: Annotated[PositiveInt, Ui(tab="validation", order=21)] = 1
    """Sampler steps between two previews."""

    validation_method: Annotated[
        Literal["simpletuner-local", "external-script"], Ui(tab="validation", order=22)
    ] = "simpletuner-local"  # fmt: skip
    """Draw here, or run a program of yours."""

    validation_external_script: Annotated[
        str | None, Ui(tab="validation", order=23, runs_command=True)
    ] = None  # fmt: skip
    """Command that validates in our place; `{placeholders}` are filled, there is no shell."""

    validation_external_background: Annotated[bool, Ui(tab="validation", order=24)] = False
    """Train on while that command runs."""

    eval_dataset_id: Annotated[str | None, Ui(tab="validation", order=30)] = None
    """Dataset whose references edit families validate on; empty: the first one that is trained on."""

    num_eval_images: Annotated[PositiveInt, Ui(tab="validation", order=29)] = 4
    """References that each prompt is drawn on."""

    eval_steps_interval: Annotated[PositiveInt | None, Ui(tab="validation", order=31)] = None
    """Steps between two held-out losses; empty: with each validation."""

    eval_epoch_interval: Annotated[PositiveInt | None, Ui(tab="validation", order=32)] = None
    """Epochs between two held-out losses."""

    eval_timesteps: Annotated[PositiveInt, Ui(tab="validation", order=33)] = 28
    """Noise levels per held-out sample."""

    eval_loss_disable: Annotated[bool, Ui(tab="validation", order=34)] = False
    """Compute no held-out loss."""
