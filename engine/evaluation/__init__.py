"""Evaluates frozen backbones: k-NN, the linear probe, and what the two share.

    frozen              a pretrained backbone that must not change, and the check that it did not
    features            features of whole data sets, extracted by all ranks
    knn                 weighted k-NN, and the monitor of pretraining
    linear_probe        the classifiers of the probe and their optimizer
    batches             batches of features to train them on
    probe_training      the epochs of the probe, and the file that an interrupted probe goes on from
    evaluation          what the commands share: opening weights and images, extracting features, writing results
    knn_evaluation      launch/knn.py
    linear_evaluation   launch/linear.py
    pictures            confusion matrix, nearest neighbours, curves
    results             results.json, pictures on disk and in TensorBoard

The weights themselves come from `crossbatch.engine.pretrained`.
"""
