import torch

from diffusers_gmem.training.stopping import LONGEST_WAIT, StopRequest


def test_processes_wait_long_for_one_that_works_alone(tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with StopRequest() as stop:
            stop.begin()
            assert not stop.agreed()
            stop.requested = True
            assert stop.agreed()
        backend = stop._group._get_backend(torch.device("cpu"))
        assert backend.options._timeout == LONGEST_WAIT
    finally:
        torch.distributed.destroy_process_group()
