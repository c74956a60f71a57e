"""A configuration that trains in a second, on text.txt."""

CONFIG = {
    "seed_everything": 3,
    "trainer": {
        "max_steps": 20,
        "val_check_interval": 10,
        "limit_val_batches": 2,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "precision": "32-true",
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
    },
    "checkpoint_every_n_steps": 8,
    "model": {
        "class_path": "lit_transformer.LitCausalLM",
        "init_args": {
            "config": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_length": 32},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {
        "class_path": "lit_transformer.LanguageModelingData",
        "init_args": {"files": "text.txt", "block_size": 32, "batch_size": 4, "cache_dir": "cache"},
    },
}
