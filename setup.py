"""Build the package. Every dependency is here for one reason, given beside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

package = Path(__file__).with_name("crossbatch").joinpath("__init__.py").read_text(encoding="utf-8")
# s3://, gs://, https:// through fsspec, which torch brings: the packages that each of them needs.
REMOTE = ["s3fs>=2024.6", "gcsfs>=2024.6", "aiohttp>=3.9"]
(version,) = re.findall(r'^__version__ = "(.*)"', package, flags=re.MULTILINE)

setup(
    name="crossbatch",
    version=version,
    description="Large-batch contrastive pretraining: MoCo v3 + BatchFormer on whatever you have",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["crossbatch", "crossbatch.*"]),
    package_data={"crossbatch": ["py.typed", "ds_configs/*.json", "launch/*.slurm"]},
    entry_points={"console_scripts": ["crossbatch = crossbatch.launch.__main__:main"]},
    install_requires=[
        "torch>=2.10",  # tensors, FSDP2, DataLoader
        "torchvision>=0.25",  # ResNets, image functions
        "timm>=1.0.21",  # vision transformers
        "deepspeed>=0.19.8",  # ZeRO and the launcher; gradients that older ones spoil: docs/versions.md
        "pydantic>=2.7",  # checks recipes, with its annotated-types; DeepSpeed brings both, too
        "numpy>=1.26",  # data order and augmentation parameters
        "scipy>=1.11",  # .mat files of Flowers-102
        "pillow>=10.0",  # decoding where DALI is absent, and of whatever is no ordinary JPEG
        "opencv-python-headless>=4.9",  # colours and blur on a CPU, at several times PIL's speed
        "numba>=0.61",  # compiles colours and blur to one pass that equals PIL to the bit; needs no compiler
        "safetensors>=0.4",  # exported weights without pickle
        "matplotlib>=3.8",  # pictures of evaluations and benchmarks
        "tensorboard>=2.16",  # event files
        "rich>=13.7",  # progress bar and tables
    ],
    extras_require={
        # What PyPI's torch is built for, and NVIDIA's data loader for the same CUDA; both sets run without a GPU, too.
        # cuda12: a V100 (sm_70), or a driver too old for CUDA 13. From 2.11 on, PyPI's torch is built for CUDA 13.
        "cuda12": ["torch==2.10.*", "torchvision==0.25.*", "nvidia-dali-cuda120>=2.0"],
        "cuda13": ["torch>=2.11", "torchvision>=0.26", "nvidia-dali-cuda130>=2.0"],
        "hf": ["datasets>=3.0"],  # hf:// and lists in parquet, with its pyarrow
        "remote": REMOTE,
        # Where metrics can go besides TensorBoard, and the format that most inference programs read.
        "trackers": ["wandb>=0.18", "mlflow>=2.15", "trackio>=0.2"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.7",  # `make test` in two processes
            *REMOTE,  # read from servers that the tests start
            "moto[server,s3]>=5.0",  # an S3 server on this machine, for remote shards
            "scikit-learn>=1.4",  # its k-NN and logistic regression are what ours are tested against
        ],
        # What `make test-all` tests besides: all that is optional, and files and folders made for other programs.
        "test-all": [
            "crossbatch[hf,trackers,onnx]",
            "pillow-heif>=0.18",  # photographs of telephones
            "transformers>=4.48",  # a folder that it loads
            "webdataset>=0.2.100",  # shards that it writes
        ],
        "dev": [
            "ruff==0.17.6",  # lint and format
            "pyright==1.1.414",  # types
            "import-linter>=2.5",  # which package may import which
            "pytest-cov>=6.0",  # the floor of covered lines of engine/ and models/
            "mkdocs-material>=9.6",  # the documentation
            "mkdocstrings-python>=1.16",  # its page of public names, from the docstrings
            "build>=1.2",  # the wheel that the tests install
            "pre-commit>=4.0",  # the same checks before a commit
        ],
    },
)
