"""What is trained: model, adapter, precision, and where results go. training.md §2.1, 2.5, 2.6."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from simpletuner.config.option import OptionGroup, Ui

Precision = Literal[
    "no_change", "bf16", "fp16", "fp32", "int8-quanto", "int4-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao",
    "fp8wo-torchao", "int4-torchao", "nf4-bnb",
]  # fmt: skip
"""Names that are accepted; which of them a run can have is a rule: its answer can say more than "not a choice"."""

QUANTISED = tuple(name for name in get_args(Precision) if "-" in name)


class ModelOptions(OptionGroup):
    model_family: Annotated[str, Ui(tab="model", order=1)]
    """Model family, such as `pixart_sigma`."""

    model_flavour: Annotated[str, Ui(tab="model", order=2)]
    """Variant of the family: a repository of weights and the settings that go with it. Default: the family's."""

    model_type: Annotated[Literal["full", "lora"], Ui(tab="model", order=3)] = "full"
    """`full` trains every weight of the denoiser, `lora` an adapter."""

    pretrained_model_name_or_path: Annotated[str, Ui(tab="model", order=4)]
    """Hub id or local diffusers folder of the base model. Default: the flavour's repository."""

    output_dir: Annotated[str, Ui(tab="model", order=5)] = "simpletuner-results"
    """Folder for checkpoints, images, metrics and the exported model."""

    pretrained_transformer_model_name_or_path: Annotated[str | None, Ui(tab="model", order=20)] = None
    """Take the denoiser from here instead of the base model."""

    pretrained_transformer_subfolder: Annotated[str, Ui(tab="model", order=21)] = "transformer"
    """Folder inside the repository that holds the denoiser."""

    pretrained_vae_model_name_or_path: Annotated[str | None, Ui(tab="model", order=22)] = None
    """Take the autoencoder from here instead of the base model."""

    revision: Annotated[str | None, Ui(tab="model", order=23)] = None
    """Branch, tag or commit of a hub repository."""

    variant: Annotated[str | None, Ui(tab="model", order=24)] = None
    """Weight file variant of a repository, such as `fp16`."""

    vae_dtype: Annotated[Literal["bf16", "fp32", "fp16", "default"], Ui(tab="model", order=25)] = "bf16"
    """Precision of the autoencoder and of the stored latents; `default` keeps that of its files."""

    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample", "flow_matching"] | None, Ui(tab="model", order=26)
    ] = None
    """What the network predicts, if not what the repository's scheduler says. Loss, min-SNR and sampler follow it."""

    clip_skip: Annotated[NonNegativeInt, Ui(tab="model", order=27)] = 0
    """CLIP layers left out at the end, for families conditioned on CLIP hidden states."""

    i_know_what_i_am_doing: Annotated[bool, Ui(tab="hardware", order=90)] = False
    """Go on where a family's guard or the memory prediction would refuse: errors of theirs become warnings."""


class AdapterOptions(OptionGroup):
    lora_type: Annotated[Literal["standard", "lycoris"], Ui(tab="model", order=40)] = "standard"
    """Library of the adapter: peft (`standard`) or lycoris-lora."""

    lora_rank: Annotated[PositiveInt, Ui(tab="model", order=41)] = 16
    """Rank of the adapter."""

    lora_alpha: Annotated[PositiveFloat | None, Ui(tab="model", order=42)] = None
    """Scale of the adapter is alpha ÷ rank. Default: the rank."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1), Ui(tab="model", order=43)] = 0.1
    """Dropout inside the adapter while training."""

    lycoris_config: Annotated[
        str | dict[str, Any] | None, Ui(tab="model", order=44, structured=True)
    ] = None  # fmt: skip
    """LyCORIS configuration file; empty: one is written from rank, alpha and dropout."""

    init_lora: Annotated[str | None, Ui(tab="model", order=45, path=True)] = None
    """Adapter file that training starts from."""


class PrecisionOptions(OptionGroup):
    base_model_precision: Annotated[Precision, Ui(tab="hardware", order=1)] = "no_change"
    """How the base model is loaded. `bf16`, `fp16`, `fp32` are load types; quantised names need an adapter."""

    base_model_default_dtype: Annotated[Literal["bf16", "fp32"], Ui(tab="hardware", order=2)] = "bf16"
    """Type of the weights that are not quantised."""

    mixed_precision: Annotated[Literal["bf16", "fp16", "no"], Ui(tab="hardware", order=3)] = "bf16"
    """Type that the network computes in; `no` computes in the type of the weights."""

    quantize_via: Annotated[Literal["accelerator", "cpu", "pipeline"], Ui(tab="hardware", order=4)] = "accelerator"
    """Where the base is quantised: on the device, on the CPU, or on the device while the next weight is read ahead.
    The weights are equal."""

    use_ema: Annotated[bool, Ui(tab="training", order=60)] = False
    """Keep an exponential moving average of the trained weights, in fp32."""

    ema_decay: Annotated[float, Field(gt=0, lt=1), Ui(tab="training", order=61)] = 0.995
    """Decay per step of the moving average."""

    ema_validation: Annotated[Literal["comparison", "ema_only", "none"], Ui(tab="validation", order=61)] = "comparison"
    """Which weights validation draws with: both, the average only, the trained ones only."""
