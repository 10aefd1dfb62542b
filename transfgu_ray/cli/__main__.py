"""`python -m transfgu_ray.cli`."""

from transfgu_ray.cli import main

main()
