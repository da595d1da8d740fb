"""Run the CPU benchmarks and rewrite the tables: `python -m benchmarks.run`."""

import subprocess
import sys

for module in ("benchmarks.eager_ops", "benchmarks.kv_fidelity", "benchmarks.tables"):
    subprocess.run([sys.executable, "-m", module], check=True)
