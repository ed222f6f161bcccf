"""Option names of the contract that are known but not typed: still to come, without effect, or renamed."""

from __future__ import annotations

_LATER = """
rescale_betas_zero_snr tokenizer_max_length t5_padding seed_for_each_device
strict_epoch_limit lr_scale lr_scale_sqrt optimizer_config optimizer_beta1 optimizer_beta2 gradient_precision
input_perturbation input_perturbation_steps disable_segmented_timestep_sampling
training_scheduler_timestep_spacing inference_scheduler_timestep_spacing flow_custom_timesteps flow_timesteps_mode
lora_init_type use_dora peft_lora_target_modules init_lora_step lora_format flux_attention_masked_training
validation_guidance_real validation_no_cfg_until_timestep validation_lycoris_strength text_encoder_1_precision
text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision disable_tf32 ema_device
ema_update_interval ema_warmup_steps ema_cpu_only checkpoint_epoch_interval checkpointing_rolling_steps
checkpoints_rolling_total_limit delete_invalid_checkpoints validate_after_step validate_after_epoch
validation_randomize
validation_prompt_library validation_seed_source validation_guidance_rescale validation_using_datasets
validation_multigpu logging_dir print_sampler_statistics aspect_bucket_worker_count max_workers torch_num_threads
enable_multiprocessing aws_max_pool_connections vae_cache_ondemand vae_cache_disable text_cache_ondemand
text_cache_disable compress_disk_cache vae_enable_tiling vae_enable_slicing skip_file_discovery parquet_caption_column
parquet_filename_column num_machines machine_rank main_process_ip main_process_port accelerate_extra_args
find_unused_parameters
enable_group_offload group_offload_type
group_offload_use_stream group_offload_to_disk_path musubi_blocks_to_swap accelerator_cache_clear_interval
trust_remote_code controlnet control keep_vae_loaded delete_model_after_load offload_during_startup
offload_during_save adam_beta1 adam_beta2 adam_weight_decay adam_epsilon optimizer_cpu_offload_method
optimizer_offload_gradients train_text_encoder text_encoder_lr save_text_encoder snr_weight use_soft_min_snr
soft_min_snr_sigma_data peft_lora_mode init_lokr_norm init_lora_ema slider_lora_target assistant_lora_path
fuse_qkv_projections quantization_config quantize_activations validation_guidance_skip_layers
validation_stitch_input_location evaluation_type pretrained_evaluation_model_name_or_path custom_tracker
tracker_image_layout delete_problematic_images delete_unwanted_images gradient_checkpointing_backend
gradient_checkpointing_offload_attention deepspeed_config offload_param_path context_parallel_size same_network
fsdp_activation_checkpointing fsdp_cpu_ram_efficient_loading pixart_validation_pipeline_mode tread_config grounding
diffusion_blocks_config
"""

LATER = frozenset(_LATER.split())  # fmt: skip

LATER_PREFIXES = (
    "validation_adapter_", "ramtorch", "nsfw_check_", "audio_", "video_", "crepa_", "urepa_", "irepa_",
    "scheduled_sampling_", "xm_", "nextlat_", "layersync_", "internal_guidance_", "twinflow_", "mixflow_",
    "diff2flow_", "distillation_", "sdnq_",
)  # fmt: skip

NO_EFFECT: dict[str, str] = {
    "fuse_optimizer": "the optimizer step is always fused where the device can",
    "set_grads_to_none": "gradients live in one buffer that is reused",
    "ema_foreach_disable": "the moving average is one operation on one buffer",
    "checkpointing_use_tempdir": "every checkpoint is written beside its place and renamed",
    "push_to_hub_background": "uploads always run beside training",
    "preserve_data_backend_cache": "caches are keyed by content",
    "vae_cache_scan_behaviour": "caches are keyed by content",
    "metadata_update_interval": "caches are keyed by content",
    "read_batch_size": "files are read ahead as far as the CPUs allow",
    "image_processing_batch_size": "pictures are decoded ahead as far as the CPUs allow",
    "disable_bucket_pruning": "buckets are never pruned",
    "allow_dataset_oversubscription": "buckets smaller than a batch are served over several passes",
}
"""Name → why it cannot change anything."""

RENAMED: dict[str, str] = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
}

OLD_VALUES: dict[str, dict[str, str]] = {"lr_scheduler": {"cosine_with_warmup": "cosine"}}
"""Option → old name of a choice → its name now."""

NEGATED: dict[str, str] = {"vae_cache_preprocess": "vae_cache_ondemand", "ignore_final_epochs": "strict_epoch_limit"}
"""Old name → the option of the opposite meaning."""


def is_later(name: str) -> bool:
    return name in LATER or name.startswith(LATER_PREFIXES)
