"""`transfgu compare` under `ray job submit --working-dir . -- python jobs/compare.py ...`, on the job's own cluster."""

import sys

from transfgu_ray.cli import main

sys.argv.insert(1, "compare")
main()
