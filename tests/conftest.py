"""Hypothesis profiles: `dev` by default, `ci` reproducible, `deep` for a night.

HYPOTHESIS_PROFILE chooses one.
"""

import os
import sys

import torch
from hypothesis import settings

from tests.installed import ROOT

# The checkout comes last on the path, so that the package under test is the installed one.
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != str(ROOT)] + [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
settings.register_profile("deep", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
torch.set_num_threads(1)
