"""`transfgu concepts` under `ray job submit --working-dir . -- python jobs/concepts.py ...`, on its own cluster."""

import sys

from transfgu_ray.cli import main

sys.argv.insert(1, "concepts")
main()
