"""The engine: everything between a model on one device and a run on many.

    config/       what a recipe says, checked and resolved
    distributed   processes, ranks, collectives; the only reader of the environment
    images        those of a run, the same on all ranks
    build, step   configuration -> model; one optimizer step, cut at the features
    optimizers/   LARS and AdamW, meaning the same under every sharding
    sharding/     DeepSpeed ZeRO and FSDP2 behind one interface
    checkpoint/   any world size and backend, written in the background; saves: when, and what is said about it
    legacy        the originals' files; export: a backbone for timm, DeiT, torchvision; weights: reading and writing such files
    signals       being asked to stop; watch: ranks that are gone; faults: numbers that are not finite
    evaluation/   k-NN, the linear probe, and loading pretrained weights from anything
    telemetry     metrics.jsonl, TensorBoard, progress bar
    parts         where the time of a step goes; profile: the same of a running job, and traces
    trainer       the loop of any run; train_state: what it changes; start: builds both in a run directory
    tasks/        pretrain, finetune: what is trained

A new optimizer goes into optimizers/, a new way of sharding into sharding/ as a `Backend`.
"""
