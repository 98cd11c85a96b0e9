"""What other frameworks call our keys, so that a familiar name is answered with the right one."""

SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "optim.lr"),
    **dict.fromkeys(("warmup_steps", "lr_warmup_iters", "num_warmup_steps"), "optim.warmup"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_decay_style"), "optim.decay"),
    **dict.fromkeys(("optimizer", "optimizer_type"), "optim.name"),
    **dict.fromkeys(("max_steps", "num_steps", "train_iters", "iterations", "num_iterations"), "train.steps"),
    **dict.fromkeys(("max_tokens", "train_tokens", "token_budget", "num_tokens"), "train.tokens"),
    **dict.fromkeys(("embedding_lr", "adam_lr", "scalar_lr"), "optim.lr_elementwise"),
    **dict.fromkeys(("lr_wsd_decay_iters", "lr_wsd_decay_steps", "cooldown_steps"), "optim.decay_length"),
    **dict.fromkeys(("lr_wsd_decay_style",), "optim.decay_shape"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size"), "train.global_batch"),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size", "device_batch_size"), "train.micro_batch"),
    **dict.fromkeys(("seq_length", "sequence_length", "block_size", "max_seq_len", "context_length"), "train.seq_len"),
    **dict.fromkeys(("max_grad_norm", "clip_grad", "gradient_clipping", "clip_grad_norm"), "train.grad_clip"),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "activation_checkpoint", "recompute_granularity"),
        "train.recompute",
    ),
    **dict.fromkeys(("dtype", "bf16", "fp16", "mixed_precision"), "train.precision"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), "model.width"),
    **dict.fromkeys(("num_layers", "num_hidden_layers", "n_layer", "n_layers", "depth"), "model.layers"),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_head", "n_heads"), "model.heads"),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff"), "model.cms.hidden"),
    **dict.fromkeys(("tie_word_embeddings", "untie_embeddings_and_output_weights"), "model.tie_embeddings"),
    **dict.fromkeys(("rope_theta", "rotary_base"), "model.mixers.attention.rope_base"),
    **dict.fromkeys(("tensor_model_parallel_size", "tp", "tp_size"), "parallel.tensor"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pp", "pp_size"), "parallel.pipeline"),
    **dict.fromkeys(("save_interval", "save_steps", "checkpoint_interval"), "checkpoint.every"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "train.eval_every"),
    **dict.fromkeys(("log_interval", "logging_steps"), "log.every"),
    **dict.fromkeys(("output_dir", "save_dir"), "run.dir"),
    **dict.fromkeys(("use_wandb", "report_to"), "log.wandb"),
    **dict.fromkeys(("init_from", "initial_load_path", "model_name_or_path", "pretrained_checkpoint"), "model.init"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_epsilon"), "model.norm_eps"),
}
"""The last part of a foreign key: ours."""

ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum_steps"),
        "it follows from train.global_batch, train.micro_batch and the devices",
    ),
    **dict.fromkeys(("tokenizer", "tokenizer_path"), "the token set's manifest records its tokenizer"),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout"), "dropout is not in this version"),
    **dict.fromkeys(("ema", "ema_decay"), "an average of the weights is not in this version"),
    "wandb_project": "log.wandb=true, and the variable WANDB_PROJECT",
    **dict.fromkeys(("context_parallel_size", "cp", "cp_size"), "context parallelism is not in this version"),
}
"""The last part of a foreign key that has no key here: what to know instead."""
