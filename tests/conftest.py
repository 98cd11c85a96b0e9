import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests share reference.py and multirank.py

from interpreted import define_kernels
from skip_list import SkipList

torch.set_num_threads(1)  # tiny tensors: a second thread costs four times the CPU time
define_kernels()  # before any test module imports triton


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipList(Path(__file__).with_name("skips.txt")))
