"""One thread of torch in every test process: several work side by side, and the matrices are small."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere, and for the processes that tests start
