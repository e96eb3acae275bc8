"""Reads pretrained weights from the files of other programs, and writes them.

weights   the tensors of one backbone, from a run or any kind of file
load      builds the network, checks that the weights are those of it, and loads them
export    a backbone for timm, DeiT, torchvision, or as safetensors
formats   how these libraries build the network
moco_v3   whole checkpoints of moco-v3 and BatchFormer, read and written
files     torch files and safetensors, read without running code and written atomically
"""
