"""`transfgu pretrain` under `ray job submit --working-dir . -- python jobs/pretrain.py ...`, on its own cluster."""

import sys

from transfgu_ray.cli import main

sys.argv.insert(1, "pretrain")
main()
