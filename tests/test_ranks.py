"""A process group of one rank, for a package that takes nothing less than a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamoe.layer.ranks import one_rank

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_default_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_alone_gets_a_group_that_torch_knows_by_name():
    """Symmetric memory takes nothing else, and finds the group's store by the group's name."""
    group = one_rank(CPU)
    assert isinstance(group, dist.ProcessGroup)
    assert (group.size(), group.rank()) == (1, 0)
    assert dist.distributed_c10d._resolve_process_group(group.group_name) is group
    group.barrier()
    assert one_rank(CPU) is group


def test_one_rank_of_several_waits_for_no_other():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=2)
    group = one_rank(CPU)
    assert (group.size(), group.rank()) == (1, 0)
    assert one_rank(CPU) is group
    assert dist.get_world_size() == 2


def test_the_group_of_an_engine_that_began_anew_is_not_the_old_one():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    groups = []
    for _ in range(2):
        dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
        groups.append(one_rank(CPU))
        dist.destroy_process_group()
    assert groups[0] is not groups[1]


def test_a_torch_without_process_groups_is_named(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match=r"built without; give a process group as group="):
        one_rank(torch.device("cuda"))
