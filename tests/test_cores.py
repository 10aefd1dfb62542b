import os

import pytest

from transfgu_ray.cores import usable_cores

BOUND = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, BOUND),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, BOUND),
        ({"cpu.max": "9900000 100000\n"}, min(99, BOUND)),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, BOUND),
    ],
)
def test_usable_cores__are_bounded_by_the_quota_of_the_container(tmp_path, files, want):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == want


def test_usable_cores__are_those_the_process_is_bound_to(tmp_path):
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(bound)])
    try:
        assert usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, bound)
