import os


# Before torch is imported, here and in the processes that tests start. The tensors are tiny: more threads only get in
# each other's way, all the more with several test processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing in the tests may reach for the Hub
os.environ["HF_HUB_OFFLINE"] = "1"
