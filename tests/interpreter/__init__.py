"""Kernels run by Triton's interpreter on the CPU: `TRITON_INTERPRET=1 pytest tests/interpreter`."""

import os

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
