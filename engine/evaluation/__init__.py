"""From a checkpoint to a number: k-NN and the linear probe, and what they share.

    pretrained       the weights of a backbone, from any file that holds them, or the reason why not
    frozen           that backbone, and the check that nothing has changed it
    features         features of whole data sets, spread over the ranks
    knn              the vote; the monitor of training
    knn_results      launch/knn.py
    linear           the classifiers of the probe and their optimizer
    batches          what they are trained on
    linear_results   launch/linear.py: epochs, resuming
    pictures         confusion matrix, nearest neighbours, curves
    report           results.json, pictures on disk and in TensorBoard, the closing table

Whatever needs pretrained weights gets them from `pretrained`, whatever needs features from `features`.
"""
