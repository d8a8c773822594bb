"""What tests the installed package, and not the checkout beside it, in other processes too."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
# Python does not put the working directory on the path of a process that has this environment.
ENVIRONMENT = os.environ | {"PYTHONSAFEPATH": "1"}
