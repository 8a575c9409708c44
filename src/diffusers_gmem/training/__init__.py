from .dataset import GMemTrainingDataset
from .flow_matching import flow_matching_loss, sample_timesteps
from .sampling_order import TrainingBatchSampler, sample_generator


__all__ = [
    "GMemTrainingDataset",
    "TrainingBatchSampler",
    "flow_matching_loss",
    "sample_generator",
    "sample_timesteps",
]
