"""How it is trained: length, batch, optimizer, schedule, loss, checkpoints, data. training.md §2.2–2.4, 2.7, 2.10."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from simpletuner.config.budget import as_text
from simpletuner.config.dataset_options import CaptionStrategy, ResolutionType
from simpletuner.config.device_numbers import joined
from simpletuner.config.option import OptionGroup, Ui

Share = Annotated[float, Field(ge=0, le=1)]


class RunOptions(OptionGroup):
    max_train_steps: Annotated[NonNegativeInt, Ui(tab="training", order=1)] = 0
    """Optimizer steps of the run; 0: `num_train_epochs` decides."""

    num_train_epochs: Annotated[NonNegativeInt, Ui(tab="training", order=2)] = 1
    """Passes over the data; 0: `max_train_steps` decides."""

    train_batch_size: Annotated[PositiveInt, Ui(tab="training", order=3)] = 4
    """Samples per device and micro-step."""

    gradient_accumulation_steps: Annotated[PositiveInt, Ui(tab="training", order=4)] = 1
    """Micro-steps per optimizer step."""

    seed: Annotated[Annotated[int, Field(ge=-1, lt=2**63)] | None, Ui(tab="training", order=5)] = None
    """Seed of everything that is drawn. Empty, 0 or -1: drawn once when the job is frozen, then recorded."""

    num_processes: Annotated[PositiveInt, Ui(tab="hardware", order=30)] = 1
    """Training processes, one per device."""

    accelerate_visible_devices: Annotated[
        Annotated[str, BeforeValidator(joined)] | None, Ui(tab="hardware", order=31)
    ] = None
    """Numbers of the devices that the run insists on, such as `0,1`; the first `num_processes` of them are used. Empty:
    any that are free."""

    memory_budget: Annotated[Annotated[str, BeforeValidator(as_text)] | None, Ui(tab="hardware", order=29)] = None
    """`auto` (what is free at the start) or GB of 10⁹ bytes: the start chooses recomputation, encoding batches, a split
    of the batch with the same steps and, for adapters, an 8-bit base, as far as the run needs them to stay inside."""

    accelerate_config: Annotated[str | None, Ui(tab="hardware", order=32, later=True, path=True)] = None
    """Accelerate configuration file; only process, machine and rendezvous values are read."""


class OptimizerOptions(OptionGroup):
    learning_rate: Annotated[PositiveFloat, Ui(tab="training", order=10)] = 1e-5
    """Peak learning rate, reached after warm-up."""

    optimizer: Annotated[str, Ui(tab="training", order=11)] = "adamw_bf16"
    """Optimizer by name."""

    lr_scheduler: Annotated[
        Literal[
            "constant_with_warmup", "constant", "linear", "cosine", "sine", "cosine_with_restarts", "polynomial"
        ],
        Ui(tab="training", order=12),
    ] = "constant_with_warmup"  # fmt: skip
    """Shape of the learning rate over the run."""

    lr_warmup_steps: Annotated[NonNegativeInt, Ui(tab="training", order=13)] = 0
    """Steps over which the rate rises to `learning_rate`."""

    lr_end: Annotated[NonNegativeFloat, Ui(tab="training", order=14)] = 4e-7
    """Rate at the last step of a falling schedule."""

    lr_num_cycles: Annotated[PositiveInt, Ui(tab="training", order=15)] = 1
    """Cycles of `cosine_with_restarts` and `sine`."""

    lr_power: Annotated[PositiveFloat, Ui(tab="training", order=16)] = 0.8
    """Power of `polynomial`."""

    max_grad_norm: Annotated[NonNegativeFloat, Ui(tab="training", order=17)] = 2.0
    """Gradients are scaled down to this norm; 0: never."""

    grad_clip_method: Annotated[Literal["norm", "value"], Ui(tab="training", order=18)] = "norm"
    """Clip by the norm over all trained tensors, or each element."""

    optimizer_release_gradients: Annotated[bool, Ui(tab="training", order=19)] = False
    """Step each tensor in the backward pass, as soon as its gradient is there, and free that: there is never a gradient
    of the whole model. Without accumulation and clipping by norm (`max_grad_norm` 0, or `grad_clip_method` value)."""


class LossOptions(OptionGroup):
    loss_type: Annotated[Literal["l2", "huber", "smooth_l1"], Ui(tab="training", order=30)] = "l2"
    """Distance between prediction and target."""

    huber_schedule: Annotated[Literal["snr", "exponential", "constant"], Ui(tab="training", order=31)] = "snr"
    """How the width of the Huber losses follows the timestep."""

    huber_c: Annotated[PositiveFloat, Ui(tab="training", order=32)] = 0.1
    """Width at the noisy end."""

    snr_gamma: Annotated[PositiveFloat | None, Ui(tab="training", order=33)] = None
    """Min-SNR weighting of the loss with this gamma. Diffusion families."""

    offset_noise: Annotated[bool, Ui(tab="training", order=34)] = False
    """Now and then add one random offset per channel to the noise."""

    noise_offset: Annotated[PositiveFloat, Ui(tab="training", order=35)] = 0.1
    """Size of that offset."""

    noise_offset_probability: Annotated[Share, Ui(tab="training", order=36)] = 0.25
    """Chance of the offset, per sample."""

    timestep_bias_strategy: Annotated[
        Literal["none", "earlier", "later", "range"], Ui(tab="training", order=37)
    ] = "none"  # fmt: skip
    """Part of the timesteps that is drawn more often."""

    timestep_bias_multiplier: Annotated[PositiveFloat, Ui(tab="training", order=38)] = 1.0
    """Weight of that part."""

    timestep_bias_portion: Annotated[Share, Ui(tab="training", order=39)] = 0.25
    """Size of that part for `earlier` and `later`."""

    timestep_bias_begin: Annotated[NonNegativeInt, Ui(tab="training", order=40)] = 0
    """First timestep of `range`."""

    timestep_bias_end: Annotated[PositiveInt, Ui(tab="training", order=41)] = 1000
    """Timestep at which `range` ends, itself not in it."""

    flow_schedule_shift: Annotated[NonNegativeFloat, Ui(tab="training", order=42)] = 3.0
    """Shift of the noise levels. Flow-matching families."""

    flow_schedule_auto_shift: Annotated[bool, Ui(tab="training", order=47)] = False
    """Let the shift follow the number of image tokens, as the sampler does."""

    flow_sigmoid_scale: Annotated[PositiveFloat, Ui(tab="training", order=48)] = 1.0
    """Spread of the noise levels: σ = sigmoid(scale · n) with normal n."""

    flow_use_uniform_schedule: Annotated[bool, Ui(tab="training", order=49)] = False
    """Draw noise levels evenly."""

    flow_use_beta_schedule: Annotated[bool, Ui(tab="training", order=53)] = False
    """Draw noise levels from a beta distribution."""

    flow_beta_schedule_alpha: Annotated[PositiveFloat, Ui(tab="training", order=54)] = 2.0
    """First shape of the beta distribution."""

    flow_beta_schedule_beta: Annotated[PositiveFloat, Ui(tab="training", order=55)] = 2.0
    """Second shape of the beta distribution."""

    refiner_training: Annotated[bool, Ui(tab="training", order=43)] = False
    """Train one expert's range of timesteps only."""

    refiner_training_strength: Annotated[Share, Ui(tab="training", order=44)] = 0.2
    """Share of the timesteps that belongs to the refiner."""

    refiner_training_invert_schedule: Annotated[bool, Ui(tab="training", order=45)] = False
    """Train the other expert: the noisy timesteps."""

    caption_dropout_probability: Annotated[Share, Ui(tab="training", order=46)] = 0.1
    """Chance, per visit, that the empty caption is used."""

    masked_loss_probability: Annotated[Share, Ui(tab="training", order=47)] = 1.0
    """Chance, per visit, that a sample's mask weighs its loss."""


class CheckpointOptions(OptionGroup):
    checkpoint_step_interval: Annotated[NonNegativeInt, Ui(tab="training", order=50)] = 500
    """Save every so many steps; 0: only on request and at the end."""

    checkpoints_total_limit: Annotated[NonNegativeInt, Ui(tab="training", order=51)] = 5
    """Newest checkpoints that are kept; 0: all."""

    resume_from_checkpoint: Annotated[str | None, Ui(tab="training", order=52)] = "latest"
    """`latest`, a checkpoint's name or its path; empty: start afresh."""

    nonfinite_action: Annotated[Literal["skip", "rollback"], Ui(tab="training", order=53)] = "skip"
    """After a loss or gradient that is no number: leave that update out, or go back to the last checkpoint without the
    samples that it used."""

    early_stop_patience: Annotated[PositiveInt | None, Ui(tab="training", order=54)] = None
    """End the run after so many evaluations of the held-out loss without a new lowest; empty: never."""

    override_dataset_config: Annotated[bool, Ui(tab="data", order=52)] = False
    """Accept a changed dataset when a run is resumed."""

    disk_low_threshold: Annotated[str | None, Ui(tab="training", order=54)] = None
    """Least free space of the output folder's disk before a save, such as 100G or 512M; empty: any."""

    disk_low_action: Annotated[Literal["stop", "wait", "script"], Ui(tab="training", order=55)] = "stop"
    """What is done when less is free: end the run, wait for room, or run `disk_low_script` and look again."""

    disk_low_script: Annotated[str | None, Ui(tab="training", order=56, runs_command=True)] = None
    """Command that makes room; `{placeholders}` are filled, there is no shell."""


class DataOptions(OptionGroup):
    data_backend_config: Annotated[str, Ui(tab="data", order=1, path=True)]
    """The dataset file, relative to the workspace, else to the configs directory."""

    cache_dir_vae: Annotated[str | None, Ui(tab="data", order=2)] = None
    """Folder of the latent caches; each dataset has a folder in it."""

    cache_dir_text: Annotated[str, Ui(tab="data", order=3)] = "cache"
    """Folder of the text caches."""

    cache_dir: Annotated[str | None, Ui(tab="data", order=4)] = None
    """Folder of caches that have no place of their own."""

    resolution: Annotated[PositiveFloat, Ui(tab="data", order=10)] = 1024
    """Target size of a dataset that names none."""

    resolution_type: Annotated[ResolutionType, Ui(tab="data", order=11)] = "pixel_area"
    """Unit of sizes: edge of a square of equal area, megapixels, or the shorter edge."""

    minimum_image_size: Annotated[PositiveFloat | None, Ui(tab="data", order=12)] = None
    """Smaller pictures are dropped."""

    maximum_image_size: Annotated[PositiveFloat | None, Ui(tab="data", order=13)] = None
    """Larger pictures are brought to `target_downsample_size` before they are cropped."""

    target_downsample_size: Annotated[PositiveFloat | None, Ui(tab="data", order=14)] = None
    """Size that too large pictures are brought to."""

    max_upscale_threshold: Annotated[PositiveFloat | None, Ui(tab="data", order=15)] = None
    """Pictures that would be enlarged by more than this fraction are dropped."""

    caption_strategy: Annotated[CaptionStrategy, Ui(tab="data", order=20)] = "filename"
    """Where captions come from."""

    instance_prompt: Annotated[str | None, Ui(tab="data", order=21)] = None
    """Caption for every picture."""

    prepend_instance_prompt: Annotated[bool, Ui(tab="data", order=22)] = False
    """Put `instance_prompt` before each caption."""

    only_instance_prompt: Annotated[bool, Ui(tab="data", order=23)] = False
    """Use `instance_prompt` in place of each caption."""

    conditioning_multidataset_sampling: Annotated[
        Literal["random", "combined"], Ui(tab="data", order=24)
    ] = "random"  # fmt: skip
    """Of several conditioning sets one per visit, or all as separate references."""

    ignore_missing_files: Annotated[bool, Ui(tab="data", order=25)] = False
    """Go on without the pictures whose caption or mate is missing."""

    data_backend_sampling: Annotated[Literal["auto-weighting", "uniform"], Ui(tab="data", order=26)] = "auto-weighting"
    """Whether a dataset's size counts when the next batch's dataset is drawn."""

    dataloader_prefetch: Annotated[bool, Ui(tab="data", order=30)] = True
    """Prepare batches ahead."""

    dataloader_prefetch_qlen: Annotated[PositiveInt, Ui(tab="data", order=31)] = 10
    """Batches prepared ahead at most."""

    vae_batch_size: Annotated[PositiveInt, Ui(tab="data", order=32)] = 4
    """Pictures encoded at once."""

    text_encoder_batch_size: Annotated[PositiveInt, Ui(tab="data", order=33)] = 16
    """Captions encoded at once."""

    write_batch_size: Annotated[PositiveInt, Ui(tab="data", order=34)] = 128
    """Cache entries written at once."""

    aspect_bucket_alignment: Annotated[PositiveInt, Ui(tab="data", order=37)] = 64
    """Both sides of a target are multiples of this. Fixed by the family."""

    aspect_bucket_rounding: Annotated[PositiveInt, Ui(tab="data", order=38)] = 2
    """Decimals of the aspect ratio that makes a bucket."""
