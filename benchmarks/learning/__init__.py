"""Measures how soon a run has learnt something: crossbatch beside what people would use otherwise, on the same cores.

python -m benchmarks learning --images datasets/cifar10 --minutes 10 --seeds 0 1 2 --out benchmarks/results

The protocol. Each side pretrains the same network from random weights on the images of DIR/train, for as long as the others:
first its rate is measured, then it gets as many images as fit into the minutes, with its schedules ending there. The sides run
as processes of their own and take turns of some seconds on all cores, so that a slow minute of the machine meets all of them.
Only the time of a side's own turns counts, from the start of its process, with imports and saves. Each saves its weights four
times. `launch/knn.py` scores them afterwards: 20 nearest neighbours among a fifth of DIR/train, for all images of DIR/val or
DIR/test.

Network, batch, temperature, head sizes, augmentations, optimizer, learning rate and momentum are those of one recipe, all in
fp32 and without BatchFormer (an ablation adds it by a key). Random weights are drawn alike; all ViTs have MoCo v3's fixed
positions and frozen patch projection. What differs:

    crossbatch   launch/pretrain.py with the recipe
    plain        MoCo v3 in plain torch as the released code goes about it (`benchmarks.stages.plain_step`) with torchvision's
                 loader; AdamW decays biases and norms, too
    lightly      MoCo v2 of lightly's parts in a plain loop, as its documentation puts them together: its transform (both views
                 alike: blurred as often as the others on the whole, never solarized), a projection head but no predictor,
                 4096 stored keys as negatives, both orders of the views
    stable-pretraining
                 MoCo v3 of stable-pretraining (`pip install stable-pretraining`) in a plain loop with torchvision's loader;
                 AdamW as in plain; for ResNets only, as its module asks the backbone for features of 224 pixels
"""

SOONER = "minutes to the best peer's k-NN"  # when a side had reached that
# The settings of a row that were measured.
FIGURES = ("linear, %", "minutes", "images", "images/s", "CPU ms an image", "busy cores", "J an image", SOONER)
