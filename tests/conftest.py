"""Tests run offline and on one thread: fast on small tensors, and the same everywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch  # after the variables above, which huggingface_hub reads when it is imported

torch.set_num_threads(1)
