"""How much memory is free, from files like the kernel's."""

from pathlib import Path

import pytest

from server.memory import free_host_bytes

GIB = 1 << 30


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:       16000000 kB\nMemAvailable:    4194304 kB\n")
    return tmp_path


def limit(kernel: Path, maximum: str, used: int, cached: int) -> int | None:
    (kernel / "memory.max").write_text(f"{maximum}\n")
    (kernel / "memory.current").write_text(f"{used}\n")
    (kernel / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return free_host_bytes(kernel / "meminfo", kernel)


def test_what_the_kernel_says_is_available(kernel: Path) -> None:
    assert free_host_bytes(kernel / "meminfo", kernel / "none") == 4 * GIB
    assert free_host_bytes(kernel / "none", kernel / "none") is None


def test_the_container_s_limit_counts_and_cached_files_are_no_use(kernel: Path) -> None:
    assert limit(kernel, "max", GIB, 0) == 4 * GIB
    assert limit(kernel, str(3 * GIB), GIB, 0) == 2 * GIB
    assert limit(kernel, str(3 * GIB), 2 * GIB, GIB) == 2 * GIB
    assert limit(kernel, str(GIB), 2 * GIB, 0) == 0
    assert limit(kernel, str(64 * GIB), GIB, 0) == 4 * GIB


def test_this_machine_has_some() -> None:
    assert (free_host_bytes() or 0) > 0
