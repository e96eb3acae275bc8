"""What a run trains: `pretrain` (MoCo v3 with BatchFormer) and `finetune`. `build` makes the model of a configuration."""
