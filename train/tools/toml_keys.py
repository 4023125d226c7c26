"""Keys of an sd-scripts training TOML and what they are called here; the rules are in convert_toml.py."""

from __future__ import annotations

from typing import Any

DIRECT = {  # theirs: ours, same meaning and same values
    "pretrained_model_name_or_path": "model.init_from",
    "vae": "model.vae",
    "train_batch_size": "batch.micro",
    "max_train_epochs": "epochs",
    "max_train_steps": "max_updates",
    "learning_rate": "optimizer.unet_lr",
    "train_text_encoder": "model.train_text_encoders",
    "max_grad_norm": "optimizer.max_grad_norm",
    "seed": "seed",
    "output_dir": "output_dir",
    "output_name": "stage",
    "shuffle_caption": "data.shuffle_tags",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_dropout_every_n_epochs": "data.caption_dropout_every_epochs",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "token_warmup_min": "data.token_warmup_min",
    "token_warmup_step": "data.token_warmup_steps",
    "max_token_length": "data.max_tokens",
    "keep_tokens_separator": "data.separator",
    "max_data_loader_n_workers": "data.workers",
    "noise_offset": "noise.offset",
    "adaptive_noise_scale": "noise.offset_adaptive",
    "multires_noise_iterations": "noise.multires_iterations",
    "multires_noise_discount": "noise.multires_discount",
    "ip_noise_gamma": "noise.input_perturbation",
    "zero_terminal_snr": "noise.zero_terminal_snr",
    "min_snr_gamma": "loss.min_snr_gamma",
    "debiased_estimation_loss": "loss.debiased",
    "huber_c": "loss.huber_c",
    "huber_schedule": "loss.huber_schedule",
    "save_every_n_steps": "checkpoint.every_steps",
    "sample_every_n_steps": "sampling.every_steps",
    "metadata_title": "export.title",
    "metadata_author": "export.author",
    "metadata_description": "export.description",
    "metadata_license": "export.license",
    "metadata_tags": "export.tags",
    "wandb_run_name": "tracking.name",
    "log_tracker_name": "tracking.project",
}
CHOICES: dict[str, tuple[str, dict[Any, Any]]] = {  # theirs: (ours, their value: ours)
    "mixed_precision": ("precision", {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "save_precision": ("export.dtype", {"fp16": "fp16", "float": "fp32"}),
    "gradient_checkpointing": ("model.gradient_checkpointing", {True: "full", False: "none"}),
    "v_parameterization": ("loss.prediction", {True: "v", False: "epsilon"}),
    "loss_type": ("loss.type", {"l2": "l2", "huber": "huber"}),
    "torch_compile": ("model.compile", {True: True, False: False}),
}
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adafactor": "adafactor"}
DEFAULT_LR = 2e-6
_ADAMW = {"weight_decay": 0.01, "betas": [0.9, 0.999]}
DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {  # what the libraries do when optimizer_args is silent
    "adamw": _ADAMW, "adamw8bit": _ADAMW, "adafactor": {"relative_step": True, "scale_parameter": True},
}  # fmt: skip
ARGUMENTS = ("weight_decay", "betas", "eps", "scale_parameter", "relative_step", "warmup_init", "clip_threshold",
             "decay_rate")  # fmt: skip
DATASET = {  # keys of the original's dataset part; ours are in dataset.yaml
    "resolution": "buckets.area_px", "min_bucket_reso": "buckets.min_px", "max_bucket_reso": "buckets.max_px",
    "bucket_reso_steps": "buckets.step_px", "train_data_dir": "sources", "in_json": "sources",
    "dataset_config": "sources", "caption_extension": "sources", "cache_latents": "latents (always)", "cache_latents_to_disk": "latents (always)",
    "vae_batch_size": "latents", "no_half_vae": "latents.dtype", "dataset_repeats": "select",
    "enable_bucket": "buckets",
}  # fmt: skip
NO_COUNTERPART = {
    "bucket_no_upscale": "small images are enlarged, or excluded at probe",
    "flip_aug": "no flips: the recipe has none", "color_aug": "latents are prepared once",
    "random_crop": "the crop is the centre's and told to the network", "keep_tokens": "use the separator in captions",
    "caption_separator": "captions are split at commas",
    "cache_text_encoder_outputs": "would freeze the shuffled captions",
    "cache_text_encoder_outputs_to_disk": "would freeze the shuffled captions",
    "save_every_n_epochs": "checkpoint.permanent_every_steps keeps one per epoch by default",
    "save_last_n_steps": "counts steps; see checkpoint.keep", "save_last_n_epochs": "see checkpoint.keep",
    "save_state": "always", "save_model_as": "always .safetensors", "resume": "resumes by itself from output_dir",
    "sample_prompts": "make a configs/prompts.yaml", "sample_sampler": "sampler in configs/prompts.yaml",
    "xformers": "model.attention chooses", "sdpa": "model.attention chooses", "mem_eff_attn": "model.attention chooses",
    "full_fp16": "masters stay fp32", "full_bf16": "see model.weights: bf16", "lowram": "not needed",
    "persistent_data_loader_workers": "always", "logging_dir": "metrics.jsonl in output_dir",
    "log_prefix": "not needed",
    "ddp_timeout": "see launch.collective_timeout_s", "ddp_gradient_as_bucket_view": "always",
    "ddp_static_graph": "not needed", "wandb_api_key": "a secret; the value is not copied: use wandb login",
    "clip_skip": "the SDXL encoders are read before their last layer", "lr_scheduler_power": "no polynomial schedule",
    "metadata": "the training record is always written", "training_comment": "see export.description",
    "prior_loss_weight": "no regularisation images", "weighted_captions": "captions are tags",
    "scale_v_pred_loss_like_noise_pred": "no such weighting", "v_pred_like_loss": "no such weighting",
    "block_lr": "one learning rate per network", "fused_backward_pass": "not needed",
    "noise_offset_random_strength": "the offset's scale is fixed", "huber_scale": "always 1",
    "ip_noise_gamma_random_strength": "the perturbation's scale is fixed", "lr_decay_steps": "no such schedule",
    "sample_every_n_epochs": "see sampling.every_steps", "sample_at_first": "see sampling.every_steps",
    "masked_loss": "no masks", "alpha_mask": "no masks", "deepspeed": "see configs/launch", "highvram": "not needed",
    "skip_cache_check": "latents are checked once, when they are prepared", "dynamo_backend": "see model.compile",
}  # fmt: skip
