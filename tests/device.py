"""Where tests of what serves compute: on a GPU if there is one."""

import torch

__all__ = ["DEVICE"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
