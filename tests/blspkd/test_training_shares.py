"""What comes before training is divided among the processes, which wait for each other."""

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from blspkd.training.shares import in_shares

RECORDS = list(range(7))


def test_one_process_has_it_all():
    done = []
    in_shares(SimpleNamespace(num_processes=1), RECORDS, done.extend)
    assert done == RECORDS


def _one_of_two(rank, folder, disks):
    """``disks`` is 1 where the processes are of one node, 2 where they are of two."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=2),  # as 10 minutes are to the encoding of a corpus
    )
    disk = folder / f"disk-{rank % disks}"
    disk.mkdir(exist_ok=True)

    def work(records):
        for record in records:
            if not (disk / str(record)).exists():
                (disk / str(record)).write_text(str(rank))
        time.sleep(5 * rank)

    process = SimpleNamespace(
        num_processes=2, process_index=rank, local_process_index=rank if disks == 1 else 0
    )
    in_shares(process, RECORDS, work)
    (folder / f"seen-{rank}").write_text(" ".join(sorted(one.name for one in disk.iterdir())))
    dist.destroy_process_group()


@pytest.mark.parametrize("disks", [1, 2])
def test_two_processes_share_and_wait(tmp_path: Path, monkeypatch, disks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // disks))
    mp.spawn(_one_of_two, (tmp_path, disks), nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"seen-{rank}").read_text().split() == [str(one) for one in RECORDS]
    if disks == 1:
        by = [(tmp_path / "disk-0" / str(record)).read_text() for record in RECORDS]
        assert by == ["0", "1", "0", "1", "0", "1", "0"]
