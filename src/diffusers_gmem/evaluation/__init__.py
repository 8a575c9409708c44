from .frechet_distance import FeatureStatistics, frechet_distance
from .image_sets import CroppedImages, GeneratedImages, read_published_statistics
from .inception import InceptionFeatures, InceptionV3, load_inception
from .inception_score import inception_score
from .nearest_images import NearestImages, draw_pairs, similarity_percentiles
from .precision_recall import PrecisionRecall, precision_recall


__all__ = [
    "CroppedImages",
    "FeatureStatistics",
    "GeneratedImages",
    "InceptionFeatures",
    "InceptionV3",
    "NearestImages",
    "PrecisionRecall",
    "draw_pairs",
    "frechet_distance",
    "inception_score",
    "load_inception",
    "precision_recall",
    "read_published_statistics",
    "similarity_percentiles",
]
