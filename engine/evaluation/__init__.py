"""From a checkpoint to a number: k-NN, the linear probe, and what they share.

pretrained   the weights of a backbone, from any file that holds them
"""
