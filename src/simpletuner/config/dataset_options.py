"""The dataset file: a list of entries, each one of these models. training.md §3.1."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from simpletuner.config.storage_options import StorageKeys

ResolutionType = Literal["pixel_area", "area", "pixel"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "instance_prompt", "parquet", "csv", "huggingface"]
CropStyle = Literal["random", "center", "centre", "corner"]
CropAspect = Literal["square", "preserve", "closest", "random"]
ConditioningType = Literal["reference_strict", "reference_loose", "mask", "segmentation"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1, pattern=r"^[^/\x00.][^/\x00]*$")]
    """Name in caches, ledger and metrics; unique in the file; without `/`, and not beginning with a dot."""

    disabled: bool = False
    """Leave this entry out of the run."""


class ParquetColumns(BaseModel):
    """Captions and sizes from a table beside the pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str
    """The parquet or JSONL file, relative to the root of the pictures unless absolute."""
    filename_column: str = "filename"
    """Column with the file name of the picture."""
    caption_column: str = "caption"
    """Column with the caption; a list cell gives several variants."""
    fallback_caption_column: str | None = None
    """Used where the caption column is empty."""
    width_column: str | None = None
    """Column with the width; saves reading the header."""
    height_column: str | None = None
    """Column with the height; saves reading the header."""
    identifier_includes_extension: bool = False
    """Whether the file name column carries the extension."""


class PictureDataset(StorageKeys, _Entry):
    """Pictures of one place. Keys that an entry leaves out take the value of the option of the same name."""

    cache_dir_vae: str
    """Where latents are kept; default `<cache_dir_vae>/<id>`."""

    resolution: PositiveFloat = 1024
    """Target size, in the unit of `resolution_type`."""

    resolution_type: ResolutionType = "pixel_area"
    """`pixel_area`: edge of a square of equal area; `area`: megapixels; `pixel`: the shorter edge."""

    minimum_image_size: PositiveFloat | None = None
    """Smaller pictures are dropped (`too_small`). Same unit as `resolution`."""

    maximum_image_size: PositiveFloat | None = None
    """Larger pictures are first brought to `target_downsample_size`. Same unit as `resolution`."""

    target_downsample_size: PositiveFloat | None = None
    """Size that too large pictures are brought to before they are cropped. Same unit as `resolution`."""

    max_upscale_threshold: PositiveFloat | None = None
    """Pictures that would be enlarged by more than this fraction are dropped (`too_much_upscale`)."""

    crop: bool = False
    """Cut to the target; otherwise the whole picture is resized to it."""

    crop_style: CropStyle = "random"
    """Which part is kept."""

    crop_aspect: CropAspect = "square"
    """Aspect of the cut: square, the picture's own (`preserve`), or one of `crop_aspect_buckets`."""

    crop_aspect_buckets: list[PositiveFloat] = Field(default_factory=list[float])
    """Width ÷ height choices for `closest` and `random`."""

    caption_strategy: CaptionStrategy = "filename"
    """Where captions come from."""

    instance_prompt: str | list[str] | None = None
    """Caption, or captions, for every picture of the dataset."""

    prepend_instance_prompt: bool = False
    """Put `instance_prompt` before each caption."""

    only_instance_prompt: bool = False
    """Use `instance_prompt` in place of each caption."""

    disable_multiline_split: bool = False
    """Take a caption file as one caption, not one a line."""

    repeats: NonNegativeInt = 0
    """Extra uses of each sample per epoch."""

    probability: PositiveFloat = 1.0
    """Weight of this dataset when the next batch's dataset is drawn."""

    caption_dropout_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance, per visit, that the empty caption is used."""

    metadata_backend: Literal["discovery", "json", "parquet"] = "discovery"
    """`discovery` reads image headers; `parquet` takes sizes from the table."""

    parquet: ParquetColumns | None = None
    """The table of captions and sizes."""

    minimum_aspect_ratio: PositiveFloat | None = None
    """Narrower pictures (width ÷ height) are dropped."""

    maximum_aspect_ratio: PositiveFloat | None = None
    """Wider pictures (width ÷ height) are dropped."""

    max_num_samples: PositiveInt | None = None
    """Use only a fixed random subset of this many pictures."""

    vae_batch_size: PositiveInt = 4
    """Pictures encoded at once."""

    aspect_bucket_rounding: PositiveInt = 2
    """Decimals of the aspect ratio that makes a bucket."""


def _listed(value: Any) -> Any:
    """One id may be written without its list."""
    return [value] if isinstance(value, str) else value


class TargetDataset(PictureDataset):
    """Pictures that a loss is of; each may have mates in conditioning sets."""

    conditioning_data: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list[str])
    """Id, or ids, of the conditioning sets whose pictures of the same path belong to these."""


class ImageDataset(TargetDataset):
    dataset_type: Literal["image"] = "image"


class EvalDataset(TargetDataset):
    """Pictures that are never trained on: their loss on fixed noise is the held-out loss."""

    dataset_type: Literal["eval"] = "eval"


class ConditioningDataset(PictureDataset):
    """Reference pictures or masks, paired with the pictures of the datasets that name it. It has no captions."""

    dataset_type: Literal["conditioning"] = "conditioning"

    conditioning_type: ConditioningType = "reference_loose"
    """`reference_strict`, `mask` and `segmentation` are cut as their target is; `reference_loose` by its own keys."""

    caption_strategy: CaptionStrategy | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Always null: the caption of the picture that it belongs to is used."""


class TextEmbeds(_Entry):
    type: Literal["local"] = "local"
    """A cache is a folder of this machine."""

    dataset_type: Literal["text_embeds"] = "text_embeds"

    default: bool = False
    """The default one also keeps the validation, negative and empty prompts."""

    cache_dir: str
    """Where embeddings are kept."""

    write_batch_size: PositiveInt = 128
    """Embeddings written at once."""

    text_encoder_batch_size: PositiveInt = 16
    """Captions encoded at once."""


def dataset_kind(entry: Any) -> str:
    """The tag of the union: an entry that does not say is a picture dataset."""
    if isinstance(entry, dict):
        if entry.get("conditioning_type"):  # pyright: ignore[reportUnknownMemberType]
            return "conditioning"
        return str(entry.get("dataset_type", "image"))  # pyright: ignore[reportUnknownMemberType,reportUnknownArgumentType]
    return entry.dataset_type


Dataset = Annotated[
    Annotated[ImageDataset, Tag("image")]
    | Annotated[EvalDataset, Tag("eval")]
    | Annotated[ConditioningDataset, Tag("conditioning")]
    | Annotated[TextEmbeds, Tag("text_embeds")],
    Discriminator(dataset_kind),
]

MODELS: dict[str, type[ImageDataset] | type[EvalDataset] | type[ConditioningDataset] | type[TextEmbeds]] = {
    "image": ImageDataset,
    "eval": EvalDataset,
    "conditioning": ConditioningDataset,
    "text_embeds": TextEmbeds,
}

INHERITED = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "max_upscale_threshold",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "caption_dropout_probability",
    "vae_batch_size",
    "aspect_bucket_rounding",
    "text_encoder_batch_size",
    "write_batch_size",
)
"""Keys whose missing value is the option of the same name."""

FOLLOWS_SOURCE = (
    "minimum_image_size", "max_upscale_threshold", "minimum_aspect_ratio", "maximum_aspect_ratio", "max_num_samples",
    "caption_strategy", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt",
    "disable_multiline_split", "caption_dropout_probability", "repeats", "probability",
)  # fmt: skip
"""Keys without effect in a conditioning set: which pictures are used, how often and with which caption."""

KNOWN_TYPES = ("local", "huggingface", "aws", "csv", "webshart", "memory")
KNOWN_DATASET_TYPES = (
    "image", "eval", "text_embeds", "conditioning", "image_embeds", "caption",
    "video", "audio", "conditioning_image_embeds",
)  # fmt: skip

NO_EFFECT_KEYS: dict[str, str] = {
    "hash_filenames": "caches are keyed by content",
    "compress_cache": "caches are keyed by content",
    "preserve_data_backend_cache": "caches are keyed by content",
    "metadata_update_interval": "caches are keyed by content",
    "read_batch_size": "files are read ahead as far as the CPUs allow",
    "image_processing_batch_size": "pictures are decoded ahead as far as the CPUs allow",
}
"""Written by people of other trainers → why it cannot change anything here."""

LATER_KEYS = frozenset(
    {
        "caption_shuffle", "caption_filter_list", "train_batch_size",
        "start_step", "start_epoch", "end_step", "end_epoch", "is_regularisation_data", "timestep_sampling_offset",
        "source_dataset_id", "text_embeds", "skip_file_discovery", "vae_cache_ondemand", "text_cache_ondemand",
        "vae_cache_disable", "text_cache_disable", "scan_for_errors", "disable_validation",
        "vae_cache_clear_each_epoch",
        "conditioning", "slider_strength", "disable_after_epoch_step", "video", "audio", "image_embeds",
        "conditioning_image_embeds", "s2v_datasets", "huggingface", "maximum_caption_length",
    }
)  # fmt: skip
"""Keys of the contract that are not built yet: `option_not_supported_yet`."""
