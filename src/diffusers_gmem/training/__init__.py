from .dataset import GMemLatentTrainingDataset, GMemTrainingDataset
from .flow_matching import flow_matching_loss, sample_timesteps
from .moving_average import GMemEMAModel
from .sample_dropout import SampleDropout
from .sampling_order import BlockOrder, TrainingBatchSampler, sample_generator
from .throughput import model_flops_per_image, peak_flops


__all__ = [
    "BlockOrder",
    "GMemEMAModel",
    "GMemLatentTrainingDataset",
    "GMemTrainingDataset",
    "SampleDropout",
    "TrainingBatchSampler",
    "flow_matching_loss",
    "model_flops_per_image",
    "peak_flops",
    "sample_generator",
    "sample_timesteps",
]
