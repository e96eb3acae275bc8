"""Evaluates frozen backbones: k-NN, the linear probe, and what the two share.

    features            features of whole data sets, extracted by all ranks with a network that must not change
    knn                 weighted k-NN, and the monitor of pretraining
    linear_probe        the classifiers of the probe and their optimizer
    batches             batches of features to train them on
    probe_file          the file that an interrupted probe goes on from
    evaluation          what the commands share: opening weights and images, extracting features, writing results
    knn_evaluation      launch/knn.py
    linear_evaluation   launch/linear.py
    results             results.json, and figures: confusion matrix, nearest neighbours, curves

The weights themselves come from `crossbatch.engine.pretrained`.
"""
