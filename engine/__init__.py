"""The engine: everything between a model on one device and a run on many ranks.

    config/         every configuration key, read from a recipe, checked, and resolved for a device and a world size
    chunked         the cut step for any backbone and loss; step: the optimizer step of MoCo v3, built on it
    optimizers/     LARS and parameter groups, which know no configuration
    sharding/       DeepSpeed ZeRO and FSDP2 behind one interface; zero_layout: who holds what in a DeepSpeed engine
    tasks/          what is trained: pretrain, finetune; build: models, optimizers and backends of a configuration
    trainer         the loop; train_state: what it changes; start: builds both in a run directory
    gradient_noise  up to which batch larger batches pay, from gradients of ranks and chunks
    datasets        the images of a run, the same on all ranks
    checkpoint/     written in the background, loaded at any world size, stage and backend
    pretrained/     weights from and to MoCo v3, DeiT, timm, torchvision and safetensors
    replay/         makes a step of a run again, and finds what went wrong in it first
    evaluation/     k-NN, the linear probe, their results and pictures
    planning/       does a recipe fit, how long does it take, what limits it; memory_model and sketch: what a step keeps
    runtime/        ranks (world, distributed), watchdog, signals, non-finite steps, chunk size, timing, files, exit codes
    run_log         metrics.jsonl, TensorBoard, progress bar; schedules: learning rate and momentum

A new optimizer goes into optimizers/, a new way of sharding into sharding/ as a `Backend`, a new kind of training into tasks/.
"""
