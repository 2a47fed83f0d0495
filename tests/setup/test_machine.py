"""What a machine has, read from the files of Linux: both versions of control groups, and what is
plugged in."""

import pytest

from jaxdeep.setup import machine

MEMINFO = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n"


def files(root, **texts):
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("texts", "cores", "memory"),
    [
        ({"proc/self/cgroup": "0::/"}, None, None),
        (
            {
                "proc/self/cgroup": "0::/pod/run",
                "sys/fs/cgroup/pod/run/cpu.max": "max 100000",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000",
                "sys/fs/cgroup/pod/run/memory.max": "4096",
                "sys/fs/cgroup/pod/memory.max": "max",
            },
            1.5,
            4096,
        ),
        (  # a container: the path is the host's, the limits are at the top
            {
                "proc/self/cgroup": "0::/kubepods/one",
                "sys/fs/cgroup/cpu.max": "200000 100000",
                "sys/fs/cgroup/memory.max": "8192",
            },
            2.0,
            8192,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2048",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            0.5,
            2048,
        ),
    ],
    ids=["none", "version 2", "container", "version 1"],
)
def test_the_tightest_limit_of_all_groups_counts(texts, cores, memory, tmp_path):
    files(tmp_path, **texts, **{"proc/meminfo": MEMINFO})
    assert machine.cores(tmp_path).limit == cores
    assert machine.memory(tmp_path) == (1000 * 1024, 600 * 1024, memory)


def test_a_system_without_such_files_is_unknown(tmp_path):
    assert machine.memory(tmp_path) == (None, None, None)
    found = machine.cores(tmp_path)
    assert found.limit is None and 1 <= found.allowed <= found.machine
    assert machine.accelerators(tmp_path) == (0, 0, False)


def test_accelerators_are_told_from_other_cards(tmp_path):
    plugged = [
        *(("0x10de", "0x2330", "0x030200"), ("0x10de", "0x2330", "0x030000")),
        ("0x10de", "0x22a3", "0x068000"),  # a switch between GPUs
        *(("0x1ae0", "0x0063", "0x120000"), ("0x1ae0", "0x0042", "0x020000")),  # v5e, a network
        ("0x8086", "0x1237", "0x060000"),
    ]
    for number, (vendor, device, kind) in enumerate(plugged):
        place = f"sys/bus/pci/devices/{number}"
        files(
            tmp_path,
            **{f"{place}/vendor": vendor, f"{place}/device": device, f"{place}/class": kind},
        )
    assert machine.accelerators(tmp_path) == (2, 1, False)
    files(tmp_path, **{"dev/nvidiactl": ""})
    assert machine.accelerators(tmp_path).driver


def test_sizes_and_places(tmp_path):
    files(tmp_path, **{"a/b": "x" * 99, "c": "x" * 9})
    assert machine.size(tmp_path, 60.0) == (110, True)
    assert machine.existing(tmp_path / "a" / "none" / "deeper") == tmp_path / "a"
    assert machine.free(tmp_path / "none") > 0 and machine.writable(tmp_path / "none")
