"""The words of other trainers, and what they are here. docs/other_trainers.md has these tables.

"table.word" is the word in a table of that name; it comes before the word alone. A `-` is a `_`.
"""

from typing import Any


def by_word(words_of: dict[str, str]) -> dict[str, str]:
    """Turn {meaning: words with a space between them} into {word: meaning}."""
    meanings = {}
    for meaning, words in words_of.items():
        for word in words.split():
            meanings[word] = meaning
    return meanings


# our key: the words of the same meaning. Their values are ours, or stand in VALUES.
OTHER_NAMES = {
    "base_model": (
        "model model.name model.path model_id model_path model_name_or_path "
        "base_model_name_or_path pretrained_model_name_or_path"
    ),
    "train_data": "dataset dataset_path data_path train_file train_path train_dataset",
    "eval_data": "eval_dataset eval_file eval_path validation_file",
    "data_weights": "dataset_weights",
    "eval_fraction": "val_set_size validation_split val_size",
    "max_length": (
        "max_seq_len max_sequence_length model_max_length sequence_len cutoff_len block_size"
    ),
    "max_samples": "max_train_samples",
    "lora_r": "rank lora_rank",
    "target_modules": "lora_target_modules lora_target",
    "load_in_4bit": "use_4bit quantization.enabled",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant use_nested_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "max_iters iters max_train_steps",
    "batch_size": "micro_batch_size per_gpu_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accum_steps",
    "warmup_steps": "num_warmup_steps warmup_iters",
    "optimizer": "optimizer.name optimizer.type",
    "lr_scheduler_type": "lr_scheduler lr_scheduler.type scheduler scheduler.type",
    "max_grad_norm": "grad_clip clip_grad_norm gradient_clipping",
    "adam_beta2": "beta2",
    "seed": "random_seed",
    "dtype": "torch_dtype",
    "compile": "torch_compile",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "offload_activations": "activation_offloading",
    "logging_steps": "log_interval steps_per_report",
    "eval_steps": "eval_interval steps_per_eval",
    "max_eval_batches": "eval_iters",
    "save_steps": "save_interval save_every",
    "early_stopping_patience": "early_stopping.patience",
    "experiment_name": "run_name",
    "output_dir": "out_dir",
}
SAME = by_word(OTHER_NAMES)

# our value of some key: the others' values
OTHER_VALUES = {
    "adamw": "adamw_torch adamw_torch_fused adamw_hf",
    "adamw_8bit": "adamw_bnb_8bit",
    "constant": "constant_with_warmup",
    "bfloat16": "bf16 torch.bfloat16",
    "float16": "fp16 torch.float16",
    "float32": "fp32 torch.float32",
    "lm": "causal_lm CAUSAL_LM sft",
}
VALUES = by_word(OTHER_VALUES)

# word -> {its value: the script that it means, or a key and its value; None: already so here}
METHODS: dict[Any, Any] = {
    "qlora": ("load_in_4bit", True),
    "lora": "train_lora.py",
    "full": "train.py",
}
MEANINGS: dict[str, dict[Any, Any]] = {
    "method": METHODS,
    "adapter": METHODS,
    "finetuning_type": METHODS,
    "use_lora": {True: "train_lora.py", False: "train.py"},
    "use_qlora": {True: ("load_in_4bit", True), False: None},
    "bits": {4: ("load_in_4bit", True), 16: None, 32: None},
    "mixed_precision": {
        "bf16": ("dtype", "bfloat16"),
        "fp16": ("dtype", "float16"),
        "no": ("dtype", "float32"),
        False: ("dtype", "float32"),  # YAML's `no`
    },
    "wandb.enabled": {True: ("report_to", "wandb"), False: None},
    "wandb": {True: ("report_to", "wandb"), False: None},
    "use_wandb": {True: ("report_to", "wandb"), False: None},
    "tensorboard.enabled": {True: ("report_to", "tensorboard"), False: None},
    "tensorboard": {True: ("report_to", "tensorboard"), False: None},
    "use_tensorboard": {True: ("report_to", "tensorboard"), False: None},
}

# word -> why nothing is to be done for it, whatever its value: no number of a run depends on it
KEPT = "the three best checkpoints and the last are kept"
FLASH = "torch's own FlashAttention is used where the GPU and the model allow it"
NO_WORKERS = "the tokens lie in a file that is mapped, so there are no workers"
PACKED = "sequences are packed, which changes no number"
EVAL_BATCHES = "evaluation has the batches of training, which changes no number"
IN_RUN_FOLDER = "logs and TensorBoard's files lie in the folder of the run"
TORCHRUN = "torchrun sets it"
NO_SWITCH = "it switches nothing on: give report_to = wandb, and export"
AUTOMATIC = {
    "save_total_limit": KEPT,
    "load_best_model_at_end": "the artifact has the weights of the best validation loss",
    "save_safetensors": "tensors are saved as safetensors",
    "trust_remote_code": "a base's own code is never run; transformers' is",
    "use_flash_attention": FLASH,
    "use_flash_attention_2": FLASH,
    "use_flash_attn": FLASH,
    "flash_attention": FLASH,
    "attn_implementation": FLASH,
    "use_cache": "training has none",
    "device_map": "the base is put on `device`",
    "low_cpu_mem_usage": "the base is read tensor by tensor",
    "dataloader_num_workers": NO_WORKERS,
    "dataloader_pin_memory": NO_WORKERS,
    "num_workers": NO_WORKERS,
    "preprocessing_num_workers": NO_WORKERS,
    "dataset_num_proc": NO_WORKERS,
    "padding_free": PACKED,
    "padding_side": PACKED,
    "group_by_length": PACKED,
    "per_device_eval_batch_size": EVAL_BATCHES,
    "eval_batch_size": EVAL_BATCHES,
    "eval_accumulation_steps": EVAL_BATCHES,
    "remove_unused_columns": "keys of rows that nothing reads are reported",
    "gradient_checkpointing_kwargs": "checkpointing is never reentrant",
    "bnb_4bit_quant_storage": "4-bit weights are never sharded",
    "logging_dir": IN_RUN_FOLDER,
    "log_dir": IN_RUN_FOLDER,
    "wandb.project": f"{NO_SWITCH} WANDB_PROJECT with it",
    "wandb_project": f"{NO_SWITCH} WANDB_PROJECT with it",
    "wandb.entity": f"{NO_SWITCH} WANDB_ENTITY with it",
    "wandb_entity": f"{NO_SWITCH} WANDB_ENTITY with it",
    "wandb.name": "it is experiment_name",
    "wandb.run_name": "it is experiment_name",
    "wandb_name": "it is experiment_name",
    "disable_tqdm": "there is a bar on a terminal alone",
    "local_rank": TORCHRUN,
    "ddp_backend": TORCHRUN,
    "ddp_find_unused_parameters": "gradients are summed once a step",
}

# word -> (its values that are already so here, what is to be done about any other)
SHARDED = "torchrun shards full fine-tuning (FSDP2) and replicates LoRA; leave it out"
ASSISTANT = "only what the assistant says is trained; leave it out"
BY_STEPS = "give the number of steps: logging_steps, eval_steps, save_steps"
EVALUATED = "evaluation cannot be switched off; a large eval_steps leaves the first and last one"
UPLOAD = "nothing is uploaded; after the run: hf upload OWNER/NAME RUN/final_artifact"
RESUME = "give it as the flag --resume_from"
TOKENIZER = "the base's own is used; to change it, change it in a copy of the base"
MERGE = "after the run: merge.py --adapter RUN/final_artifact --output DIR"
FIXED = "it cannot be changed; leave it out"
MIXED = "give train_data, a list of files, and data_weights, a number for each"
PACKS = "a step has batch_size x gradient_accumulation_steps examples, not packed sequences: raise"
PACKS += " batch_size and leave it out; what fits is packed in any case"
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "packing": ((False,), PACKS),
    "sample_packing": ((False,), PACKS),
    "load_in_8bit": ((False,), "a base is quantised to 4 bits or not at all; give load_in_4bit"),
    "llm_int8_threshold": ((), "a base is quantised to 4 bits or not at all; leave it out"),
    "deepspeed": ((False, {}), SHARDED),
    "fsdp": ((False, [], {}), SHARDED),
    "fsdp_config": (({},), SHARDED),
    "assistant_only_loss": ((True,), ASSISTANT),
    "completion_only_loss": ((True,), ASSISTANT),
    "train_on_inputs": ((False,), ASSISTANT),
    "train_on_input": ((False,), ASSISTANT),
    "bias": (("none",), "biases are not trained; leave it out"),
    "fan_in_fan_out": ((False,), "it follows from the layer; leave it out"),
    "init_lora_weights": ((True, "default"), "B begins at zero, A as in PEFT; leave it out"),
    "layers_to_transform": ((), r"give target_modules an expression: .*\.layers\.[0-3]\..*_proj"),
    "task_type": (("causal_lm",), "give task: lm, or score for the steps of a chain"),
    "peft_type": (("lora",), "only LoRA is trained"),
    "inference_mode": ((False,), "an adapter is evaluated by eval.py"),
    "neftune_noise_alpha": ((0,), "noise on embeddings is not there; leave it out"),
    "label_smoothing_factor": ((0,), "the loss is plain cross entropy; leave it out"),
    "adam_beta1": ((0.9,), FIXED),
    "adam_epsilon": ((1e-8,), FIXED),
    "betas": (([0.9, 0.999],), "beta1 is 0.9; give adam_beta2"),
    "min_lr": ((0,), "a schedule ends at 0; leave it out"),
    "lr_scheduler_kwargs": (({},), "a schedule ends at 0 and has no settings; leave it out"),
    "tf32": ((False,), "float32 is computed in float32; for speed, dtype = bfloat16"),
    "train_batch_size": ((), "a step has batch_size x gradient_accumulation_steps examples"),
    "auto_find_batch_size": ((False,), "give batch_size = auto"),
    "eval_strategy": (("steps",), f"{BY_STEPS}; {EVALUATED}"),
    "evaluation_strategy": (("steps",), f"{BY_STEPS}; {EVALUATED}"),
    "save_strategy": (("steps",), BY_STEPS),
    "logging_strategy": (("steps",), BY_STEPS),
    "metric_for_best_model": (("eval_loss", "loss"), "the lowest validation loss is the best"),
    "greater_is_better": ((False,), "the lowest validation loss is the best"),
    "early_stopping.enabled": ((), "give early_stopping_patience (0: never stop)"),
    "push_to_hub": ((False,), UPLOAD),
    "hub_model_id": ((), UPLOAD),
    "overwrite_output_dir": ((False,), "nothing is overwritten; name another experiment_name"),
    "resume_from": ((False,), RESUME),
    "resume_from_checkpoint": ((False,), RESUME),
    "data_seed": ((), "the order of the data follows seed; leave it out"),
    "tokenizer": ((), TOKENIZER),
    "tokenizer_name": ((), TOKENIZER),
    "chat_template": ((), TOKENIZER),
    "datasets": ((), MIXED),
    "dataset_name": ((), "give train_data = hf://datasets/OWNER/NAME"),
    "dataset_text_field": (("text",), "the text of a row is `text`"),
    "merge_adapter": ((False,), MERGE),
    "save_merged": ((False,), MERGE),
    "export_gguf": ((False,), f"{MERGE} --gguf FILE"),
}
