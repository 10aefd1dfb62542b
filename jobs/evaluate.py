"""`transfgu evaluate` under `ray job submit --working-dir . -- python jobs/evaluate.py ...`, on its own cluster."""

import sys

from transfgu_ray.cli import main

sys.argv.insert(1, "evaluate")
main()
