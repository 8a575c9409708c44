from .dataset import GMemLatentTrainingDataset, GMemTrainingDataset
from .flow_matching import flow_matching_loss, sample_timesteps
from .sampling_order import BlockOrder, TrainingBatchSampler, sample_generator


__all__ = [
    "BlockOrder",
    "GMemLatentTrainingDataset",
    "GMemTrainingDataset",
    "TrainingBatchSampler",
    "flow_matching_loss",
    "sample_generator",
    "sample_timesteps",
]
