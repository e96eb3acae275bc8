"""Defines what a run trains: `pretrain` (MoCo v3 with BatchFormer) and `finetune`. `build` makes models and optimizers."""
