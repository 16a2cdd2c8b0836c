"""Settings for all tests."""

import os

import torch

# Before any kernel is imported: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
